"""Which engines run: those of one shape where they fit, the general ones otherwise."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from klein_kv.artifacts.engines.engine_manifest import ENGINE_MANIFEST, EngineManifest
from klein_kv.artifacts.engines.engine_record import EngineRecord, ProfileRecord
from klein_kv.artifacts.engines.engine_set import open_engines
from klein_kv.artifacts.engines.engine_sizes import sizes_text
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.signature import make_signature
from klein_kv.engines.sizes.profiles import engine_profiles
from klein_kv.engines.sizes.recipe import Recipe, Size
from klein_kv.engines.sizes.shape_engines import shape_recipe
from klein_kv.errors import ArtifactError, BuildError, RequestError
from klein_kv.runtime.backends.trt.backend import TrtBackend
from tests.runtime.backends.fake_cuda import FakeCuda
from tests.runtime.backends.fake_engines import make_engines, random_inputs
from tests.runtime.backends.fake_trt import SCRATCH, FakeTrt

TOKENS = 20


def make_shape(artifacts: Path, folder: Path, tokens: int, **changes: Any) -> Path:
    """Engines of one shape: that many tokens of everything."""
    make_engines(artifacts, folder)
    engines = EngineManifest.load(folder)

    def fixed(record: Any) -> Any:
        shapes = {
            name: ((one := tuple(tokens if axis == 64 else axis for axis in typical)), one, one)
            for name, (_, typical, _) in record.profiles[0].shapes.items()
        }
        return replace(record, profiles=(ProfileRecord("one", {}, shapes, SCRATCH),))

    records = {graph: fixed(record) for graph, record in engines.engines.items()}
    replace(engines, engines=records, recipe=f"{tokens}", **changes).save(folder)
    return folder


@pytest.fixture
def artifacts(tiny_artifacts: Path, tmp_path: Path) -> Path:
    """The tiny artifacts with a general set of engines and one of one shape."""
    folder = tmp_path / "artifacts"
    folder.mkdir()
    for path in tiny_artifacts.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "engines").unlink(missing_ok=True)
    for name in ("general", "shape"):
        (folder / "engines" / name).mkdir(parents=True)
    make_engines(tiny_artifacts, folder / "engines" / "general")
    make_shape(tiny_artifacts, folder / "engines" / "shape", TOKENS)
    return folder


def names(artifacts: Path, **shapes: tuple[int, ...]) -> str:
    manifest = Manifest.load(artifacts, check_files=False)
    found = open_engines(artifacts, manifest, manifest.graphs)
    return found.choose("encode_references", shapes).path.name


def test_the_shape_decides(artifacts: Path) -> None:
    assert names(artifacts, ref_ids=(TOKENS, 4)) == "shape"
    assert names(artifacts, ref_ids=(TOKENS + 1, 4)) == "general"


def test_the_executor_changes_engines_and_keeps_weights(
    tiny_artifacts: Path, artifacts: Path
) -> None:
    manifest, cuda = Manifest.load(tiny_artifacts), FakeCuda()
    trt, folder = FakeTrt(tiny_artifacts, cuda), artifacts / "engines"
    backend = TrtBackend(
        tiny_artifacts, manifest, engines=folder / "general", cuda=cuda.cuda, trt=trt
    )
    backend._engines = open_engines(artifacts, manifest, manifest.graphs)
    signature = make_signature("encode_references", manifest.config, manifest.dtype)

    def run(tokens: int) -> list[str]:
        inputs = random_inputs(signature, ref_tokens=tokens)
        uploaded = {name: backend.upload(value) for name, value in inputs.items()}
        backend.run("encode_references", uploaded)
        return [path.name for path in backend._loaded["encode_references"]]

    os.utime(folder / "shape" / ENGINE_MANIFEST, (1, 1))
    assert run(TOKENS + 1) == ["general"]
    weights = {ref: buffer.pointer for ref, buffer in backend._weights.items()}
    assert run(TOKENS) == ["general", "shape"]
    assert {ref: buffer.pointer for ref, buffer in backend._weights.items()} == weights
    assert (folder / "shape" / ENGINE_MANIFEST).stat().st_mtime > 1
    for _ in range(3):
        run(TOKENS + 1)
        run(TOKENS)
    assert len(trt.loads) == 2, "both stay loaded"


def test_errors_say_what_is_missing(tiny_artifacts: Path, artifacts: Path) -> None:
    manifest = Manifest.load(tiny_artifacts)
    found = open_engines(artifacts, manifest, manifest.graphs)
    with pytest.raises(ArtifactError, match="engine of plain_step, only of blend, cached_s"):
        found.choose("plain_step", {})
    with pytest.raises(ArtifactError, match="there is no engine of plain_step"):
        found.records("plain_step")
    only = open_engines(artifacts, manifest, manifest.graphs, artifacts / "engines" / "shape")
    with pytest.raises(RequestError, match=r"takes these inputs; .* no profile of this"):
        only.choose("encode_references", {"ref_ids": (TOKENS + 1, 4)})


def test_an_engine_of_no_graph_is_refused(tiny_artifacts: Path, artifacts: Path) -> None:
    folder, manifest = artifacts / "engines/general", Manifest.load(tiny_artifacts)
    engines = EngineManifest.load(folder)
    strange = engines.engines | {"nothing": engines.engines["first_step"]}
    replace(engines, engines=strange).save(folder)
    with pytest.raises(ArtifactError, match="engine of nothing was built from another export"):
        open_engines(artifacts, manifest, manifest.graphs)


def test_sizes_are_told_in_pixels(tiny_artifacts: Path, artifacts: Path) -> None:
    """Tokens alone, which they were told in, are nothing that a user asks for."""
    manifest = Manifest.load(tiny_artifacts)
    engines = EngineManifest.load(artifacts / "engines/general")

    def sized(graph: str, recipe: Recipe) -> EngineRecord:
        signature = make_signature(graph, manifest.config, manifest.dtype)
        profiles = engine_profiles(signature, recipe, manifest.config)
        return replace(engines.engines[graph], profiles=tuple(profiles))

    records = {graph: sized(graph, Recipe.load("default")) for graph in engines.engines}
    replace(engines, engines=records).save(artifacts / "engines/general")
    found = open_engines(artifacts, manifest, manifest.graphs, artifacts / "engines/general")
    takes = (
        "general takes outputs of 512x512 to 1440x1440 pixels; references of none to 2048x2048 "
        "pixels together (4 of 1024x1024)"
    )
    assert found.sizes() == takes
    for graph, shapes, wanted in (
        (
            "first_step",
            {"hidden_states": (2, 16384, 128), "ref_hidden_states": (1, 17000, 128)},
            "an output of an area of 2048x2048 pixels, 2 at once, references of 4.35 million pixels"
            " together",
        ),
        ("vae_decoder", {"latents": (1, 64, 120, 128)}, "an output of 1920x1024 pixels"),
        ("vae_encoder", {"image": (1, 48, 2048, 3)}, "a reference of 2048x48 pixels"),
        ("text_encoder", {"input_ids": (1, 256)}, "256 prompt tokens"),
    ):
        with pytest.raises(RequestError) as error:
            found.choose(graph, shapes)
        start = f"no engine of {graph} takes {wanted}; {takes}; build engines of this size ("
        assert str(error.value).startswith(start)
    step = sized("cached_step", shape_recipe(Size(1024, 768), 1))
    assert sizes_text(replace(engines, engines={"cached_step": step}), 16) == (
        "outputs of an area of 0.79 million pixels; references of 1024x1024 pixels together "
        "(1 of 1024x1024)"
    )
    assert sizes_text(engines, 16) == "sizes that are not told"


def test_of_several_that_fit_the_one_with_least_scratch_runs(
    tiny_artifacts: Path, artifacts: Path
) -> None:
    """Regression: two recipes for ranges were an error, with no way to name one of them."""
    for name, scratch in (("larger", SCRATCH + 1), ("smaller", SCRATCH - 1)):
        (artifacts / "engines" / name).mkdir()
        needs = {"encode_references": scratch}
        make_engines(tiny_artifacts, artifacts / "engines" / name, scratch=needs)
    assert names(artifacts, ref_ids=(TOKENS, 4)) == "shape"
    assert names(artifacts, ref_ids=(TOKENS + 1, 4)) == "smaller"


def test_engines_of_another_gpu_or_library_are_left_out(
    tiny_artifacts: Path, artifacts: Path
) -> None:
    folder = artifacts / "engines" / "old"
    folder.mkdir()
    make_shape(tiny_artifacts, folder, 24, version="0.0.0")
    other = artifacts / "engines" / "other"
    other.mkdir()
    make_shape(tiny_artifacts, other, 24, sm=89)
    manifest = Manifest.load(tiny_artifacts)
    found = open_engines(artifacts, manifest, manifest.graphs)
    assert {x.path.name for x in found.folders} == {"general", "shape", "old", "other"}
    kept = found.for_module("fake_trt", "0.0.1").for_sm(120)
    assert {x.path.name for x in kept.folders} == {"shape", "general"}
    assert [x.path.name for x in found.for_module("fake_trt", "0.0.1").for_sm(89).folders] == [
        "other"
    ]
    with pytest.raises(BuildError, match=r"this is fake_trt 9, which cannot load them"):
        found.for_module("fake_trt", "9").for_sm(120)
    with pytest.raises(BuildError, match=r"12\.0 .*, this GPU has 8\.6; .* sm86"):
        found.for_module("fake_trt", "0.0.1").for_sm(86)
