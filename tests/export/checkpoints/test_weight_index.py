"""The tensors of a component's folder: shards, and names that are not those of the network."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from klein_kv.artifacts.weights import WeightRef
from klein_kv.errors import CheckpointError
from klein_kv.export import exporter
from klein_kv.export.checkpoints.weight_index import WeightIndex
from klein_kv.export.exporter import export_checkpoint

TENSORS = {"weight": torch.ones(2, 3), "count": torch.tensor(7)}


def test_single_file(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "any-name.safetensors")
    index = WeightIndex.from_folder(tmp_path, "vae")
    assert set(index) == set(TENSORS)
    assert len(index) == len(TENSORS)
    assert "weight" in index
    assert "other" not in index
    assert index.files == [tmp_path / "any-name.safetensors"]
    with pytest.raises(CheckpointError, match="vae: tensor other is missing"):
        index["other"]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards with their index."""
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "m-1.safetensors")
    save_file({"c": torch.ones(4)}, tmp_path / "m-2.safetensors")
    write_index(tmp_path, {"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"})
    return tmp_path


def write_index(folder: Path, weight_map: Any) -> None:
    path = folder / "m.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards(shards: Path) -> None:
    index = WeightIndex.from_folder(shards, "transformer")
    assert sorted(index) == ["a", "b", "c"]
    assert index["c"].path == shards / "m-2.safetensors"
    assert index.files == [shards / "m-1.safetensors", shards / "m-2.safetensors"]


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
        ({"a": 5}, "expected a file in the same folder"),
        ({"a": ["m-1.safetensors"], "b": None}, "expected a file in the same folder"),
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
        (None, "has no weight_map"),
    ],
)
def test_bad_shard_index(weight_map: Any, message: str, shards: Path) -> None:
    write_index(shards, weight_map)
    with pytest.raises(CheckpointError, match=message):
        WeightIndex.from_folder(shards, "transformer")


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_unreadable_shard_index(text: str, shards: Path) -> None:
    (shards / "m.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="transformer shard index"):
        WeightIndex.from_folder(shards, "transformer")


def test_two_files_without_an_index(shards: Path) -> None:
    (shards / "m.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"found m-1\.safetensors, m-2\.safetensors"):
        WeightIndex.from_folder(shards, "transformer")


def test_variants_beside_the_usual_file(tmp_path: Path) -> None:
    """As diffusers: the file without a variant's name, unless there is none."""
    variant = tmp_path / "model.fp16.safetensors"
    save_file(TENSORS, variant)
    assert WeightIndex.from_folder(tmp_path, "text_encoder").files == [variant]
    usual = tmp_path / "model.safetensors"
    save_file(TENSORS, usual)
    assert WeightIndex.from_folder(tmp_path, "text_encoder").files == [usual]
    usual.rename(tmp_path / "model.bf16.safetensors")
    with pytest.raises(CheckpointError, match=r"found model\.bf16.*, model\.fp16"):
        WeightIndex.from_folder(tmp_path, "text_encoder")


@pytest.mark.parametrize("exists", [True, False])
def test_pickled_checkpoint(exists: bool, tmp_path: Path) -> None:
    if exists:
        (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    folder = tmp_path if exists else tmp_path / "none"
    with pytest.raises(CheckpointError, match=r"found none \(pickle formats .* are not read\)"):
        WeightIndex.from_folder(folder, "text_encoder")


# --- strictness ---


def refs(**shapes: tuple[int, ...]) -> WeightIndex:
    return WeightIndex(
        {
            name: WeightRef(Path("x"), 0, 4 * int(np.prod(shape)), "float32", shape)
            for name, shape in shapes.items()
        },
        "vae",
    )


def test_expected_tensors_pass() -> None:
    refs(a=(1, 2), b=(3,)).expect({"a": (1, 2), "b": (3,)})
    refs(a=(1, 2), lm_head=(3,)).expect({"a": (1, 2)}, ignore=("lm_",))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"a": (1, 2)}, r"0 missing, 1 unexpected \(b\)"),
        ({"a": (1, 2), "b": (3,), "c": (1,)}, r"1 missing \(c\), 0 unexpected"),
        (dict.fromkeys("cdefg", (1,)), r"5 missing \(c, d, e, \.\.\.\), 2 unexpected \(a, b\)"),
        ({"a": (2, 1), "b": (3,)}, r"vae: a has shape \(1, 2\), expected \(2, 1\)"),
    ],
)
def test_unexpected_tensors(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        refs(a=(1, 2), b=(3,)).expect(shapes)


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
    component: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """The message counted missing and unexpected tensors, and said nothing of LoRA."""
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
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


def test_fp8_text_encoder(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """ComfyUI's fp8 text encoders under transformers' names were refused by their type."""
    monkeypatch.setattr(exporter, "_write_graphs", lambda *_: {})
    monkeypatch.setattr(exporter, "save_preview_matrix", lambda *_: None)
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
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
