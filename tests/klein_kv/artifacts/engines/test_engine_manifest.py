import json
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

import pytest

from klein_kv.artifacts.engines.engine_manifest import (
    ENGINE_MANIFEST,
    EngineManifest,
    _self_digest,
)
from klein_kv.artifacts.engines.engine_record import EngineRecord, ProfileRecord
from klein_kv.artifacts.signature import TensorSpec
from klein_kv.artifacts.weights import WeightPlace
from klein_kv.errors import ArtifactError, RequestError

DATA = b"native code"
SHAPES = {"x": ((1, 0, 4), (1, 16, 4), (1, 64, 4))}
BENT = {"x": ((1, 0), (1, 16, 4), (1, 64, 4))}
PROFILE = ProfileRecord("everyday", {"ref_tokens": (0, 16, 64)}, SHAPES)
RECORD = EngineRecord(
    graph="cached_step",
    file="cached_step.engine",
    layers="cached_step.layers.json",
    bytes=len(DATA),
    sha256=sha256(DATA).hexdigest(),
    key="k",
    onnx_digest="sha256:0",
    inputs=(TensorSpec("x", "bfloat16", (1, -1, 4)),),
    outputs=(TensorSpec("y", "bfloat16", (1, -1, 4)),),
    weights={"w": WeightPlace("transformer/a.safetensors", 8, 32, "bfloat16", (4, 4))},
    profiles=(PROFILE,),
    scratch_bytes=5,
    seconds=1.5,
    peak_rss=6,
)
MANIFEST = EngineManifest(
    "tensorrt_rtx", "1.7.1.116", "rtx5090", 120, "bf16", "shared", "default",
    {"cached_step": RECORD},
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / RECORD.file).write_bytes(DATA)
    MANIFEST.save(tmp_path)
    return tmp_path


def test_saved_manifest_reads_back_equal(folder: Path) -> None:
    assert EngineManifest.load(folder) == MANIFEST
    assert MANIFEST.read_engine(folder, "cached_step") == DATA
    assert sorted(path.name for path in folder.iterdir()) == [RECORD.file, ENGINE_MANIFEST]


@pytest.mark.parametrize("data", [b"", b"native codf", DATA + b"x"])
def test_tampered_engine_is_refused(folder: Path, data: bytes) -> None:
    (folder / RECORD.file).write_bytes(data)
    with pytest.raises(ArtifactError, match=r"is not the engine that engine\.json describes"):
        MANIFEST.read_engine(folder, "cached_step")


def test_missing_engine_is_refused(folder: Path) -> None:
    (folder / RECORD.file).unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        MANIFEST.read_engine(folder, "cached_step")
    with pytest.raises(ArtifactError, match="no engine of first_step, only of cached_step"):
        MANIFEST.read_engine(folder, "first_step")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (RECORD.sha256, "0" * 64),
        ('"sm": 120', '"sm": 89'),
        ("cached_step.engine", "../../evil.engine"),
        ("{", "[" * 100_000),
        ("}", ""),
    ],
)
def test_tampered_manifest_is_refused(folder: Path, old: str, new: str) -> None:
    path = folder / ENGINE_MANIFEST
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ArtifactError, match=r"changed after it was written|cannot be read"):
        EngineManifest.load(folder)


def test_paths_stay_in_their_folders(folder: Path) -> None:
    evil = replace(
        RECORD, file="../x.engine", weights={"w": WeightPlace("/etc/passwd", 0, 1, "uint8", (1,))}
    )
    manifest = replace(MANIFEST, engines={"cached_step": evil})
    with pytest.raises(ArtifactError, match="leaves the"):
        manifest.read_engine(folder, "cached_step")
    with pytest.raises(ArtifactError, match="leaves the"):
        evil.weight_refs(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, "the format is 'x', expected 'klein-kv engines'"),
        ({"format_version": 2}, "format version 2, this klein-kv reads 1"),
        ({"sm": 1e999}, "incomplete"),
        ({"module": None}, "incomplete"),
        ({"engines": {"x": asdict(RECORD) | {"scratch_bytes": 1e999}}}, "incomplete"),
        ({"engines": {"x": asdict(RECORD) | {"sha256": [1]}}}, "incomplete"),
        (
            {"engines": {"x": asdict(RECORD) | {"profiles": [asdict(PROFILE) | {"shapes": BENT}]}}},
            "incomplete.* numbers of axes",
        ),
    ],
)
def test_other_manifests_are_refused(folder: Path, change: dict[str, object], message: str) -> None:
    """Also where the digest is that of what somebody has written."""
    path = folder / ENGINE_MANIFEST
    value = json.loads(path.read_text()) | change
    path.write_text(json.dumps(value | {"digest": _self_digest(value)}))
    with pytest.raises(ArtifactError, match=message):
        EngineManifest.load(folder)
    path.unlink()
    with pytest.raises(ArtifactError, match="holds no engines"):
        EngineManifest.load(folder)


def test_profile_for_shapes() -> None:
    wide = ProfileRecord("wide", {}, {"x": ((1, 0, 4), (1, 16, 4), (1, 256, 4))})
    record = replace(RECORD, profiles=(*RECORD.profiles, wide))
    assert record.profile_for({"x": (1, 0, 4)}) == 0
    assert record.profile_for({"x": (1, 65, 4), "timestep": (1,)}) == 1
    for shape in ((1, 257, 4), (1, 4), (2, 16, 4)):
        with pytest.raises(RequestError, match="no profile of this engine holds x"):
            record.profile_for({"x": shape})


def test_weight_refs_check_the_files(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"weights of the engine of cached_step: w .* cannot"):
        RECORD.weight_refs(tmp_path)
    path = tmp_path / "transformer" / "a.safetensors"
    path.parent.mkdir()
    path.write_bytes(bytes(40))
    ref = RECORD.weight_refs(tmp_path)["w"]
    assert (ref.path, ref.offset, ref.nbytes, ref.shape) == (path, 8, 32, (4, 4))
