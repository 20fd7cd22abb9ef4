"""The manifest: what it refuses before anything of an artifact folder is opened."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from klein_kv import KleinKVPipeline
from klein_kv.artifacts.digest import file_digest, inside
from klein_kv.artifacts.manifest import FORMAT_VERSION, MANIFEST, FileRecord, Manifest
from klein_kv.artifacts.signature import GRAPH_FILES
from klein_kv.artifacts.weights import (
    graph_weights,
    map_weight,
    read_header,
    save_graph_weights,
    weights_file,
)
from klein_kv.errors import ArtifactError

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
TABLE = "transformer/cached_step.weights.json"


@pytest.fixture
def folder(tiny_artifacts: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_artifacts, tmp_path / "artifacts"))


@pytest.fixture
def edit(folder: Path) -> Callable[..., None]:
    """Rewrites klein.json with a change: `edit(lambda value: ...)`."""

    def apply(change: Callable[[dict[str, Any]], Any]) -> None:
        path = folder / MANIFEST
        value = json.loads(path.read_text(encoding="utf-8"))
        change(value)
        path.write_text(json.dumps(value), encoding="utf-8")

    return apply


def seal(folder: Path) -> None:
    """Makes the manifest describe the files as they are now: what an attacker would do."""
    path = folder / MANIFEST
    value = json.loads(path.read_text(encoding="utf-8"))
    for name, record in value["files"].items():
        record["bytes"] = (folder / name).stat().st_size
        record["digest"] = file_digest(folder / name)
    path.write_text(json.dumps(value), encoding="utf-8")


# --- whole ---


def test_content(tiny_artifacts: Path) -> None:
    manifest = Manifest.load(tiny_artifacts)
    assert manifest.model_id == "tiny"
    assert manifest.variant == "kv"
    assert manifest.dtype == "float32"
    assert manifest.config.transformer.num_blocks == 3
    assert manifest.scheduler["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    assert manifest.prompt.prefix == "<|im_start|>user\n"
    assert "LICENSE.md" in manifest.licence
    on_disk = {
        path.relative_to(tiny_artifacts).as_posix()
        for path in tiny_artifacts.rglob("*")
        if path.is_file()
    }
    assert set(manifest.files) == on_disk - {MANIFEST}
    assert {*GRAPH_FILES.values(), *map(weights_file, GRAPH_FILES.values())} < set(manifest.files)


def test_saved_and_loaded(tiny_artifacts: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(tiny_artifacts)
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


def test_model_digest_follows_graphs_and_weights_alone(
    folder: Path, edit: Callable[..., None]
) -> None:
    base = Manifest.load(folder).model_digest
    edit(lambda value: value.update(model_id="another name", licence="another"))
    edit(lambda value: value["files"]["tokenizer/tokenizer_config.json"].update(digest="x"))
    assert Manifest.load(folder, check_files=False).model_digest == base
    edit(lambda value: value["files"][WEIGHTS].update(digest="x"))
    assert Manifest.load(folder, check_files=False).model_digest != base


# --- klein.json ---


def test_not_an_artifact_folder(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no klein\.json$"):
        Manifest.load(tmp_path)
    with pytest.raises(ArtifactError, match=r"has no klein\.json"):
        Manifest.load(tmp_path / "none")
    with pytest.raises(ArtifactError, match="this is a checkpoint: export it first with"):
        Manifest.load(tiny_checkpoint)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"[]", "not a klein-kv manifest"),
        (b"{}", "not a klein-kv manifest"),
        (b'{"format": "klein-kv artifacts"}', "has format version None"),
    ],
)
def test_unreadable(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 99, 0, "1", None])
def test_another_version(version: Any, folder: Path, edit: Callable[..., None]) -> None:
    edit(lambda value: value.update(format_version=version))
    with pytest.raises(
        ArtifactError, match=rf"format version {version}, this klein-kv reads 1; upgrade klein-kv"
    ):
        Manifest.load(folder)


@pytest.mark.parametrize(
    "change",
    [
        *(
            (lambda value, key=key: value.pop(key))
            for key in ("model_id", "variant", "dtype", "scheduler", "prompt", "files", "licence")
        ),
        lambda value: value.update(config=None),
        lambda value: value.update(config=[]),
        lambda value: value["config"].pop("vae"),
        lambda value: value["config"]["vae"].pop("norm_num_groups"),
        lambda value: value["config"]["vae"].update(more=1),
        lambda value: value["config"]["transformer"].update(axes_dims_rope=32),
        lambda value: value["config"]["transformer"].update(num_layers=0),
        lambda value: value["config"]["transformer"].update(joint_attention_dim=33),
        lambda value: value["config"]["text_encoder"].update(layers=[99]),
        lambda value: value.update(prompt=None),
        lambda value: value["prompt"].pop("suffix"),
        lambda value: value["prompt"].update(more=1),
        lambda value: value["prompt"].update(padding_side="top"),
        lambda value: value["prompt"].update(pad_id="0"),
        lambda value: value["prompt"].update(pad_token="\ud800"),
        lambda value: value.update(model_id="\ud800"),
        lambda value: value.update(files=[]),
        lambda value: value.update(files=None),
        lambda value: value["files"].update({WEIGHTS: "sha256:0"}),
        lambda value: value["files"][WEIGHTS].pop("digest"),
        lambda value: value["files"][WEIGHTS].update(digest=[]),
        lambda value: value["files"][WEIGHTS].update(bytes=1.5),
        lambda value: value["config"]["transformer"].update(num_layers=10**9),
        lambda value: value["config"]["transformer"].update(mlp_ratio=1e308),
        lambda value: value.update(scheduler=[1]),
        lambda value: value.update(model_id=None),
        lambda value: value.update(precisions={"fp8": {"transformer": ["fp8"]}}),
    ],
)
def test_malformed_value(
    change: Callable[[Any], Any], folder: Path, edit: Callable[..., None]
) -> None:
    edit(change)
    with pytest.raises(ArtifactError, match=r"is incomplete .*export the checkpoint again"):
        Manifest.load(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float64"},
        {"dtype": "int64"},
        {"dtype": ["float32"]},
        {"dtype": None},
        {"variant": "base"},
        {"variant": None},
        {"variant": {}},
    ],
)
def test_unknown_dtype_or_variant(
    change: dict[str, Any], folder: Path, edit: Callable[..., None]
) -> None:
    edit(lambda value: value.update(change))
    with pytest.raises(ArtifactError, match="expected 'kv' or 'plain' and one of float32"):
        Manifest.load(folder)


# --- files ---


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        *((name, "nothing") for name in (WEIGHTS, *GRAPH_FILES.values(), "LICENSE.md")),
        (TABLE, "a folder"),
        (TABLE, "a circle of links"),
    ],
)
def test_missing_file(name: str, instead: str, folder: Path) -> None:
    path = folder / name
    path.unlink()
    if instead == "a folder":
        path.mkdir()
    elif instead == "a circle of links":
        path.symlink_to(path)
    with pytest.raises(ArtifactError, match=rf"{name}.*(cannot be read|is not the file that)"):
        Manifest.load(folder)


@pytest.mark.parametrize("name", [WEIGHTS, TABLE, GRAPH_FILES["vae_decoder"]])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: bytes([content[0] ^ 1]) + content[1:], "got sha256:"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "got sha256:"),
        (lambda content: content + b"x", r"got \d+ bytes, expected \d+ bytes"),
        (lambda content: content[:-1], r"got \d+ bytes, expected \d+ bytes"),
    ],
    ids=["first byte", "last byte", "longer", "shorter"],
)
def test_altered_file(name: str, change: Any, message: str, folder: Path) -> None:
    path = folder / name
    content = path.read_bytes()
    path.unlink()  # it may be a hard link
    path.write_bytes(change(content))
    described = rf"{path} is not the file that klein\.json describes: {message}"
    with pytest.raises(ArtifactError, match=described):
        Manifest.load(folder)


@pytest.mark.parametrize("graph", GRAPH_FILES)
def test_graph_that_is_not_listed(graph: str, folder: Path, edit: Callable[..., None]) -> None:
    edit(lambda value: value["files"].pop(GRAPH_FILES[graph]))
    with pytest.raises(ArtifactError, match=rf"lists no {GRAPH_FILES[graph]} \(graph {graph}\)"):
        Manifest.load(folder, check_files=False)


ESCAPES = ["../outside", "/etc/hostname", "transformer/../../outside", "..", "", "a\\..\\b", "."]


@pytest.mark.parametrize("name", ESCAPES)
def test_path_that_leaves_the_folder(name: str, folder: Path, edit: Callable[..., None]) -> None:
    (folder.parent / "outside").write_text("x")
    record = {"bytes": 1, "digest": file_digest(folder.parent / "outside")}
    edit(lambda value: value["files"].update({name: record}))
    with pytest.raises(ArtifactError, match="expected a relative path inside it"):
        Manifest.load(folder)


@pytest.mark.parametrize("name", ["nul\0byte", "x" * 5000])
def test_name_that_no_file_has(name: str, folder: Path, edit: Callable[..., None]) -> None:
    edit(lambda value: value["files"].update({name: {"bytes": 1, "digest": ""}}))
    with pytest.raises(ArtifactError, match="cannot be read"):
        Manifest.load(folder)


@pytest.mark.parametrize("name", [WEIGHTS, TABLE, GRAPH_FILES["cached_step"]])
def test_link_out_of_the_folder(name: str, folder: Path) -> None:
    """Even to the right content: it may be another one when the file is used."""
    path, outside = folder / name, folder.parent / "outside"
    shutil.move(path, outside)
    path.symlink_to(outside)
    with pytest.raises(ArtifactError, match=f"{path} is a link to {outside}, outside the folder"):
        Manifest.load(folder)


def test_folder_linked_elsewhere(folder: Path) -> None:
    shutil.move(folder / "vae", folder.parent / "vae")
    (folder / "vae").symlink_to(folder.parent / "vae")
    with pytest.raises(ArtifactError, match="outside the folder"):
        Manifest.load(folder)


def test_links_inside_the_folder_and_to_it_are_fine(folder: Path) -> None:
    shutil.move(folder / WEIGHTS, folder / "weights")
    (folder / WEIGHTS).symlink_to(folder / "weights")
    link = folder.parent / "link"
    link.symlink_to(folder)
    Manifest.load(link)


def test_pipeline_checks_first(folder: Path) -> None:
    (folder / "transformer/first_step.onnx").write_bytes(b"")
    with pytest.raises(ArtifactError, match="got 0 bytes"):
        KleinKVPipeline.from_pretrained(folder)


def test_inside(tmp_path: Path) -> None:
    assert inside(tmp_path, "a/b.onnx") == tmp_path / "a/b.onnx"
    for name in ESCAPES:
        with pytest.raises(ArtifactError):
            inside(tmp_path, name)


# --- weight tables ---


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


def test_table_is_written_and_read(tiny_artifacts: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_artifacts / "vae", tmp_path / "vae")
    table = graph_weights(tmp_path, GRAPH_FILES["vae_decoder"])
    save_graph_weights(tmp_path / weights_file(GRAPH_FILES["vae_decoder"]), table)
    assert graph_weights(tmp_path, GRAPH_FILES["vae_decoder"]) == table


NAME = "x_embedder.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: "../outside"}, "leaves the folder"),
        ({0: "/etc/hostname"}, "leaves the folder"),
        ({0: "link"}, "outside the folder"),
        ({0: "none.safetensors"}, "cannot be read"),
        ({0: ""}, "leaves the folder"),
        ({0: "nul\0"}, "cannot be read"),
        ({0: None}, "cannot be read"),
        ({1: -1}, "is said to take bytes"),
        ({1: 1 << 60}, "is said to take bytes"),
        ({1: "0"}, "cannot be read"),
        ({1: 1.5}, "cannot be read"),
        ({2: 4}, "is said to take bytes"),
        ({2: -4}, "is said to take bytes"),
        ({2: 1 << 60, 4: [1 << 58]}, "is said to take bytes"),
        ({3: "float64"}, "cannot be read"),
        ({3: ["float32"]}, "cannot be read"),
        ({4: [64, 127]}, "is said to take bytes"),
        ({4: [-64, -128]}, "is said to take bytes"),
        ({4: "64"}, "cannot be read"),
        ({4: [64.0, 128]}, "cannot be read"),
        ({4: 8192}, "cannot be read"),
    ],
)
def test_bad_weight_table(change: dict[int, Any], message: str, folder: Path) -> None:
    """Refused though the manifest describes it: a digest does not make a file fit for use."""
    (folder.parent / "outside").write_bytes(bytes(1 << 20))
    (folder / "transformer/link").symlink_to(folder.parent / "outside")
    path = folder / TABLE
    table = json.loads(path.read_text())
    for column, value in change.items():
        table[NAME][column] = value
    path.write_text(json.dumps(table))
    seal(folder)
    Manifest.load(folder)
    with pytest.raises(ArtifactError, match=message):
        graph_weights(folder, GRAPH_FILES["cached_step"])


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1}', '{"a": [1]}', "[" * 100_000])
def test_unreadable_weight_table(content: str, folder: Path) -> None:
    (folder / TABLE).write_text(content)
    with pytest.raises(ArtifactError, match=f"{TABLE} cannot be read"):
        graph_weights(folder, GRAPH_FILES["cached_step"])


# --- precisions ---


@pytest.fixture
def quantized(folder: Path) -> Path:
    """The copy with an fp8 transformer, whose files are not looked into here."""
    for name in ("transformer/fp8.safetensors", "transformer/fp8.json", "transformer/fp8.x.onnx"):
        (folder / name).write_text(name)
    manifest = Manifest.load(folder)
    files = {
        path.relative_to(folder).as_posix(): FileRecord(path.stat().st_size, file_digest(path))
        for path in (folder / "transformer").glob("fp8.*")
    }
    replace(
        manifest,
        files=manifest.files | files,
        precisions={"fp8": {"transformer": "fp8"}},
    ).save(folder)
    return folder


def test_precisions_are_read_back_and_change_no_digest(quantized, tiny_artifacts):
    manifest = Manifest.load(quantized)
    assert manifest.precisions == {"fp8": {"transformer": "fp8"}}
    assert manifest.model_digest == Manifest.load(tiny_artifacts).model_digest
    assert manifest.precision_digest("fp8") != manifest.model_digest
    assert manifest.precision_files("fp8") == [
        "transformer/fp8.json",
        "transformer/fp8.safetensors",
        "transformer/fp8.x.onnx",
    ]
    before = manifest.precision_digest("fp8")
    (quantized / "transformer/fp8.json").write_text("other scales")
    with pytest.raises(ArtifactError, match=r"fp8\.json is not the file"):
        Manifest.load(quantized)
    seal(quantized)
    assert Manifest.load(quantized).precision_digest("fp8") != before


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
def test_precisions_that_are_not_ours_are_refused(quantized, precisions, message):
    path = quantized / MANIFEST
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | {"precisions": precisions}))
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
