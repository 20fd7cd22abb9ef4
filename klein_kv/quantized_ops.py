"""`TorchOps` with quantized linear layers, simulated: the reference for fp8 and nvfp4 kernels.

Weights are what their numbers stand for, activations are rounded to the numbers that a kernel would
multiply, and the product is taken in float32. So the result differs from a kernel's by the order
of its sums alone, and quality can be measured without a GPU.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from klein_kv.quantization import BLOCK, FP4_MAX, FP8_MAX, QuantizedLinear
from klein_kv.torch_ops import TorchOps

__all__ = ["QuantizedOps", "round_to_fp8", "round_to_nvfp4"]


class QuantizedOps(TorchOps):
    """Runs `model.py` and `text_model.py` with some linear layers quantized.

    Args:
        weights: the checkpoint's tensors, on the device to compute on.
        dtype: type of the activations between layers.
        quantized: quantized layers by weight name; the others are computed as they are.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
        quantized: Mapping[str, QuantizedLinear],
    ) -> None:
        super().__init__(weights, dtype)
        self.quantized = quantized

    def linear(
        self, rows: torch.Tensor, weight: str, part: tuple[int, int] | None = None
    ) -> torch.Tensor:
        layer = self.quantized.get(weight)
        if layer is None:
            return super().linear(rows, weight, part)
        if part is not None:
            layer = layer.rows(*part)
        x = round_activations(rows, layer)
        w = torch.from_numpy(layer.dequantize()).to(x.device)
        return F.linear(x, w).to(self.dtype)


def round_activations(rows: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
    """What a kernel of this layer's format reads instead of `rows`, float32."""
    if layer.input_scale is None:
        return rows.float()
    if layer.format == "fp8":
        return round_to_fp8(rows, layer.input_scale)
    return round_to_nvfp4(rows, layer.input_scale)


def round_to_fp8(x: torch.Tensor, scale: float) -> torch.Tensor:
    """`quantization.quantize_fp8`, then `dequantize_fp8`: float32 of the same shape."""
    return _round_e4m3(x.float() / _like(scale, x)) * _like(scale, x)


def round_to_nvfp4(x: torch.Tensor, scale: float) -> torch.Tensor:
    """`quantization.quantize_nvfp4`, then `dequantize_nvfp4`: float32 of the same shape.

    Args:
        x: [..., K], K a multiple of 16; block scales follow from its values.
        scale: the tensor's scale.
    """
    blocks = x.float().reshape(*x.shape[:-1], -1, BLOCK)
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    steps = _round_e4m3(largest / FP4_MAX / _like(scale, x)) * _like(scale, x)
    numbers = _round_e2m1(blocks / torch.where(steps == 0, 1, steps))
    return (numbers * steps).flatten(-2)


def _like(scale: float, x: torch.Tensor) -> torch.Tensor:
    # A Python number would divide in float64 on some devices; the formats are float32's.
    return torch.tensor(scale, dtype=torch.float32, device=x.device)


def _round_e4m3(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()


def _round_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Nearest e2m1 number, ties to even.

    From 1 on, neighbours are half a power of two apart, below 1 they are 0.5 apart. Even codes are
    even multiples of that distance, which is how torch rounds.
    """
    x = x.clamp(-FP4_MAX, FP4_MAX)
    power = (x.contiguous().view(torch.int32) & 0x7F800000).view(torch.float32)  # 2**exponent
    spacing = (power * 0.5).clamp(min=0.5)
    return torch.round(x / spacing) * spacing
