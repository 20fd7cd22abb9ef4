"""The transformer out of one file: names, row ranges, and graphs that agree with diffusers."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_ldm_vae_checkpoint,
)
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from klein_kv import KleinKVPipeline
from klein_kv.artifacts.config import (
    TransformerConfig,
    read_json,
)
from klein_kv.errors import CheckpointError
from klein_kv.export.checkpoints import weight_files
from klein_kv.export.checkpoints.quantized_files import PublishedWeight
from klein_kv.export.checkpoints.single_file import read_beside, read_single_file
from klein_kv.export.checkpoints.stored_weights import JoinedRows, read_rows
from klein_kv.export.checkpoints.weight_files import Placement, place_weights
from klein_kv.export.exporter import export_checkpoint
from klein_kv.networks.transformer import transformer_parameters
from tests.bfl_files import (
    bfl_state,
    dequantized,
    ldm_vae_state,
    quantize,
    save_single_file,
    write_sparse,
)
from tests.klein_configs import KLEIN_9B

TOLERANCE = 1e-4
QKV = "double_blocks.0.img_attn.qkv.weight"


@pytest.fixture(scope="module")
def config(tiny_checkpoint: Path) -> TransformerConfig:
    return TransformerConfig.from_dict(read_json(tiny_checkpoint / "transformer/config.json", ""))


@pytest.fixture(scope="module")
def state(tiny_checkpoint: Path) -> dict[str, Tensor]:
    """The tiny transformer, under diffusers' names."""
    folder = tiny_checkpoint / "transformer"
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def numbers(weight: Any) -> np.ndarray[Any, Any]:
    return read_rows(weight, 0, weight.shape[0]).astype(np.float32)


def place(path: Path, config: TransformerConfig, dtype: str, folder: Path) -> Placement:
    folder.mkdir()
    weights = read_single_file(path, config)
    return place_weights(weights, transformer_parameters(config), dtype, folder, "transformer")


FORMS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "bf16": lambda state: {n: t.to(torch.bfloat16) for n, t in bfl_state(state).items()},
    "fp8": lambda state: quantize(bfl_state(state), "fp8"),
    "nvfp4": lambda state: quantize(bfl_state(state), "nvfp4"),
}


@pytest.mark.parametrize("form", FORMS)
def test_numbers_are_those_that_diffusers_converts(
    tmp_path: Path, state: dict[str, Tensor], config: TransformerConfig, form: str
) -> None:
    """The independent reader undoes the quantization, diffusers' own converter the layout."""
    bfl = FORMS[form](state)
    path = save_single_file(tmp_path / "m.safetensors", bfl)
    weights = read_single_file(path, config)
    expected = convert_flux2_transformer_checkpoint_to_diffusers(dequantized(bfl))
    placed = place(path, config, "float32", tmp_path / "transformer").refs
    assert weights.keys() == expected.keys() == state.keys()
    for name, weight in weights.items():
        np.testing.assert_array_equal(numbers(weight), expected[name].numpy(), err_msg=name)
        np.testing.assert_array_equal(numbers(placed[name]), expected[name].numpy(), err_msg=name)
    kinds = [type(weight) for weight in weights.values()]
    assert kinds.count(JoinedRows) == 1
    quantized = {"bf16": 0, "fp8": 16, "nvfp4": 16}[form]  # 12 of a double block, 2 of a single
    assert kinds.count(PublishedWeight) == quantized


@pytest.fixture(scope="module")
def vae_state(tiny_checkpoint: Path) -> dict[str, Tensor]:
    return load_file(tiny_checkpoint / "vae/diffusion_pytorch_model.safetensors")


@pytest.fixture
def configurations(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint without any weights."""
    no_weights = shutil.ignore_patterns("*.safetensors")
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "base", ignore=no_weights))


def test_names_of_the_vae_are_those_that_diffusers_converts(tiny_checkpoint, vae_state):
    config = json.loads((tiny_checkpoint / "vae/config.json").read_text())
    theirs = convert_ldm_vae_checkpoint(ldm_vae_state(vae_state), config)
    own = {name for name in vae_state if not name.startswith("bn.")}
    assert own == theirs.keys()
    for name in own:
        assert torch.equal(vae_state[name], theirs[name]), name


def refuse(*_: object) -> None:
    raise OSError(95, "Operation not supported")


@pytest.mark.parametrize("nested", [False, True])
def test_a_whole_pipeline_in_one_file(
    tmp_path,
    tiny_checkpoint,
    tiny_artifacts,
    configurations,
    state,
    vae_state,
    nested,
    caplog,
    monkeypatch,
):
    """As ComfyUI saves checkpoints: the base gives tokenizer and configurations alone."""
    text = load_file(tiny_checkpoint / "text_encoder/model.safetensors")
    whole = {f"model.diffusion_model.{name}": x for name, x in bfl_state(state).items()}
    whole |= {f"text_encoders.qwen3_8b.transformer.{name}": x for name, x in text.items()}
    whole |= {"text_encoders.qwen3_8b.logit_scale": torch.tensor(4.6)}
    whole |= {f"vae.{name}": x for name, x in ldm_vae_state(vae_state, nested=nested).items()}
    path = save_single_file(tmp_path / "whole.safetensors", whole)
    if nested:  # on a file system without links a copy for each part would take three times as much
        monkeypatch.setattr(weight_files.os, "link", refuse)
        monkeypatch.setattr(weight_files, "_clone", lambda *_: False)
    with caplog.at_level(logging.WARNING):
        export_checkpoint(path, tmp_path / "out", base=configurations, variant="kv")
    assert "whole pipeline" not in caplog.text
    files = [x.parent.name for x in (tmp_path / "out").rglob("whole.safetensors")]
    assert set(files) == (set() if nested else {"transformer", "text_encoder", "vae"})
    images = [
        KleinKVPipeline.from_pretrained(folder, backend="torch", device="cpu", threads=1)(
            "a kite", image=Image.new("RGB", (64, 64), "red"), height=64, width=64, seed=1
        ).images[0]
        for folder in (tmp_path / "out", tiny_artifacts)
    ]
    np.testing.assert_array_equal(*images)
    del whole["vae.encoder.conv_in.bias"]
    path = save_single_file(tmp_path / "whole.safetensors", whole | {"vae.x": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"vae: .* 1 missing \(encoder.conv_in.bias\), 1 "):
        export_checkpoint(path, tmp_path / "other", base=configurations, variant="kv")


def test_parts_of_a_whole_pipeline_that_are_not_known(tmp_path, state, config, caplog):
    whole = {f"diffusion_model.{n}": t for n, t in quantize(bfl_state(state), "fp8").items()}
    whole |= {"text_encoders.t5xxl.x": torch.ones(2, 2), "vae.conv_in.weight": torch.ones(4)}
    path = save_single_file(tmp_path / "m.safetensors", whole)
    assert read_single_file(path, config).keys() == state.keys()
    assert not read_beside(path, {})
    assert (
        "whole pipeline: its text_encoders and vae are not read, those of the base" in caplog.text
    )
    path = save_single_file(path, whole | {"control.x": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"holds control.x beside tensors of diffusion"):
        read_single_file(path, config)


def test_quantized_under_diffusers_names(tmp_path, state, config):
    renamed = {f"blocks.{name}": tensor for name, tensor in state.items()}
    quantized = {
        name.removeprefix("blocks."): tensor for name, tensor in quantize(renamed, "fp8").items()
    }
    weights = read_single_file(save_single_file(tmp_path / "m.safetensors", quantized), config)
    assert isinstance(weights["transformer_blocks.0.attn.to_q.weight"], PublishedWeight)
    expected = dequantized(quantized)
    for name, weight in weights.items():
        np.testing.assert_array_equal(numbers(weight), expected[name].numpy(), err_msg=name)


def test_q_k_and_v_apart(tmp_path, state, config):
    bfl = bfl_state(state)
    for stream in ("img", "txt"):
        fused = bfl.pop(f"double_blocks.0.{stream}_attn.qkv.weight")
        for name, part in zip(("to_q", "to_k", "to_v"), fused.chunk(3), strict=True):
            bfl[f"double_blocks.0.{stream}_attn.{name}.weight"] = part.clone()
    bfl = quantize(bfl, "fp8")
    weights = read_single_file(save_single_file(tmp_path / "m.safetensors", bfl), config)
    scales = {
        weights[f"transformer_blocks.0.attn.{name}.weight"].scale for name in ("to_q", "to_k")
    }
    assert len(scales) == 2  # each has its own
    value = dequantized(bfl)["double_blocks.0.txt_attn.to_v.weight"]
    got = numbers(weights["transformer_blocks.0.attn.add_v_proj.weight"])
    np.testing.assert_array_equal(got, value.numpy())


# --- what does not fit ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({QKV: None}, r"1 missing \(double_blocks.0.img_attn.qkv.weight\), 0 unexpected"),
        ({"guidance_in.in_layer.weight": torch.ones(64, 256)}, r"1 unexpected \(guidance_in"),
        ({"vae.x": torch.ones(1)}, r"1 unexpected \(vae.x\)"),
        ({QKV: torch.ones(64, 64)}, r"qkv.weight has shape \(64, 64\), expected \(192, 64\)"),
        ({"img_in.weight": torch.ones(64, 4)}, r"img_in.weight has shape \(64, 4\), expected"),
        ({"img_in.weight": torch.ones(())}, "img_in.weight has shape"),
        (  # its many blocks are not what is wrong with it
            {"img_in.weight": torch.ones(4096, 4), "single_blocks.9.linear1.weight": torch.ones(1)},
            r"img_in.weight has shape \(4096, 4\) \(klein 9B\), expected \(64, 128\) from the base",
        ),
        ({"img_in.weight": None}, r"not those of a FLUX.2 \[klein\] transformer"),
        ({"single_blocks.2.linear1.weight": torch.ones(1, 1)}, r"1 unexpected \(single_blocks.2"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, state, config, change, message):
    bfl = bfl_state(state)
    for name, tensor in change.items():
        bfl.pop(name, None)
        if tensor is not None:
            bfl[name] = tensor
    path = save_single_file(tmp_path / "m.safetensors", bfl)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_single_file(path, config)
    assert str(path) in str(caught.value)


# --- placed in a folder ---


def test_nothing_is_written_but_the_swapped_halves(tmp_path, state, config):
    """The file is linked; only the last modulation, whose halves change places, is written."""
    path = save_single_file(tmp_path / "klein.safetensors", FORMS["bf16"](state))
    placed = place(path, config, "bfloat16", tmp_path / "out")
    linked = tmp_path / "out/klein.safetensors"
    assert linked.samefile(path)
    assert placed.sources == {linked: path}
    assert placed.shared == {linked}
    elsewhere = {name for name, ref in placed.refs.items() if ref.path != linked}
    assert elsewhere == {"norm_out.linear.weight"}
    small = tmp_path / "out/transformer.bfloat16.safetensors"
    assert list(load_file(small)) == ["norm_out.linear.weight"]
    expected = state["norm_out.linear.weight"].to(torch.bfloat16)
    torch.testing.assert_close(load_file(small)["norm_out.linear.weight"], expected, rtol=0, atol=0)


def test_a_file_is_not_kept_for_the_little_that_fits(tmp_path, state, config):
    path = save_single_file(tmp_path / "klein.safetensors", FORMS["fp8"](state))
    weights, folder = read_single_file(path, config), tmp_path / "out"
    folder.mkdir()
    blocks = [name for name in weights if "_blocks." in name]  # float8, but for the norms
    placed = place_weights(weights, blocks, "bfloat16", folder, "transformer")
    assert [file.name for file in folder.iterdir()] == ["transformer.bfloat16.safetensors"]
    assert not placed.sources
    assert {ref.dtype for ref in placed.refs.values()} == {"bfloat16"}


# --- full size ---


def real_shapes(form: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, types and shapes of a klein 9B single file with every block quantized."""
    shapes = transformer_parameters(KLEIN_9B.transformer)
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    out: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, tensor in bfl_state(empty).items():
        out[name] = ("BF16", tuple(tensor.shape))
        if form == "bf16" or "blocks." not in name or tensor.ndim == 1:
            continue
        rows, columns = tensor.shape
        if form == "fp8":
            out[name] = ("F8_E4M3", (rows, columns))
            out[f"{name}_scale"] = ("F32", ())
        else:
            out[name] = ("U8", (rows, columns // 2))
            out[f"{name}_scale"] = ("F8_E4M3", (rows, columns // 16))
            out[f"{name}_scale_2"] = ("F32", ())
        out[name.replace(".weight", ".input_scale")] = ("F32", ())
    return out


@pytest.mark.parametrize(
    ("form", "gigabytes"), [("bf16", 18.157), ("fp8", 9.433), ("nvfp4", 5.616)]
)
def test_full_size_headers(tmp_path, form, gigabytes):
    """Sizes are those of the published files (nvfp4: but for what it leaves in bf16)."""
    config = KLEIN_9B.transformer
    path = write_sparse(tmp_path / "9b.safetensors", real_shapes(form))
    assert path.stat().st_size / 1e9 == pytest.approx(gigabytes, abs=1e-3)
    weights = read_single_file(path, config)
    shapes = {name: weight.shape for name, weight in weights.items()}
    assert shapes == transformer_parameters(config)
    if form == "bf16":
        before = read_bytes()
        placed = place(path, config, "bfloat16", tmp_path / "out")
        assert read_bytes() - before < 0.2e9
        small = tmp_path / "out/transformer.bfloat16.safetensors"
        assert small.stat().st_size < 70e6
        assert placed.refs["transformer_blocks.7.attn.to_v.weight"].nbytes == 2 * 4096 * 4096
    else:
        weight = weights["single_transformer_blocks.23.attn.to_qkv_mlp_proj.weight"]
        assert weight.read(36863, 36864).shape == (1, 4096)


def read_bytes() -> int:
    """Bytes that this process asked the kernel for with read(), so far."""
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    counters = dict(line.split(": ") for line in lines)
    return int(counters["rchar"])
