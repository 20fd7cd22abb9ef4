"""Simulated quantized layers against the numpy arithmetic and against products of exact numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from klein_kv.artifacts.attention_scales import AttentionScales
from klein_kv.artifacts.numbers import (
    dequantize_fp8,
    dequantize_nvfp4,
    fp8_scale,
    nvfp4_scale,
    quantize_fp8,
    quantize_nvfp4,
)
from klein_kv.networks.quantized_torch_ops import QuantizedOps, round_to_fp8, round_to_nvfp4
from klein_kv.networks.torch_ops import TorchOps
from tests.klein_kv.artifacts.test_quantization import write_linear


def values(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    spread = np.exp2(rng.integers(-8, 4, (*shape[:-1], 1))).astype(np.float32)
    return rng.standard_normal(shape, dtype=np.float32) * spread


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_numpys_bit_for_bit(dtype: torch.dtype, seed: int) -> None:
    x = torch.from_numpy(values(40, 96, seed=seed)).to(dtype)
    host = x.float().numpy()
    # A scale that saturates some values too.
    for scale in (fp8_scale(float(np.abs(host).max())), 0.01):
        expected = dequantize_fp8(quantize_fp8(host, scale), scale)
        np.testing.assert_array_equal(round_to_fp8(x, scale).numpy(), expected)
    grid = np.arange(-96, 97, dtype=np.float32)[:, None] / 16  # each a block whose scale is 1
    ties = np.concatenate([grid, np.full_like(grid, 6), np.zeros((193, 14), np.float32)], 1)
    expected = dequantize_nvfp4(*quantize_nvfp4(ties, 1.0), 1.0)
    np.testing.assert_array_equal(round_to_nvfp4(torch.from_numpy(ties), 1.0).numpy(), expected)
    for scale in (nvfp4_scale(float(np.abs(host).max())), 1e-3, 1.0):
        expected = dequantize_nvfp4(*quantize_nvfp4(host, scale), scale)
        np.testing.assert_array_equal(round_to_nvfp4(x, scale).numpy(), expected)


@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
@pytest.mark.parametrize("weight_only", [False, True], ids=["w+a", "weight-only"])
def test_linear_multiplies_the_rounded_numbers(
    tmp_path: Path, kind: str, weight_only: bool
) -> None:
    weight, x = values(24, 64, seed=1), values(10, 64, seed=2)
    amax = float(np.abs(x).max())
    scale = None if weight_only else (fp8_scale if kind == "fp8" else nvfp4_scale)(amax)
    layer = write_linear(tmp_path / "w.safetensors", kind, weight, scale)
    rounded: Any = x
    if scale is not None and kind == "fp8":
        rounded = dequantize_fp8(quantize_fp8(x, scale), scale)
    elif scale is not None:
        rounded = dequantize_nvfp4(*quantize_nvfp4(x, scale), scale)
    ops = QuantizedOps(
        {"w": torch.from_numpy(weight), "other": torch.eye(64)}, torch.float32, {"w": layer}
    )
    exact = rounded.astype(np.float64) @ layer.dequantize().astype(np.float64).T
    for part in (None, (3, 17)):
        out = ops.linear(torch.from_numpy(x), "w", part).numpy()
        expected = exact if part is None else exact[:, slice(*part)]
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4 * np.abs(exact).max())
        plain = (x @ weight.T)[:, slice(*(part or (0, 24)))]
        assert np.linalg.norm(out - plain) > 1e-3 * np.linalg.norm(plain)
    np.testing.assert_array_equal(ops.linear(torch.from_numpy(x), "other").numpy(), x)


def test_result_has_the_models_dtype(tmp_path: Path) -> None:
    layer = write_linear(tmp_path / "w.safetensors", "fp8", values(16, 32), 0.1)
    ops = QuantizedOps({"w": torch.zeros(16, 32)}, torch.bfloat16, {"w": layer})
    assert ops.linear(torch.ones(2, 32, dtype=torch.bfloat16), "w").dtype == torch.bfloat16


def test_fp8_attention_is_softmax_attention_of_rounded_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 32, generator=generator) for n in (1500, 70, 70))
    scales = AttentionScales(fp8_scale(8.0), fp8_scale(6.0), fp8_scale(7.0))
    ops = QuantizedOps({"w": torch.zeros(1)}, torch.float32, {}, {"transformer_blocks.0": scales})
    with pytest.raises(KeyError):
        ops.attention(q, k, v)  # in no block
    ops.weights = {"transformer_blocks.0.attn.to_q.weight": torch.eye(4)}
    ops.linear(torch.eye(4), "transformer_blocks.0.attn.to_q.weight")
    out = ops.attention(q, k, v)
    assert out.shape == (2, 1500, 96)
    rounded = [
        torch.from_numpy(dequantize_fp8(quantize_fp8(x.numpy(), s), s)).double()
        for x, s in ((q, scales.q), (k, scales.k), (v, scales.v))
    ]
    scores = torch.einsum("bqhd,bkhd->bhqk", rounded[0], rounded[1]) / 32**0.5
    weights = scores.softmax(-1)
    held = dequantize_fp8(quantize_fp8(weights.float().numpy(), 1 / 448), 1 / 448)
    expected = torch.einsum("bhqk,bkhd->bqhd", torch.from_numpy(held).double(), rounded[2])
    difference = (out - expected.flatten(2)).norm() / expected.norm()
    assert difference < 1e-3  # a weight now and then rounds the other way
    exact = TorchOps(ops.weights, torch.float32).attention(q, k, v)
    error = (out - exact).norm() / exact.norm()
    assert 0.01 < error < 0.1
    plain = QuantizedOps(ops.weights, torch.float32, {}).attention(q, k, v)
    assert torch.equal(plain, exact)
