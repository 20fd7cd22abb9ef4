"""BFL's fp8 and nvfp4 tensors: exact numbers, and nothing that is not one of the two."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from klein_kv.artifacts.weights import WeightRef
from klein_kv.errors import CheckpointError
from klein_kv.export.checkpoints.quantized_files import PublishedWeight, read_weights
from klein_kv.export.checkpoints.stored_weights import read_rows
from tests.bfl_files import dequantized, quantize, tiled

# [out, in]: whole tiles of block scales; rows and columns that need padding; one row.
SHAPES = [(256, 128), (192, 64), (80, 16), (1, 176), (129, 80)]


def layer(shape: tuple[int, int], kind: str, seed: int = 0) -> dict[str, Tensor]:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return quantize({"blocks.0.linear.weight": weight}, kind)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def write(state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
        path = tmp_path / "model.safetensors"
        save_file(state, path, metadata)
        return path

    return write


@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_are_those_of_the_independent_reader(
    save: Callable[..., Path], shape: tuple[int, int], kind: str
) -> None:
    path = save(layer(shape, kind))
    (weight,) = read_weights(path).values()
    assert isinstance(weight, PublishedWeight)
    assert (weight.format, weight.shape, weight.dtype) == (kind, shape, "float32")
    assert weight.input_scale == (0.5 if kind == "fp8" else 0.25)
    expected = dequantized(load_file(path))["blocks.0.linear.weight"].numpy()
    np.testing.assert_array_equal(weight.read(0, shape[0]), expected)
    assert np.abs(expected).max() > 1
    low, high = shape[0] // 3, shape[0] // 3 + (shape[0] + 1) // 2
    part = weight.rows(low, high)
    assert part.shape == (high - low, shape[1])
    np.testing.assert_array_equal(part.read(0, high - low), expected[low:high])
    if high - low > 2:
        np.testing.assert_array_equal(part.rows(1, 3).read(1, 2), expected[low + 2 : low + 3])


def test_every_code_and_scale_of_nvfp4(save: Callable[..., Path]) -> None:
    """All 16 numbers, and all 126 positive float8 scales, the smallest subnormal among them."""
    scales = torch.arange(1, 127, dtype=torch.uint8)
    packed = torch.tensor([[2 * i << 4 | 2 * i + 1 for i in range(8)]], dtype=torch.uint8)
    state = {
        "a.weight": packed.repeat(126, 1),
        "a.weight_scale": tiled(scales[:, None]).view(torch.float8_e4m3fn),
        "a.weight_scale_2": torch.tensor(0.3),
    }
    path = save(state)
    weight = read_weights(path)["a.weight"]
    assert isinstance(weight, PublishedWeight)
    assert weight.input_scale is None
    np.testing.assert_array_equal(weight.linear_block_scales().view(np.uint8)[:, 0], scales.numpy())
    np.testing.assert_array_equal(
        weight.read(0, 126), dequantized(load_file(path))["a.weight"].numpy()
    )


def test_plain_tensors_stay_plain(save: Callable[..., Path]) -> None:
    state = {
        "a.weight": torch.ones(2, 2, dtype=torch.bfloat16),
        "a.input_scale": torch.tensor(3.0),  # of a layer that was left alone
        "a.weight_scale": torch.tensor(1.0),
        "norm.scale": torch.ones(4),
    }
    weights = read_weights(save(state))
    assert weights.keys() == {"a.weight", "norm.scale"}
    assert all(isinstance(weight, WeightRef) for weight in weights.values())


def test_formats_that_the_file_names_itself(save: Callable[..., Path]) -> None:
    def metadata(kind: str) -> dict[str, str]:
        layers = {"blocks.0.linear": {"format": kind}}
        return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}

    def marked(kind: str) -> dict[str, Tensor]:
        text = np.frombuffer(json.dumps({"format": kind}).encode(), np.uint8).copy()
        return layer((16, 16), "fp8") | {"blocks.0.linear.comfy_quant": torch.from_numpy(text)}

    broken = {"blocks.0.linear.comfy_quant": torch.zeros(3, dtype=torch.uint8)}
    assert read_weights(save(layer((16, 16), "fp8"), metadata("float8_e4m3fn")))
    assert read_weights(save(marked("float8_e4m3fn")))
    for state, header, message in (
        (layer((16, 16), "fp8"), metadata("mxfp8"), "quantized as 'mxfp8', expected float8_e4m3fn"),
        (marked("int8_tensorwise"), None, "quantized as 'int8_tensorwise'"),
        (layer((16, 16), "fp8"), {"_quantization_metadata": "[1]"}, "not what ComfyUI writes"),
        (layer((16, 16), "fp8") | broken, None, "not what ComfyUI writes"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_weights(save(state, header))


NAME = "blocks.0.linear"


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("fp8", {"weight_scale": None}, f"{NAME}.weight_scale is missing"),
        ("fp8", {"weight": None}, f"{NAME} has .* but no {NAME}.weight"),
        ("fp8", {"weight_scale": torch.ones(8)}, r"weight_scale is float32 of shape \(8,\)"),
        ("fp8", {"weight_scale": torch.ones(1, 16)}, "one float32 for the tensor, or one per row"),
        ("fp8", {"weight_scale": -torch.ones(16)}, "scales of the rows .* not all positive"),
        ("fp8", {"weight_scale_inv": torch.ones(1, 1)}, "scale per block of 128 x 128"),
        ("fp8", {"weight.absmax": torch.ones(4)}, "absmax belongs to .* bitsandbytes"),
        ("fp8", {"scale_weight": torch.tensor(1.0)}, "has two scales that mean the same"),
        ("fp8", {"weight_scale": torch.ones((), dtype=torch.bfloat16)}, "expected one float32"),
        ("fp8", {"weight_scale": torch.tensor(0.0)}, "weight_scale is 0.0, expected a positive"),
        ("fp8", {"weight_scale": torch.tensor(torch.nan)}, "weight_scale is nan"),
        ("fp8", {"input_scale": torch.tensor(-1.0)}, "input_scale is -1.0"),
        ("fp8", {"weight_scale_2": torch.tensor(1.0)}, "which only nvfp4"),
        ("fp8", {"weight": torch.ones(16, 16)}, "float32 but has a weight_scale other than 1"),
        ("fp8", {"pre_quant_scale": torch.ones(16), "weight_scale": None}, "is missing"),
        ("nvfp4", {"weight_scale": None}, "needs 512 float8 block scales .* got none"),
        ("nvfp4", {"weight_scale_2": None}, f"{NAME}.weight_scale_2 is missing"),
        ("nvfp4", {"weight_scale": torch.ones(16, 1)}, r"got float32 of shape \(16, 1\)"),
        (
            "nvfp4",
            {"weight_scale": torch.ones(16, 1).to(torch.float8_e4m3fn)},
            r"whole tiles of 128 x 4.*got float8_e4m3fn of shape \(16, 1\)",
        ),
        ("nvfp4", {"weight": torch.zeros(16, 9, dtype=torch.uint8)}, r"nvfp4 \[16, 18\]"),
        ("nvfp4", {"weight": torch.zeros(16, dtype=torch.uint8)}, "expected a matrix with"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    save: Callable[..., Path], kind: str, change: dict[str, Tensor | None], message: str
) -> None:
    state = layer((16, 16), kind)
    for part, tensor in change.items():
        state.pop(f"{NAME}.{part}", None)
        if tensor is not None:
            state[f"{NAME}.{part}"] = tensor
    path = save(state)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_weights(path)
    assert str(path) in str(caught.value)


# --- other conventions of fp8 ---


def renamed(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    out = {}
    for name, tensor in state.items():
        layer, _, part = name.rpartition(".")
        out[f"{layer}.{names.get(part, part)}"] = tensor
    return out


@pytest.mark.parametrize(("scale", "expected"), [(0.5, 0.5), (1.0, None)])
def test_older_files_of_comfyui(save: Callable[..., Path], scale: float, expected: float | None):
    """They were refused by names that nobody expected, with the advice to download them again."""
    new = layer((16, 32), "fp8") | {f"{NAME}.input_scale": torch.tensor(scale)}
    old = renamed(new, {"weight_scale": "scale_weight", "input_scale": "scale_input"})
    old |= {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    weights = read_weights(save(old))
    assert weights.keys() == {f"{NAME}.weight"}
    weight = weights[f"{NAME}.weight"]
    assert isinstance(weight, PublishedWeight)
    assert (weight.format, weight.input_scale) == ("fp8", expected)
    np.testing.assert_array_equal(weight.read(0, 16), dequantized(new)[f"{NAME}.weight"].numpy())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_numbers_that_were_cast(save: Callable[..., Path], dtype: torch.dtype) -> None:
    """Files without any scale: their numbers, those of norms too, are the weights."""
    full = {"a.weight": torch.randn(8, 4), "norm.scale": torch.randn(8), "b.weight": torch.ones(4)}
    state = {name: tensor.to(dtype) for name, tensor in full.items()}
    for name, weight in read_weights(save(state)).items():
        got = read_rows(weight, 0, len(state[name])).astype(np.float32)
        np.testing.assert_array_equal(got, state[name].float().numpy())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("shape", [(), (1,), (16,), (16, 1)])
def test_scales_by_tensor_and_by_row(
    save: Callable[..., Path], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    numbers, scale = torch.randn(16, 16).to(dtype), torch.rand(shape) + 0.5
    weight = read_weights(save({"a.weight": numbers, "a.weight_scale": scale}))["a.weight"]
    assert isinstance(weight, PublishedWeight)
    by_row = 16 in shape
    expected = (numbers.float() * (scale.reshape(-1, 1) if by_row else scale)).numpy()
    np.testing.assert_array_equal(weight.read(0, 16), expected)
    np.testing.assert_array_equal(weight.rows(3, 9).rows(1, 5).read(1, 3), expected[5:7])
    names = {torch.float8_e4m3fn: "fp8", torch.float8_e5m2: "fp8 of e5m2"}
    assert weight.format == ("fp8 by rows" if by_row else names[dtype])


def test_truncated_file(save: Callable[..., Path]) -> None:
    path = save(layer((16, 16), "nvfp4"))
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        read_weights(path)
