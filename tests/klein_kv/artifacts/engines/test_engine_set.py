"""Which engines run: those of one shape where they fit, the general ones otherwise."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from klein_kv.artifacts.engines.engine_manifest import ENGINE_MANIFEST, EngineManifest
from klein_kv.artifacts.engines.engine_record import ProfileRecord
from klein_kv.artifacts.engines.engine_set import open_engines
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.signature import make_signature
from klein_kv.errors import ArtifactError, BuildError, RequestError
from klein_kv.runtime.backends.trt.backend import TrtBackend
from tests.runtime.backends.fake_cuda import FakeCuda
from tests.runtime.backends.fake_engines import make_engines
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
    manifest = Manifest.load(tiny_artifacts)
    cuda = FakeCuda()
    trt = FakeTrt(tiny_artifacts, cuda)
    general = artifacts / "engines" / "general"
    backend = TrtBackend(tiny_artifacts, manifest, engines=general, cuda=cuda.cuda, trt=trt)
    backend._engines = open_engines(artifacts, manifest, manifest.graphs)
    signature = make_signature("encode_references", manifest.config, manifest.dtype)

    def run(tokens: int) -> dict[str, Any]:
        inputs = {}
        for spec in signature.inputs:
            shape = spec.concrete({"ref_tokens": tokens})
            value = np.zeros(shape, np.int64 if spec.dtype == "int64" else np.float32)
            inputs[spec.name] = backend.upload(value)
        return backend.run("encode_references", inputs)

    for folder in ("general", "shape"):
        path = artifacts / "engines" / folder / ENGINE_MANIFEST
        os.utime(path, (1, 1))
    run(TOKENS + 1)
    assert [path.name for path in backend._loaded["encode_references"]] == ["general"]
    weights = {ref: buffer.pointer for ref, buffer in backend._weights.items()}
    run(TOKENS)
    assert [x.name for x in backend._loaded["encode_references"]] == ["general", "shape"]
    assert {ref: buffer.pointer for ref, buffer in backend._weights.items()} == weights
    assert (artifacts / "engines" / "shape" / ENGINE_MANIFEST).stat().st_mtime > 1
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
    with pytest.raises(RequestError, match="no profile of this engine holds"):
        only.choose("encode_references", {"ref_ids": (TOKENS + 1, 4)})


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
    kept = found.for_device("fake_trt", "0.0.1", 120)
    assert {x.path.name for x in kept.folders} == {"shape", "general"}
    assert [x.path.name for x in found.for_device("fake_trt", "0.0.1", 89).folders] == ["other"]
    with pytest.raises(BuildError, match=r"this is fake_trt 9, which cannot load them"):
        found.for_device("fake_trt", "9", 120)
    with pytest.raises(BuildError, match=r"12\.0 .*, this GPU has 8\.6; .* sm86"):
        found.for_device("fake_trt", "0.0.1", 86)
