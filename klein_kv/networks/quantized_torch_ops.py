"""`TorchOps` with quantized layers and attention, simulated: the reference for such kernels.

Weights are what their numbers stand for, activations are rounded to the numbers that a kernel would
multiply, and the product is taken in float32. So the result differs from a kernel's by the order
of its sums alone, and quality can be measured without a GPU.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from klein_kv.artifacts.attention_scales import AttentionScales
from klein_kv.artifacts.numbers import BLOCK, FP4_MAX, FP8_MAX, QuantizedLinear
from klein_kv.networks.torch_ops import TorchOps

__all__ = ["QuantizedOps", "fp8_attention", "round_to_fp8", "round_to_nvfp4"]

_QUERIES = 1024  # at a time: the scores of all would take gigabytes


class QuantizedOps(TorchOps):
    """Runs the networks with some linear layers quantized, by weight name.

    `attention` are the scales of attention in float8, by block; None computes it as it is.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype,
        quantized: Mapping[str, QuantizedLinear],
        attention: Mapping[str, AttentionScales] | None = None,
    ) -> None:
        super().__init__(weights, dtype)
        self.quantized = quantized
        self.attention_scales = attention
        self._block = ""

    def linear(self, rows: Tensor, weight: str, part: tuple[int, int] | None = None) -> Tensor:
        self._block = ".".join(weight.split(".")[:2])
        layer = self.quantized.get(weight)
        if layer is None:
            return super().linear(rows, weight, part)
        if part is not None:
            layer = layer.rows(*part)
        x = round_activations(rows, layer)
        w = torch.from_numpy(layer.dequantize()).to(x.device)
        return F.linear(x, w).to(self.dtype)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.attention_scales is None:
            return super().attention(q, k, v, mask)
        scales = self.attention_scales[self._block]
        q, k, v = (
            round_to_fp8(x, scale) for x, scale in ((q, scales.q), (k, scales.k), (v, scales.v))
        )
        return fp8_attention(q, k, v).to(self.dtype)


def fp8_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention with the softmax rounded to e4m3 at scale 1 / 448, its largest value 1.

    float32 [B, S, H, D] to [B, S, H * D]. A fused kernel rounds before it divides by the sum, block
    by block of keys; that order is its own affair and not simulated.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.empty_like(q)
    for head in range(q.shape[1]):
        for start in range(0, q.shape[2], _QUERIES):
            rows = slice(start, start + _QUERIES)
            scores = q[:, head, rows] @ k[:, head].transpose(1, 2) * q.shape[-1] ** -0.5
            weights = round_to_fp8(scores.softmax(dim=-1), 1 / FP8_MAX)
            out[:, head, rows] = weights @ v[:, head]
    return out.transpose(1, 2).flatten(2)


def round_activations(rows: Tensor, layer: QuantizedLinear) -> Tensor:
    """What a kernel of this layer's format reads instead of `rows`, float32."""
    if layer.input_scale is None:
        return rows.float()
    if layer.format == "fp8":
        return round_to_fp8(rows, layer.input_scale)
    return round_to_nvfp4(rows, layer.input_scale)


def round_to_fp8(x: Tensor, scale: float) -> Tensor:
    """`numbers.quantize_fp8`, then `dequantize_fp8`: float32 of the same shape."""
    return _round_e4m3(x.float() / _like(scale, x)) * _like(scale, x)


def round_to_nvfp4(x: Tensor, scale: float) -> Tensor:
    """`numbers.quantize_nvfp4`, then `dequantize_nvfp4`: float32 [..., K], K a multiple of 16."""
    blocks = x.float().reshape(*x.shape[:-1], -1, BLOCK)
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    steps = _round_e4m3(largest / FP4_MAX / _like(scale, x)) * _like(scale, x)
    numbers = _round_e2m1(blocks / torch.where(steps == 0, 1, steps))
    return (numbers * steps).flatten(-2)


def _like(scale: float, x: Tensor) -> Tensor:
    # A Python number would divide in float64 on some devices; the formats are float32's.
    return torch.tensor(scale, dtype=torch.float32, device=x.device)


def _round_e4m3(x: Tensor) -> Tensor:
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()


def _round_e2m1(x: Tensor) -> Tensor:
    """Nearest e2m1 number, ties to even.

    From 1 on, neighbours are half a power of two apart, below 1 they are 0.5 apart. Even codes are
    even multiples of that distance, which is how torch rounds.
    """
    x = x.clamp(-FP4_MAX, FP4_MAX)
    power = (x.contiguous().view(torch.int32) & 0x7F800000).view(torch.float32)  # 2**exponent
    spacing = (power * 0.5).clamp(min=0.5)
    return torch.round(x / spacing) * spacing
