"""fp8 and nvfp4 against other implementations: torch's float8, and an exhaustive search."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from klein_kv.artifacts.numbers import (
    QuantizedLinear,
    dequantize_fp8,
    dequantize_nvfp4,
    fp8_scale,
    nvfp4_scale,
    pack_fp4,
    quantize_fp8,
    quantize_nvfp4,
    unpack_fp4,
)
from klein_kv.artifacts.weights import WeightRef, map_weight, read_header, safetensors_header
from klein_kv.errors import ArtifactError, CheckpointError

# Every e2m1 number in the order of its code: sign, two bits of exponent, one of mantissa.
E2M1 = [0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def nearest_code(value: float) -> int:
    """The nearest e2m1 code of the value's sign by exhaustive search, ties to the even code."""
    codes = range(8) if value >= 0 else range(8, 16)
    return min(codes, key=lambda code: (abs(E2M1[code] - value), code % 2))


def random_values(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    spread = np.exp2(rng.integers(-6, 3, shape)).astype(np.float32)
    return rng.standard_normal(shape, dtype=np.float32) * spread


def test_fp8_is_torchs_float8() -> None:
    values = random_values(64, 96)
    scale = fp8_scale(float(np.abs(values).max()))
    theirs = (torch.from_numpy(values) / scale).to(torch.float8_e4m3fn)
    numbers = quantize_fp8(values, scale)
    np.testing.assert_array_equal(numbers.view(np.uint8), theirs.view(torch.uint8).numpy())
    np.testing.assert_array_equal(dequantize_fp8(numbers, scale), (theirs.float() * scale).numpy())


def test_fp8_saturates_and_rounds_ties_to_even() -> None:
    values = np.array([449, 1e30, -1e30, 464, 17, 19, 2**-10, 3 * 2**-10], np.float32)
    expected = [448, 448, -448, 448, 16, 20, 0, 2**-8]
    assert quantize_fp8(values, 1.0).astype(np.float32).tolist() == expected
    assert np.isnan(quantize_fp8(np.array([np.nan]), 1.0).astype(np.float32)).all()


def test_scales_use_the_whole_range() -> None:
    values = random_values(8, 64)
    amax = float(np.abs(values).max())
    assert np.abs(quantize_fp8(values, fp8_scale(amax)).astype(np.float32)).max() == 448
    packed, block_scales = quantize_nvfp4(values, nvfp4_scale(amax))
    assert block_scales.astype(np.float32).max() == 448
    assert np.isin(unpack_fp4(packed), (7, 15)).any()  # 6 and -6
    assert fp8_scale(0.0) == nvfp4_scale(0.0) == 1.0


def test_nvfp4_is_nearest_in_every_block() -> None:
    values = random_values(5, 48, seed=1)
    scale = nvfp4_scale(float(np.abs(values).max()))
    packed, block_scales = quantize_nvfp4(values, scale)
    assert packed.shape == (5, 24)
    assert block_scales.shape == (5, 3)
    for row in range(5):
        for block in range(3):
            piece = torch.from_numpy(values[row, 16 * block : 16 * block + 16])
            step = (piece.abs().max() / 6 / scale).to(torch.float8_e4m3fn)
            assert float(step) == float(block_scales[row, block])
            expected = [nearest_code(float(x)) for x in piece / (step.float() * scale)]
            codes = [
                int(byte >> shift & 15)
                for byte in packed[row, 8 * block : 8 * block + 8]
                for shift in (0, 4)  # the first number is in the low half
            ]
            assert codes == expected


@given(st.lists(st.sampled_from(np.arange(-28, 29).tolist()), min_size=15, max_size=15))
def test_nvfp4_rounds_ties_to_even(quarters: list[int]) -> None:
    # The last number makes the block's scale 1, so that the others are rounded as they are.
    values = np.array([[*(x / 4 for x in quarters), 6.0]], np.float32).clip(-6, 6)
    packed, block_scales = quantize_nvfp4(values, 1.0)
    assert block_scales.astype(np.float32).tolist() == [[1.0]]
    assert unpack_fp4(packed)[0].tolist() == [nearest_code(float(x)) for x in values[0]]


def test_nvfp4_of_what_it_holds_is_itself() -> None:
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 16, (4, 64), dtype=np.uint8)
    codes[:, ::16] = 7  # 6, so that each block's scale is what it was
    codes[codes == 8] = 0
    block_scales = rng.uniform(1, 448, (4, 4)).astype(ml_dtypes.float8_e4m3fn)
    values = dequantize_nvfp4(pack_fp4(codes), block_scales, 0.125)
    again, scales_again = quantize_nvfp4(values, 0.125)
    np.testing.assert_array_equal(unpack_fp4(again) & 7, codes & 7)
    np.testing.assert_array_equal(dequantize_nvfp4(again, scales_again, 0.125), values)


def test_nvfp4_blocks_of_zeros_and_of_almost_nothing_are_zeros() -> None:
    values = np.zeros((2, 32), np.float32)
    values[0, :16] = 100
    values[1, 16:] = 1e-6  # below half the smallest block scale
    packed, block_scales = quantize_nvfp4(values, nvfp4_scale(100.0))
    result = dequantize_nvfp4(packed, block_scales, nvfp4_scale(100.0))
    np.testing.assert_allclose(result[0, :16], 100, rtol=1e-6)
    assert not result[0, 16:].any()
    assert not result[1].any()
    packed, block_scales = quantize_nvfp4(np.zeros((2, 32)), 1.0)
    assert not dequantize_nvfp4(packed, block_scales, 1.0).any()


def save(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    header = safetensors_header({name: (kind, shape) for name, (kind, shape, _) in tensors.items()})
    path.write_bytes(header + b"".join(data for _, _, data in tensors.values()))


def write_linear(
    path: Path, kind: str, values: NDArray[np.float32], input_scale: float | None = None
) -> QuantizedLinear:
    """A file of one quantized weight, as it is read."""
    amax = float(np.abs(values).max())
    rows, columns = values.shape
    if kind == "fp8":
        scale = fp8_scale(amax)
        save(path, {"w": ("float8_e4m3fn", values.shape, quantize_fp8(values, scale).tobytes())})
    else:
        scale = nvfp4_scale(amax)
        packed, block_scales = quantize_nvfp4(values, scale)
        tensors = {"w": ("float4_e2m1fn", values.shape, packed.tobytes())}
        tensors["s"] = ("float8_e4m3fn", (rows, columns // 16), block_scales.tobytes())
        save(path, tensors)
    refs = read_header(path, quantized=True)
    return QuantizedLinear(kind, refs["w"], scale, refs.get("s"), input_scale)


@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
def test_a_file_reads_back(tmp_path: Path, kind: str) -> None:
    values = random_values(6, 32, seed=4)
    linear = write_linear(tmp_path / "weights.safetensors", kind, values)
    if kind == "fp8":
        expected = dequantize_fp8(quantize_fp8(values, linear.weight_scale), linear.weight_scale)
    else:
        numbers = quantize_nvfp4(values, linear.weight_scale)
        expected = dequantize_nvfp4(*numbers, linear.weight_scale)
    np.testing.assert_array_equal(linear.dequantize(), expected)
    np.testing.assert_array_equal(linear.rows(2, 5).dequantize(), expected[2:5])
    assert linear.shape == (6, 32)
    assert linear.nbytes == (192 if kind == "fp8" else 96 + 12)


def test_float4_files_are_torchs(tmp_path: Path) -> None:
    """safetensors reads the file, and torch finds the first number in the low half."""
    from safetensors import safe_open

    codes = np.arange(16, dtype=np.uint8).reshape(1, 16)
    save(tmp_path / "w.safetensors", {"w": ("float4_e2m1fn", (1, 16), pack_fp4(codes).tobytes())})
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        tensor = file.get_tensor("w")
    assert tensor.dtype == torch.float4_e2m1fn_x2
    assert tensor.view(torch.uint8).tolist() == [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]]
    ref = read_header(tmp_path / "w.safetensors", quantized=True)["w"]
    assert (ref.dtype, ref.shape, ref.nbytes) == ("float4_e2m1fn", (1, 16), 8)
    np.testing.assert_array_equal(unpack_fp4(map_weight(ref)), codes)


FP8 = WeightRef(Path("w"), 0, 512, "float8_e4m3fn", (8, 64))
FP4 = WeightRef(Path("w"), 0, 256, "float4_e2m1fn", (8, 64))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("fp4", FP8, 1.0, None, None), "format 'fp4'"),
        (("nvfp4", FP8, 1.0, None, None), "float8_e4m3fn"),
        (("fp8", FP8, float("nan"), None, None), "weight_scale is nan"),
        (("fp8", FP8, 0.0, None, None), "weight_scale is 0"),
        (("fp8", FP8, 1.0, None, -1.0), "input_scale is -1"),
        (("nvfp4", FP4, 1.0, None, None), "are none"),
        (("nvfp4", FP4, 1.0, replace(FP8, shape=(8, 3)), None), "block scales"),
        (("nvfp4", FP4, 1.0, replace(FP8, shape=(4, 8)), None), "block scales"),
    ],
)
def test_refuses_what_makes_no_sense(fields: Any, message: str) -> None:
    QuantizedLinear("fp8", FP8, 1.0, None, None)
    with pytest.raises(ArtifactError, match=message):
        QuantizedLinear(*fields)


def test_float4_with_half_a_byte_over_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save(path, {"w": ("float4_e2m1fn", (2, 3), bytes(3))})
    with pytest.raises(CheckpointError, match="an even last axis"):
        read_header(path, quantized=True)
    with pytest.raises(CheckpointError, match="dtype F4"):
        read_header(path)
