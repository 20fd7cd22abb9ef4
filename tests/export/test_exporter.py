"""Checkpoint in, artifact folder out: what is written, what is refused, and what stays behind.

Tracing the VAE takes ten seconds and is not what most tests here are about: they put a stand-in
in its place.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from klein_kv import KleinKVPipeline
from klein_kv.artifacts.manifest import MANIFEST, Manifest
from klein_kv.artifacts.signature import FLOAT8_KV_FILES, GRAPH_FILES
from klein_kv.errors import ArtifactError, CapacityError, CheckpointError, RequestError
from klein_kv.export import exporter
from klein_kv.export.checkpoints.fixture import make_fixture
from klein_kv.export.exporter import ExportResult, export_checkpoint
from tests.checkpoints import MODELS, save_checkpoint
from tests.conftest import KleinExport

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
COMPONENTS = [TRANSFORMER, TEXT, VAE]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No VAE: two empty graphs in place of the traced ones."""

    def empty(graph: str, *_: Any) -> ir.Model:
        return ir.Model(
            ir.Graph([], [], nodes=[], opset_imports={"": 23}, name=graph), ir_version=11
        )

    monkeypatch.setattr(exporter, "vae_graph", empty)


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(value), encoding="utf-8")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def assert_refused(checkpoint: Path, error: type[Exception], message: str, **options: Any) -> None:
    """The export fails with one clear error, and leaves nothing behind."""
    target = checkpoint.parent / "artifacts"
    before = sorted(path.name for path in checkpoint.parent.iterdir())
    with pytest.raises(error, match=message):
        export_checkpoint(checkpoint, target, **options)
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == before


# --- what is written ---


def test_folder(tiny_artifacts: Path) -> None:
    graphs = {*GRAPH_FILES.values(), *FLOAT8_KV_FILES.values()}
    expected = {MANIFEST, "LICENSE.md", "vae/config.json", *COMPONENTS, *graphs}
    expected |= {name.replace(".onnx", ".weights.json") for name in graphs}
    tokenizer = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    expected |= {f"tokenizer/{name}" for name in tokenizer}
    assert files_below(tiny_artifacts) == expected


@pytest.mark.usefixtures("quick")
def test_result(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "artifacts"
    result = export_checkpoint(checkpoint, target)
    assert isinstance(result, ExportResult)
    assert result.artifacts == target
    assert result.dtype == "float32"
    packed = {f"{graph}_fp8_kv" for graph in ("first_step", "cached_step", "encode_references")}
    assert set(result.nodes) == {*GRAPH_FILES, *packed}
    assert result.nodes["first_step"] > result.nodes["cached_step"] > 100
    assert 0 < result.seconds < 60
    assert sorted(path.name for path in target.parent.iterdir()) == ["artifacts"]


@pytest.mark.parametrize("component", COMPONENTS)
def test_weights_of_the_same_type_are_links(
    component: str, tiny_checkpoint: Path, tiny_artifacts: Path
) -> None:
    assert (tiny_artifacts / component).samefile(tiny_checkpoint / component)
    assert not (tiny_artifacts / component).is_symlink()


@pytest.mark.usefixtures("quick")
def test_little_is_written_when_the_type_stays(checkpoint: Path, tmp_path: Path) -> None:
    result = export_checkpoint(checkpoint, tmp_path / "artifacts")
    weights = sum((checkpoint / name).stat().st_size for name in COMPONENTS)
    total = sum(path.stat().st_size for path in result.artifacts.rglob("*") if path.is_file())
    assert result.bytes_written == total - weights
    assert result.bytes_written < 2e6


@pytest.mark.slow
def test_export_of_the_9b_shapes(klein_export: KleinExport) -> None:
    """35 GB of weights, 18.2 of them the transformer's: linked, never read, never copied."""
    assert klein_export.dtype == "bfloat16"
    assert klein_export.bytes_written < 50e6
    allocated = sum(512 * path.stat().st_blocks for path in klein_export.artifacts.rglob("*"))
    assert allocated < 50e6
    assert klein_export.nodes["cached_step"] <= 80 * 32
    assert Manifest.load(klein_export.artifacts).config.transformer.num_blocks == 32


@pytest.mark.usefixtures("quick")
def test_shards_are_linked(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    save_checkpoint(checkpoint, MODELS["sharded"], seed=0)
    result = export_checkpoint(checkpoint, tmp_path / "artifacts")
    shards = sorted((checkpoint / "transformer").glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        assert (result.artifacts / "transformer" / shard.name).samefile(shard)


@pytest.mark.usefixtures("quick")
def test_links_of_a_download_cache_are_followed(checkpoint: Path, tmp_path: Path) -> None:
    """A hub's cache holds links to files elsewhere; artifacts hold the files themselves."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for name in COMPONENTS:
        blob = blobs / name.replace("/", "-")
        shutil.move(checkpoint / name, blob)
        (checkpoint / name).symlink_to(blob)
    result = export_checkpoint(checkpoint, tmp_path / "artifacts")
    for name in COMPONENTS:
        path = result.artifacts / name
        assert not path.is_symlink()
        assert path.samefile(blobs / name.replace("/", "-"))
    assert result.bytes_written < 2e6
    Manifest.load(result.artifacts)


@pytest.mark.usefixtures("quick")
def test_copies_where_links_are_not_possible(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def no_links(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    result = export_checkpoint(checkpoint, tmp_path / "artifacts")
    assert "copying model.safetensors" in caplog.text
    for name in COMPONENTS:
        assert not (result.artifacts / name).samefile(checkpoint / name)
        assert (result.artifacts / name).read_bytes() == (checkpoint / name).read_bytes()
    assert result.bytes_written > sum((checkpoint / name).stat().st_size for name in COMPONENTS)


@pytest.mark.usefixtures("quick")
def test_same_checkpoint_gives_the_same_files(checkpoint: Path, tmp_path: Path) -> None:
    one = export_checkpoint(checkpoint, tmp_path / "one", dtype="bfloat16").artifacts
    two = export_checkpoint(checkpoint, tmp_path / "two", dtype="bfloat16").artifacts
    assert files_below(one) == files_below(two)
    for name in files_below(one):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


@pytest.mark.usefixtures("quick")
def test_checkpoint_is_left_as_it_was(checkpoint: Path, tmp_path: Path) -> None:
    before = {name: (checkpoint / name).read_bytes() for name in files_below(checkpoint)}
    export_checkpoint(checkpoint, tmp_path / "artifacts", dtype="float16")
    assert {name: (checkpoint / name).read_bytes() for name in files_below(checkpoint)} == before


@pytest.mark.usefixtures("quick")
def test_empty_target_is_filled(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "artifacts").mkdir()
    export_checkpoint(checkpoint, tmp_path / "artifacts")
    assert (tmp_path / "artifacts" / MANIFEST).is_file()


@pytest.mark.usefixtures("quick")
def test_licences_come_along(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "NOTICE").write_text("notice")
    (checkpoint / "license-of-others.txt").write_text("licence")
    artifacts = export_checkpoint(checkpoint, tmp_path / "with").artifacts
    assert (artifacts / "NOTICE").read_text() == "notice"
    named = "LICENSE.md, NOTICE, license-of-others.txt"
    assert Manifest.load(artifacts).licence.endswith(f"see {named}.")
    for path in checkpoint.glob("[LlN]*"):
        path.unlink()
    artifacts = export_checkpoint(checkpoint, tmp_path / "without").artifacts
    assert "No licence file came with the checkpoint" in Manifest.load(artifacts).licence


@pytest.mark.usefixtures("quick")
def test_tokenizer_is_saved_in_its_fast_form(checkpoint: Path, tmp_path: Path) -> None:
    """Also where the checkpoint brings the older vocabulary and merges."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint / "tokenizer")
    expected = tokenizer("a red kite <|im_end|>")["input_ids"]
    model = json.loads((checkpoint / "tokenizer/tokenizer.json").read_text())["model"]
    (checkpoint / "tokenizer/vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) for pair in model["merges"]]
    (checkpoint / "tokenizer/merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    added = {
        str(entry["id"]): {k: v for k, v in entry.items() if k != "id"}
        for entry in json.loads((checkpoint / "tokenizer/tokenizer.json").read_text())[
            "added_tokens"
        ]
    }
    edit_json(checkpoint / "tokenizer/tokenizer_config.json", added_tokens_decoder=added)
    (checkpoint / "tokenizer/tokenizer.json").unlink()
    artifacts = export_checkpoint(checkpoint, tmp_path / "artifacts").artifacts
    saved = AutoTokenizer.from_pretrained(artifacts / "tokenizer")
    assert saved("a red kite <|im_end|>")["input_ids"] == expected


@pytest.mark.usefixtures("quick")
def test_scheduler_is_kept_as_found(checkpoint: Path, tmp_path: Path) -> None:
    edit_json(checkpoint / "scheduler/scheduler_config.json", shift_terminal=0.0)
    artifacts = export_checkpoint(checkpoint, tmp_path / "artifacts").artifacts
    found = json.loads((checkpoint / "scheduler/scheduler_config.json").read_text())
    assert Manifest.load(artifacts).scheduler == found


# --- conversion ---


SPECIAL = torch.tensor(
    [
        *(0.0, -0.0, 1.0, -2.5, 3.0e38, -1e-38, 1e-42, -7.5e-46),
        # Half-way between two bfloat16 values, with an even and an odd lower neighbour, and nearby.
        *(1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 1 + 2**-8 - 2**-20),
    ]
)
HALF_SPECIAL = torch.tensor(
    [
        *(0.0, -0.0, 1.0, 65504.0, -65519.0, 6e-8, 2.9e-8, 3e-8, 1e-10),
        *(1 + 2**-11, 1 + 3 * 2**-11, 2**-24 * 1.5),
    ]
)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("dtype", "special"), [("bfloat16", SPECIAL), ("float16", HALF_SPECIAL)])
def test_narrowing_rounds_to_nearest_even(
    dtype: str, special: torch.Tensor, checkpoint: Path, tmp_path: Path
) -> None:
    def plant(tensors: dict[str, torch.Tensor]) -> None:
        tensors["x_embedder.weight"].view(-1)[: len(special)] = special

    rewrite(checkpoint / TRANSFORMER, plant)
    artifacts = export_checkpoint(checkpoint, tmp_path / "artifacts", dtype=dtype).artifacts
    for component in ("transformer", "text_encoder", "vae"):
        before, after = tensors_of(checkpoint / component), tensors_of(artifacts / component)
        assert after.keys() <= before.keys()
        for name, tensor in after.items():
            assert torch.equal(bits(tensor), bits(before[name].to(getattr(torch, dtype)))), name


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_widening_is_exact(dtype: str, tmp_path: Path) -> None:
    make_fixture(tmp_path / "checkpoint", "tiny", dtype=dtype)
    artifacts = export_checkpoint(
        tmp_path / "checkpoint", tmp_path / "artifacts", dtype="float32"
    ).artifacts
    for component in ("transformer", "text_encoder", "vae"):
        before = tensors_of(tmp_path / "checkpoint" / component)
        for name, tensor in tensors_of(artifacts / component).items():
            assert torch.equal(bits(tensor), bits(before[name].float())), name


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_type_is_the_transformers_own_by_default(dtype: str, tmp_path: Path) -> None:
    make_fixture(tmp_path / "checkpoint", "tiny", dtype=dtype)
    result = export_checkpoint(tmp_path / "checkpoint", tmp_path / "artifacts")
    assert result.dtype == Manifest.load(result.artifacts).dtype == dtype
    assert (result.artifacts / TRANSFORMER).samefile(tmp_path / "checkpoint" / TRANSFORMER)


@pytest.mark.usefixtures("quick")
def test_only_what_has_another_type_is_converted(checkpoint: Path, tmp_path: Path) -> None:
    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {k: v.bfloat16() for k, v in tensors.items() if v.is_floating_point()}

    rewrite(checkpoint / TEXT, narrow)
    artifacts = export_checkpoint(checkpoint, tmp_path / "artifacts").artifacts
    assert (artifacts / TRANSFORMER).samefile(checkpoint / TRANSFORMER)
    assert files_below(artifacts / "text_encoder") >= {"text_encoder.float32.safetensors"}
    converted = tensors_of(artifacts / "text_encoder")
    assert {tensor.dtype for tensor in converted.values()} == {torch.float32}
    # The blocks that are never read are not written.
    assert not any(name.startswith(("model.layers.27.", "lm_head")) for name in converted)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("value", "dtype"),
    [(70000.0, "float16"), (-65520.0, "float16"), (3.4e38, "bfloat16"), (float("nan"), "bfloat16")],
)
def test_values_that_a_type_cannot_hold(value: float, dtype: str, checkpoint: Path) -> None:
    def plant(tensors: dict[str, torch.Tensor]) -> None:
        tensors["decoder.conv_in.weight"].view(-1)[5] = value

    rewrite(checkpoint / VAE, plant)
    message = f"decoder.conv_in.weight: values that {dtype} cannot hold .*another --dtype"
    assert_refused(checkpoint, CheckpointError, message, dtype=dtype)


@pytest.mark.usefixtures("quick")
def test_float16_comes_with_a_warning(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "klein_kv"):
        export_checkpoint(checkpoint, tmp_path / "half", dtype="float16")
        assert "float16 overflows on real klein weights" in caplog.text
        caplog.clear()
        export_checkpoint(checkpoint, tmp_path / "brain", dtype="bfloat16")
    assert not caplog.records


def test_converted_artifacts_run(
    tiny_checkpoint: Path, tiny_artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 weights widened to float32: the same graphs on other files."""
    make_fixture(tmp_path / "brain", "tiny", dtype="bfloat16")
    monkeypatch.setattr(
        exporter, "vae_graph", lambda graph, *_: ir.load(tiny_artifacts / GRAPH_FILES[graph])
    )
    artifacts = export_checkpoint(tmp_path / "brain", tmp_path / "out", dtype="float32").artifacts
    # The graph that stands in for the VAE's names the other export's file.
    name = "vae/diffusion_pytorch_model.safetensors"
    shutil.copy(tiny_artifacts / name, artifacts / name)
    pipeline = KleinKVPipeline.from_pretrained(artifacts, threads=1)
    embeds = pipeline.encode_prompt("a red kite", 32)
    assert embeds.dtype == np.float32
    assert np.isfinite(embeds).all()


# --- interrupted ---


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
@pytest.mark.parametrize(
    "where", ["vae_graph", "copy_licences", "file_digest", "text_encoder_graph"]
)
def test_interrupted_export_leaves_nothing(
    where: str,
    error: type[BaseException],
    checkpoint: Path,
    tmp_path: Path,
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> None:
        assert list(tmp_path.glob(".artifacts.partial-*/transformer/*.safetensors"))
        raise error("stopped")

    monkeypatch.setattr(exporter, where, fail)
    with pytest.raises(error, match="stopped"):
        export_checkpoint(checkpoint, tmp_path / "artifacts", dtype="bfloat16")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_full_disk_is_a_capacity_error(
    checkpoint: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporter, "save_tokenizer", fail)
    assert_refused(checkpoint, CapacityError, "cannot write .*artifacts: No space left on device")


@pytest.mark.usefixtures("quick")
def test_disk_is_measured_before_writing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(checkpoint)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    message = "not enough disk .*0.00 GB are free; free some space"
    assert_refused(checkpoint, CapacityError, message, dtype="bfloat16")


@pytest.mark.usefixtures("quick")
def test_remains_of_a_killed_export_are_not_artifacts(checkpoint: Path, tmp_path: Path) -> None:
    whole = export_checkpoint(checkpoint, tmp_path / "whole").artifacts
    partial = tmp_path / f".artifacts.partial-{os.getpid()}"
    shutil.move(whole, partial)
    (partial / MANIFEST).unlink()  # written last
    with pytest.raises(ArtifactError, match="is not a klein-kv artifact folder"):
        KleinKVPipeline.from_pretrained(partial)
    artifacts = export_checkpoint(checkpoint, tmp_path / "artifacts").artifacts
    Manifest.load(artifacts)
    assert not partial.exists()


# --- the target ---


@pytest.mark.parametrize("kind", ["file", "folder", "artifacts"])
def test_existing_target_is_refused(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "artifacts"
    if kind == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / (MANIFEST if kind == "artifacts" else "note.txt")).write_text("mine")
    before = files_below(tmp_path)
    message = "already exists and is not an empty folder; remove it or choose another name"
    assert_refused(checkpoint, RequestError, message)
    assert files_below(tmp_path) == before


def test_target_that_cannot_be_made(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CapacityError, match="choose a folder that is writable"):
        export_checkpoint(checkpoint, tmp_path / "file" / "artifacts")


# --- the arguments ---


@pytest.mark.parametrize("variant", ["base", "", "KV", "9b"])
def test_other_variants(variant: str, checkpoint: Path) -> None:
    message = f"variant is '{variant}', expected"
    assert_refused(checkpoint, RequestError, message, variant=variant)


@pytest.mark.parametrize("dtype", ["fp32", "float64", "int8", ""])
def test_other_types(dtype: str, checkpoint: Path) -> None:
    message = f"dtype is '{dtype}', expected one of float32, float16, bfloat16"
    assert_refused(checkpoint, RequestError, message, dtype=dtype)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((9, 18, 29), "has 28 layers; .*--text-layers"),
        ((9, 18), r"make 64, the transformer's joint_attention_dim is 96; .*--text-layers"),
        ((), "--text-layers"),
    ],
)
def test_other_hidden_states(layers: tuple[int, ...], message: str, checkpoint: Path) -> None:
    assert_refused(checkpoint, CheckpointError, message, text_layers=layers)


# --- the checkpoint ---


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model_index.json", "checkpoint is missing: .*diffusers layout"),
        ("transformer/config.json", "transformer config is missing"),
        ("text_encoder/config.json", "text_encoder config is missing"),
        ("vae/config.json", "vae config is missing"),
        ("scheduler/scheduler_config.json", "scheduler config is missing"),
        (TRANSFORMER, "transformer: expected one .safetensors file .* found none"),
        (TEXT, "text_encoder: expected one .safetensors file"),
        (VAE, "vae: expected one .safetensors file"),
        ("tokenizer/tokenizer.json", "has no tokenizer.json"),
        ("tokenizer/chat_template.jinja", "has no chat template"),
    ],
)
@pytest.mark.usefixtures("quick")
def test_missing_file(name: str, message: str, checkpoint: Path) -> None:
    (checkpoint / name).unlink()
    assert_refused(checkpoint, CheckpointError, message)


def test_missing_checkpoint(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path / "file"):
        if path.name == "file":
            path.write_text("x")
        with pytest.raises(CheckpointError, match=r"diffusers layout|only safetensors"):
            export_checkpoint(path, tmp_path / "artifacts")


@pytest.mark.parametrize(
    ("component", "change", "message"),
    [
        ("transformer", {"_class_name": "FluxTransformer2DModel"}, "_class_name"),
        ("transformer", {"guidance_embeds": True}, "guidance_embeds"),
        ("transformer", {"num_layers": 2}, r"\d+ missing \(transformer_blocks\.1\."),
        ("transformer", {"num_single_layers": 1}, r"\d+ unexpected \(single_transformer_blocks\.1"),
        ("transformer", {"num_attention_heads": 3}, "has shape .* expected .* from config.json"),
        ("transformer", {"in_channels": 64}, "vae and transformer do not fit"),
        ("text_encoder", {"model_type": "qwen2"}, "model_type"),
        ("text_encoder", {"hidden_size": 48}, "do not fit"),
        ("text_encoder", {"intermediate_size": 81}, "gate_proj.* has shape"),
        ("vae", {"_class_name": "AutoencoderKL"}, "_class_name"),
        ("vae", {"latent_channels": 16}, "do not fit"),
        ("vae", {"layers_per_block": 2}, r"\d+ missing"),
        ("vae", {"block_out_channels": [16, 16, 24, 32]}, r"\d+ missing"),
        ("vae", {"block_out_channels": [16, 16, 24, 25]}, "diffusers cannot build the model"),
    ],
)
def test_config_that_is_not_the_weights(
    component: str, change: dict[str, Any], message: str, checkpoint: Path
) -> None:
    edit_json(checkpoint / component / "config.json", **change)
    assert_refused(checkpoint, CheckpointError, message)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        (TRANSFORMER, "transformer_blocks.0.attn.norm_q.weight"),
        (TEXT, "model.layers.26.mlp.up_proj.weight"),
        (VAE, "bn.running_var"),
    ],
)
class TestTensors:
    def test_missing(self, file: str, name: str, checkpoint: Path) -> None:
        rewrite(checkpoint / file, lambda tensors: tensors.pop(name))
        assert_refused(checkpoint, CheckpointError, rf"1 missing \({name}\), 0 unexpected")

    def test_extra(self, file: str, name: str, checkpoint: Path) -> None:
        extra = {"guidance.weight": torch.ones(2)}
        rewrite(checkpoint / file, lambda tensors: tensors.update(extra))
        assert_refused(checkpoint, CheckpointError, r"0 missing, 1 unexpected \(guidance\.weight\)")

    def test_misshapen(self, file: str, name: str, checkpoint: Path) -> None:
        wider = {name: torch.ones(7, 3)}
        rewrite(checkpoint / file, lambda tensors: tensors.update(wider))
        assert_refused(checkpoint, CheckpointError, rf"{name} has shape \(7, 3\), expected")

    def test_truncated(self, file: str, name: str, checkpoint: Path) -> None:
        path = checkpoint / file
        content = path.read_bytes()
        for length in (len(content) - 1, len(content) // 2, 100, 7, 0):
            path.write_bytes(content[:length])
            assert_refused(checkpoint, CheckpointError, "truncated|not a whole safetensors file")

    def test_garbage(self, file: str, name: str, checkpoint: Path) -> None:
        path = checkpoint / file
        for content in (b"<html>404 Not Found</html>", b"version https://git-lfs.github.com/spec"):
            path.write_bytes(content)
            assert_refused(checkpoint, CheckpointError, "only safetensors is read")

    def test_pickle_is_never_opened(self, file: str, name: str, checkpoint: Path) -> None:
        (checkpoint / file).unlink()
        trap = checkpoint / "opened"
        # A pickle that makes a file when it is loaded.
        content = b"cbuiltins\nopen\n(V" + str(trap).encode() + b"\nVw\ntR."
        for suffix in (".bin", ".pt", ".ckpt", ".pth"):
            (checkpoint / file).with_suffix(suffix).write_bytes(content)
        assert_refused(checkpoint, CheckpointError, r"found none \(pickle formats")
        (checkpoint / file).write_bytes(content)
        assert_refused(checkpoint, CheckpointError, "only safetensors is read")
        assert not trap.exists()

    def test_integers(self, file: str, name: str, checkpoint: Path) -> None:
        def count(tensors: dict[str, torch.Tensor]) -> None:
            tensors[name] = tensors[name].long()

        rewrite(checkpoint / file, count)
        assert_refused(checkpoint, CheckpointError, f"{name}.*int64")


@pytest.mark.usefixtures("quick")
def test_tensors_that_nobody_reads_may_be_missing(checkpoint: Path, tmp_path: Path) -> None:
    """The language-model head, the blocks after the last hidden state, BatchNorm's counter."""

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if name.startswith(("lm_head", "model.layers.27.", "model.norm")):
                del tensors[name]

    rewrite(checkpoint / TEXT, strip)
    rewrite(checkpoint / VAE, lambda tensors: tensors.pop("bn.num_batches_tracked", None))
    export_checkpoint(checkpoint, tmp_path / "artifacts")


def test_scheduler_that_the_loop_does_not_run(checkpoint: Path) -> None:
    """It was found out by the first request only."""
    path = checkpoint / "scheduler/scheduler_config.json"
    edit_json(path, _class_name="EulerDiscreteScheduler")
    assert_refused(checkpoint, CheckpointError, "scheduler config: _class_name is 'EulerDiscrete")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("file", ["tokenizer_config.json", "tokenizer.json"])
def test_damaged_tokenizer(file: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any weight is converted, which takes minutes."""
    monkeypatch.setattr("klein_kv.export.exporter.place_weights", None)
    (checkpoint / "tokenizer" / file).write_text("{")
    assert_refused(checkpoint, CheckpointError, "tokenizer: .* cannot be loaded")


@pytest.mark.usefixtures("quick")
def test_code_of_a_checkpoint_is_not_run(checkpoint: Path) -> None:
    """A tokenizer may name a class of its own, in a file beside it."""
    trap = checkpoint / "opened"
    (checkpoint / "tokenizer/mine.py").write_text(
        f"open({str(trap)!r}, 'w')\nclass Mine:\n    pass\n"
    )
    edit_json(
        checkpoint / "tokenizer/tokenizer_config.json",
        tokenizer_class="Mine",
        auto_map={"AutoTokenizer": ["mine.Mine", None]},
    )
    try:
        export_checkpoint(checkpoint, checkpoint.parent / "artifacts")
    except CheckpointError as error:
        assert "tokenizer" in str(error)  # noqa: PT017 - either is fine, running it is not
    assert not trap.exists()


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000])
@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json"])
def test_unreadable_json(name: str, content: str, checkpoint: Path) -> None:
    (checkpoint / name).write_text(content)
    assert_refused(checkpoint, CheckpointError, "cannot be read|must be a JSON object")
