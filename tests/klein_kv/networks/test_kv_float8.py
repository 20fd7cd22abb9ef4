"""Keys and values in eight bits: what rounding them does, computed and exported alike."""

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from klein_kv.artifacts.signature import Signature, TensorSpec
from klein_kv.export.graphs.onnx_ops import OnnxOps
from klein_kv.networks.kv_float8 import dequantize_references, quantize_references
from klein_kv.networks.torch_ops import TorchOps


def there_and_back(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ops = TorchOps({}, x.dtype)
    values, scale = ops.quantize_kv(x)
    return values, scale, ops.dequantize_kv(values, scale)


def heads_of_all_sizes(tokens: int, seed: int = 0) -> NDArray[np.float32]:
    """[1, R, 6, 32]: the last two heads are zeros, and one value all over."""
    x = np.random.default_rng(seed).standard_normal((1, tokens, 6, 32), np.float32)
    x *= np.float32([1e-30, 1, 30, 1e4, 0, 0])[:, None]
    x[:, :, 5] = -3.3
    return x


def test_rounding_keeps_four_bits_and_the_sign() -> None:
    x = torch.from_numpy(heads_of_all_sizes(50))
    values, scale, back = there_and_back(x)
    held = (values.dtype, scale.dtype, back.dtype)
    assert held == (torch.float8_e4m3fn, torch.float32, torch.float32)
    assert (values.shape, scale.shape) == (x.shape, (1, 1, 6, 1))
    largest = x.abs().amax((1, 3), keepdim=True)
    # Half a unit in the last place of a 4-bit significand, or of the smallest subnormal.
    bound = torch.maximum(x.abs() / 16, largest / 448 * 2**-10)
    assert bool(((back - x).abs() <= bound * 1.001).all())
    assert float(back[:, :, 4].abs().max()) == 0
    torch.testing.assert_close(back[:, :, 5], x[:, :, 5], rtol=1e-6, atol=0)
    # The largest value of a head is kept, whatever the others are.
    torch.testing.assert_close(back.abs().amax((1, 3), keepdim=True), largest, rtol=1e-6, atol=0)


@given(st.floats(2.0**-100, 3e38), st.integers(0, 2**32 - 1))
def test_nothing_overflows_or_vanishes(magnitude: float, seed: int) -> None:
    x = np.random.default_rng(seed).uniform(-1, 1, (1, 3, 2, 8)).astype(np.float32)
    wide = torch.from_numpy(x) * magnitude
    values, _, back = there_and_back(wide)
    assert bool(torch.isfinite(values.float()).all())
    assert float((back - wide).abs().max()) <= float(wide.abs().max()) / 16 * 1.001


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tokens(dtype: torch.dtype) -> None:
    values, scale, back = there_and_back(torch.zeros(1, 0, 4, 8, dtype=dtype))
    assert values.shape == back.shape == (1, 0, 4, 8)
    assert back.dtype == dtype
    assert bool((scale > 0).all())


def test_order_is_that_of_the_signature() -> None:
    ops, rng = TorchOps({}, torch.float32), np.random.default_rng(0)
    kv = [torch.from_numpy(rng.standard_normal((1, 5, 2, 4), np.float32)) for _ in range(4)]
    packed = quantize_references(ops, kv)
    assert [x.dtype for x in packed] == 4 * [torch.float8_e4m3fn, torch.float32]
    for mine, other in zip(dequantize_references(ops, packed), kv, strict=True):
        torch.testing.assert_close(mine, other, rtol=1 / 15, atol=1e-3)


def session(dtype: str) -> Any:
    """x -> values, scale, and what they stand for."""
    shape, scale = (1, "ref_tokens", 6, 32), (1, 1, 6, 1)
    signature = Signature(
        "kv",
        (TensorSpec("x", dtype, shape),),
        (
            TensorSpec("values", "float8_e4m3fn", shape),
            TensorSpec("scale", "float32", scale),
            TensorSpec("back", dtype, shape),
        ),
    )
    ops = OnnxOps(signature, dtype, {})
    packed = ops.quantize_kv(ops.inputs["x"])
    model = ir.to_proto(ops.model([*packed, ops.dequantize_kv(*packed)], ""))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )


@pytest.mark.parametrize("tokens", [0, 1, 77])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_exported_operations_compute_the_same_bits(dtype: str, tokens: int) -> None:
    x = heads_of_all_sizes(tokens).astype(dtype)
    binding = (running := session(dtype)).io_binding()
    binding.bind_cpu_input("x", x)
    for name in ("values", "scale", "back"):
        binding.bind_output(name, "cpu")
    running.run_with_iobinding(binding)
    values, scale, back = (value.numpy() for value in binding.get_outputs())
    expected = there_and_back(torch.from_numpy(x))
    np.testing.assert_array_equal(values, expected[0].view(torch.uint8).numpy())
    np.testing.assert_array_equal(scale, expected[1].numpy())
    np.testing.assert_array_equal(back, expected[2].numpy())
    # And so does the type that holds them on the host.
    held = values.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(held, expected[0].float().numpy())
