"""The tensors of a component's folder: shards, and names that are not those of the network."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from klein_kv.errors import CheckpointError
from klein_kv.export import exporter
from klein_kv.export.checkpoints.weight_index import read_folder
from klein_kv.export.exporter import export_checkpoint

TENSORS = {"weight": torch.ones(2, 3), "count": torch.tensor(7)}
INDEX = "m.safetensors.index.json"
WHOLE = {"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}


def paths(folder: Path) -> dict[str, str]:
    """File of each tensor."""
    return {name: ref.path.name for name, ref in read_folder(folder, "transformer").items()}


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards with their index."""
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "m-1.safetensors")
    save_file({"c": torch.ones(4)}, tmp_path / "m-2.safetensors")
    write_index(tmp_path, WHOLE)
    return tmp_path


def test_shards(shards: Path) -> None:
    assert paths(shards) == WHOLE


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "m-1.safetensors", "c": "m-2.safetensors"}, "holds b, which .* does not place"),
        ({"a": "m-2.safetensors"}, "says a is in m-2.safetensors, but that file lacks it"),
        ({"a": "m-3.safetensors"}, "missing"),
        ({"a": "../m-1.safetensors"}, "expected a file in the same folder"),
        ({"a": "/etc/m-1.safetensors"}, "expected a file in the same folder"),
        ({"a": ".."}, "not a safetensors file"),
        ({"a": ""}, "not a safetensors file"),
        ({"a": ["m-1.safetensors"], "b": None}, "expected a file in the same folder"),
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
    ],
)
def test_bad_shard_index(weight_map: Any, message: str, shards: Path) -> None:
    write_index(shards, weight_map)
    with pytest.raises(CheckpointError, match=message):
        read_folder(shards, "transformer")


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000])
def test_unreadable_shard_index(text: str, shards: Path) -> None:
    (shards / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="transformer shard index"):
        read_folder(shards, "transformer")


def test_two_files_without_an_index(shards: Path) -> None:
    (shards / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"found m-1\.safetensors, m-2\.safetensors"):
        read_folder(shards, "transformer")


def test_variants_beside_the_usual_file(tmp_path: Path) -> None:
    """As diffusers: the file without a variant's name, unless there is none."""
    for name in ("model.fp16.safetensors", "model.safetensors"):
        save_file(TENSORS, tmp_path / name)
        assert paths(tmp_path) == dict.fromkeys(TENSORS, name)
    (tmp_path / "model.safetensors").rename(tmp_path / "model.bf16.safetensors")
    with pytest.raises(CheckpointError, match=r"found model\.bf16.*, model\.fp16"):
        read_folder(tmp_path, "text_encoder")


@pytest.mark.parametrize("exists", [True, False])
def test_pickled_checkpoint(exists: bool, tmp_path: Path) -> None:
    if exists:
        (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    folder = tmp_path if exists else tmp_path / "none"
    with pytest.raises(CheckpointError, match=r"found none \(pickle formats .* are not read\)"):
        read_folder(folder, "text_encoder")


# --- LoRA ---


def with_lora(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As `save_pretrained` writes a network after `fuse_lora`: PEFT's layers are still around."""
    wrapped = dict(state)
    for name in [name for name in state if name.endswith(("to_q.weight", "q_proj.weight"))]:
        layer, weight = name.removesuffix(".weight"), wrapped.pop(name)
        wrapped[f"{layer}.base_layer.weight"] = weight
        wrapped[f"{layer}.lora_A.style.weight"] = torch.ones(4, weight.shape[1])
        wrapped[f"{layer}.lora_B.style.weight"] = torch.ones(weight.shape[0], 4)
    return wrapped


@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
def test_a_lora_that_was_left_in_a_checkpoint(
    component: str, checkpoint: Path, tmp_path: Path
) -> None:
    """The message counted missing and unexpected tensors, and said nothing of LoRA."""
    (path,) = (checkpoint / component).glob("*.safetensors")
    state = with_lora(load_file(path))
    path.unlink()
    save_file(state, path)
    message = r"[1-9]\d* missing .*LoRA layers were left in it .*unload_lora_weights\(\)"
    with pytest.raises(CheckpointError, match=message):
        export_checkpoint(checkpoint, tmp_path / "artifacts")


@pytest.mark.parametrize(
    "name",
    ["transformer.single_transformer_blocks.0.attn.to_out.lora_A.weight",
     "lora_unet_single_blocks_0_linear2.lora_down.weight",
     "diffusion_model.double_blocks.0.img_attn.proj.lokr_w1"],
)  # fmt: skip
def test_a_lora_in_place_of_a_checkpoint(name: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    save_file({name: torch.ones(4, 4)}, path)
    with pytest.raises(CheckpointError, match=r"it is a LoRA \(.*give the LoRA to load_lora_weig"):
        export_checkpoint(path, tmp_path / "artifacts", base=tiny_checkpoint, variant="kv")


# --- fp8 ---


def test_fp8_text_encoder(checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """ComfyUI's fp8 text encoders under transformers' names were refused by their type."""
    monkeypatch.setattr(exporter, "_write_graphs", lambda *_: {})
    monkeypatch.setattr(exporter, "save_preview_matrix", lambda *_: None)
    path = checkpoint / "text_encoder/model.safetensors"
    state, expected = {}, {}
    for name, tensor in load_file(path).items():
        expected[name] = tensor
        state[name] = tensor
        if name.endswith("_proj.weight"):
            scale = tensor.abs().max() / 448
            state[name] = (tensor / scale).to(torch.float8_e4m3fn)
            state[name.replace(".weight", ".scale_weight")] = scale
            expected[name] = state[name].float() * scale
    names = sorted(state)
    path.unlink()
    index = {}
    for shard, part in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({name: state[name] for name in part}, path.with_name(shard))
        index |= dict.fromkeys(part, shard)
    write_index(path.parent, index)  # scales and weights in different shards
    artifacts = export_checkpoint(checkpoint, tmp_path / "artifacts").artifacts
    placed = load_file(artifacts / "text_encoder/text_encoder.float32.safetensors")
    quantized = [name for name in placed if name.endswith("_proj.weight")]
    assert len(quantized) == 7 * 27
    for name, tensor in placed.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
