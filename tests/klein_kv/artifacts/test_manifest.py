"""The manifest: what it refuses before anything of an artifact folder is opened."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from klein_kv import KleinKVPipeline
from klein_kv.artifacts.digest import file_digest
from klein_kv.artifacts.manifest import FORMAT_VERSION, MANIFEST, FileRecord, Manifest
from klein_kv.artifacts.signature import GRAPH_FILES
from klein_kv.artifacts.weights import graph_weights, map_weight, read_header, weights_file
from klein_kv.errors import ArtifactError, CheckpointError

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
TABLE = "transformer/cached_step.weights.json"
Edit = Callable[[Callable[[dict[str, Any]], Any]], None]


def write(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)  # it may be a hard link
    path.write_bytes(content)


@pytest.fixture
def folder(tiny_artifacts: Path, tmp_path: Path) -> Path:
    """A copy to damage, of links."""
    return Path(shutil.copytree(tiny_artifacts, tmp_path / "artifacts", copy_function=os.link))


@pytest.fixture
def edit(folder: Path) -> Edit:
    """Rewrites klein.json with a change: `edit(lambda value: ...)`."""

    def apply(change: Callable[[dict[str, Any]], Any]) -> None:
        value = json.loads((folder / MANIFEST).read_bytes())
        change(value)
        write(folder / MANIFEST, json.dumps(value).encode())

    return apply


def test_content(tiny_artifacts: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(tiny_artifacts)
    assert (manifest.model_id, manifest.variant, manifest.dtype) == ("tiny", "kv", "float32")
    assert manifest.config.transformer.num_blocks == 3
    assert manifest.scheduler["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    assert manifest.prompt.prefix == "<|im_start|>user\n"
    assert "LICENSE.md" in manifest.licence
    paths = [path for path in tiny_artifacts.rglob("*") if path.is_file()]
    on_disk = {path.relative_to(tiny_artifacts).as_posix() for path in paths}
    assert set(manifest.files) == on_disk - {MANIFEST}
    assert {*GRAPH_FILES.values(), *map(weights_file, GRAPH_FILES.values())} < set(manifest.files)
    with pytest.raises(CheckpointError, match=r"pad_token is .* valid Unicode"):
        replace(manifest.prompt, pad_token="\ud800")
    manifest.save(tmp_path)
    assert (tmp_path / MANIFEST).read_bytes() == (tiny_artifacts / MANIFEST).read_bytes()
    assert Manifest.load(tmp_path, check_files=False) == manifest


def test_folders_from_before_the_vae_was_described(
    tiny_artifacts: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """They say three numbers themselves, and the rest in diffusers' file."""
    value = json.loads((tiny_artifacts / MANIFEST).read_text())
    few = {"latent_channels": 32, "num_levels": 4, "batch_norm_eps": 1e-4}
    value["config"]["vae"] = few
    (tmp_path / MANIFEST).write_text(json.dumps(value))
    with pytest.raises(ArtifactError, match=r"vae config is missing.*export the checkpoint again"):
        Manifest.load(tmp_path, check_files=False)
    (tmp_path / "vae").mkdir()
    shutil.copy(tiny_checkpoint / "vae/config.json", tmp_path / "vae")
    assert Manifest.load(tmp_path, check_files=False) == Manifest.load(tiny_artifacts)


def test_model_digest_follows_graphs_and_weights_alone(folder: Path, edit: Edit) -> None:
    base = Manifest.load(folder).model_digest
    edit(lambda value: value.update(model_id="another name", licence="another"))
    edit(lambda value: value["files"]["tokenizer/tokenizer_config.json"].update(digest="x"))
    assert Manifest.load(folder, check_files=False).model_digest == base
    edit(lambda value: value["files"][WEIGHTS].update(digest="x"))
    assert Manifest.load(folder, check_files=False).model_digest != base


# --- klein.json ---


def test_not_an_artifact_folder(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no klein\.json$"):
        Manifest.load(tmp_path / "none")
    with pytest.raises(ArtifactError, match="this is a checkpoint: export it first with"):
        Manifest.load(tiny_checkpoint)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"[]", "the format is None, expected 'klein-kv artifacts'"),
        (b'{"format": "klein-kv artifacts"}', "has format version None"),
    ],
)
def test_unreadable(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        Manifest.load(tmp_path)


def put(*path: str, **values: Any) -> Callable[[Any], Any]:
    """A change of the manifest at a place; `DROP` takes a key away."""

    def change(value: Any) -> None:
        for key in path:
            value = value[key]
        value.update(values)
        for key in [key for key in values if values[key] is DROP]:
            del value[key]

    return change


DROP = object()
INCOMPLETE = "is incomplete .*export the checkpoint again"
NOT_OURS = "expected 'kv' or 'plain' and one of float32"
CHANGES = [
    *((put(**{key: DROP}), INCOMPLETE) for key in ("model_id", "scheduler", "prompt", "files")),
    (put(config=[]), INCOMPLETE),
    (put("config", vae=DROP), INCOMPLETE),
    (put("config", "vae", norm_num_groups=DROP), INCOMPLETE),
    (put("config", "vae", more=1), INCOMPLETE),
    (put("config", "transformer", axes_dims_rope=32), INCOMPLETE),
    (put("config", "transformer", num_layers=10**9), INCOMPLETE),
    (put("config", "transformer", eps="tiny"), INCOMPLETE),
    (put("config", "transformer", joint_attention_dim=33), INCOMPLETE),
    (put("config", "text_encoder", layers=[99]), INCOMPLETE),
    (put("prompt", suffix=DROP), INCOMPLETE),
    (put("prompt", padding_side="top"), INCOMPLETE),
    (put("prompt", pad_id="0"), INCOMPLETE),
    (put("prompt", split_special_tokens=1), INCOMPLETE),
    (put("prompt", pad_token="\ud800"), INCOMPLETE),
    (put(model_id="\ud800"), INCOMPLETE),
    (put(files=[]), INCOMPLETE),
    (put("files", **{WEIGHTS: "sha256:0"}), INCOMPLETE),
    (put("files", WEIGHTS, digest=[]), INCOMPLETE),
    (put("files", WEIGHTS, bytes=1.5), INCOMPLETE),
    (put(scheduler=[1]), INCOMPLETE),
    (put(dtype=["float32"]), INCOMPLETE),
    (put(dtype="float64"), NOT_OURS),
    (put(variant="base"), NOT_OURS),
    *(
        (
            put(format_version=x),
            f"format version {x}, this klein-kv reads 1; upgrade klein-kv, or export",
        )
        for x in (FORMAT_VERSION + 1, "1")
    ),
    (put("files", **{GRAPH_FILES["vae_decoder"]: DROP}), r"lists no vae/decoder.onnx \(graph vae_"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_malformed_value(
    change: Callable[[Any], Any], message: str, tiny_artifacts: Path, tmp_path: Path
) -> None:
    value = json.loads((tiny_artifacts / MANIFEST).read_bytes())
    change(value)
    (tmp_path / MANIFEST).write_text(json.dumps(value))
    with pytest.raises(ArtifactError, match=message):
        Manifest.load(tmp_path, check_files=False)


# --- files ---


def circle(path: Path, _content: bytes) -> None:
    path.symlink_to(path)


SPOILS: dict[str, tuple[Callable[[Path, bytes], object], str]] = {
    "nothing": (lambda path, content: None, "cannot be read"),
    "a folder": (lambda path, content: path.mkdir(), "is not the file that|cannot be read"),
    "a circle of links": (circle, "cannot be read"),
    "first byte": (lambda p, old: write(p, bytes([old[0] ^ 1]) + old[1:]), "got sha256:"),
    "last byte": (lambda p, old: write(p, old[:-1] + bytes([old[-1] ^ 1])), "got sha256:"),
    "longer": (lambda p, old: write(p, old + b"x"), r"got \d+ bytes, expected \d+ bytes"),
    "shorter": (lambda p, old: write(p, old[:-1]), r"got \d+ bytes, expected \d+ bytes"),
}


@pytest.mark.parametrize("name", [WEIGHTS, TABLE])
@pytest.mark.parametrize("instead", SPOILS)
def test_missing_or_altered_file(name: str, instead: str, folder: Path) -> None:
    path, (spoil, message) = folder / name, SPOILS[instead]
    content = path.read_bytes()
    path.unlink()
    spoil(path, content)
    with pytest.raises(ArtifactError, match=rf"{name}.*({message})"):
        Manifest.load(folder)


ESCAPES = ("../outside", "/etc/hostname", "transformer/../../outside", "..", "", "a\\..\\b", ".")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((name, "expected a relative path inside it") for name in ESCAPES),
        ("nul\0byte", "cannot be read"),
        ("x" * 5000, "cannot be read"),
    ],
)
def test_path_that_leaves_the_folder(name: str, message: str, folder: Path, edit: Edit) -> None:
    (folder.parent / "outside").write_text("x")
    record = {"bytes": 1, "digest": file_digest(folder.parent / "outside")}
    edit(put("files", **{name: record}))
    with pytest.raises(ArtifactError, match=message):
        Manifest.load(folder)


@pytest.mark.parametrize("name", [WEIGHTS, TABLE, "vae"])
def test_link_out_of_the_folder(name: str, folder: Path) -> None:
    """Even to the right content: it may be another one when the file is used."""
    path, outside = folder / name, folder.parent / "outside"
    shutil.move(path, outside)
    path.symlink_to(outside)
    with pytest.raises(ArtifactError, match=f"is a link to {outside}.*, outside the folder"):
        Manifest.load(folder)


def test_links_inside_the_folder_and_to_it_are_fine(folder: Path) -> None:
    shutil.move(folder / WEIGHTS, folder / "weights")
    (folder / WEIGHTS).symlink_to(folder / "weights")
    link = folder.parent / "link"
    link.symlink_to(folder)
    Manifest.load(link)


def test_pipeline_checks_first(folder: Path) -> None:
    write(folder / "transformer/first_step.onnx", b"")
    with pytest.raises(ArtifactError, match="got 0 bytes"):
        KleinKVPipeline.from_pretrained(folder)


@pytest.mark.parametrize("graph", GRAPH_FILES)
def test_weight_tables_point_at_the_weights(graph: str, tiny_artifacts: Path) -> None:
    table = graph_weights(tiny_artifacts, GRAPH_FILES[graph])
    held = {}
    for path in (tiny_artifacts / GRAPH_FILES[graph]).parent.glob("*.safetensors"):
        held |= read_header(path)
    assert table
    for name, ref in table.items():
        base, _, part = name.partition("[")
        if not part:
            assert ref == held[base]
        else:
            start, stop = map(int, part.rstrip("]").split(":"))
            assert ref == held[base].rows(start, stop)
            assert map_weight(ref).shape[0] == stop - start


# --- precisions ---


@pytest.fixture
def quantized(folder: Path) -> Path:
    """The copy with an fp8 transformer, whose files are not looked into here."""
    manifest, files = Manifest.load(folder), {}
    for name in ("transformer/fp8.safetensors", "transformer/fp8.json", "transformer/fp8.x.onnx"):
        (folder / name).write_text(name)
        files[name] = FileRecord(len(name), file_digest(folder / name))
    precisions = {"fp8": {"transformer": "fp8"}}
    replace(manifest, files=manifest.files | files, precisions=precisions).save(folder)
    return folder


def test_precisions_are_read_back_and_change_no_digest(quantized, tiny_artifacts, edit):
    manifest = Manifest.load(quantized)
    assert manifest.precisions == {"fp8": {"transformer": "fp8"}}
    assert manifest.model_digest == Manifest.load(tiny_artifacts).model_digest
    before = manifest.precision_digest("fp8")
    assert before != manifest.model_digest
    assert manifest.precision_files("fp8") == [
        "transformer/fp8.json",
        "transformer/fp8.safetensors",
        "transformer/fp8.x.onnx",
    ]
    edit(put("files", "transformer/fp8.json", digest="that of other scales"))
    assert Manifest.load(quantized, check_files=False).precision_digest("fp8") != before


@pytest.mark.parametrize(
    ("precisions", "message"),
    [
        ({"fp8": {"transformer": "nvfp4"}}, r"lists no transformer/nvfp4\.safetensors"),
        ({"fp8": {"transformer": "../fp8"}}, "other names than expected"),
        ({"int8": {"transformer": "fp8"}}, "other names than expected"),
        ({"fp8": {"transformer": "fp8", "../vae": "fp8"}}, "other names than expected"),
        ({"fp8": {}}, "has no transformer"),
        ([1], "is incomplete"),
        ({"fp8": "fp8"}, "is incomplete"),
    ],
)
def test_precisions_that_are_not_ours_are_refused(quantized, edit, precisions, message):
    edit(put(precisions=precisions))
    with pytest.raises(ArtifactError, match=message):
        Manifest.load(quantized)


def test_a_manifest_is_replaced_whole_or_not_at_all(folder, monkeypatch):
    before = (folder / MANIFEST).read_text()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        Manifest.load(folder).save(folder)
    assert (folder / MANIFEST).read_text() == before
    assert not list(folder.glob(".*"))
