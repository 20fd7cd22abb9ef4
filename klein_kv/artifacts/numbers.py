"""fp8 and nvfp4 numbers: what a quantized linear layer holds, and the arithmetic of both formats.

fp8     e4m3 numbers with one scale per tensor: `number * scale`. Activations alike, with a scale
        that calibration found: `x / scale`, rounded.
nvfp4   e2m1 numbers in blocks of 16 along the input features. A block has an e4m3 scale, a tensor
        has a float32 one: `number * (block scale * scale)`. Block scales of activations follow
        from their values at run time; the tensor's scale is a constant of calibration.

Rounding is to nearest, ties to even, and saturates. All arithmetic is float32, in the order that
is written here, which is that of two ONNX DequantizeLinear nodes. Sources: OCP "8-bit Floating
Point Specification" and "Microscaling Formats"; NVIDIA, "Introducing NVFP4 for Efficient and
Accurate Low-Precision Inference" (block scale = largest magnitude / 6, tensor scale = largest
magnitude / (448 * 6)).
"""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from klein_kv.artifacts.weights import WeightRef, map_weight
from klein_kv.errors import ArtifactError

__all__ = [
    "BLOCK",
    "FORMATS",
    "FP4_MAX",
    "FP8_MAX",
    "PRECISION_FORMATS",
    "QuantizedLinear",
    "dequantize_fp8",
    "dequantize_nvfp4",
    "fp8_scale",
    "is_block_linear",
    "nvfp4_scale",
    "pack_fp4",
    "quantize_fp8",
    "quantize_nvfp4",
    "unpack_fp4",
]

FORMATS = ("fp8", "nvfp4")
"""Number formats of weights."""

PRECISION_FORMATS = {"fp8": "fp8", "nvfp4": "nvfp4", "fp8-weight-only": "fp8"}
"""What an artifact folder may hold beside its own precision, and the format of the weights."""

BLOCK = 16
"""Numbers that share one block scale in nvfp4."""

FP8_MAX = 448.0
"""Largest finite e4m3 number (OCP 8-bit floating point specification, table 1)."""

FP4_MAX = 6.0
"""Largest e2m1 number."""

_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_E2M1 = np.dtype(ml_dtypes.float4_e2m1fn)
_E2M1_VALUES = np.arange(16, dtype=np.uint8).view(_E2M1).astype(np.float32)
_BLOCKS = ("transformer_blocks.", "single_transformer_blocks.", "model.layers.")


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """A quantized weight matrix [out, in] and what to do with the layer's input."""

    format: str  # one of `FORMATS`
    # float8_e4m3fn [out, in], or float4_e2m1fn [out, in], two numbers per byte, the first in the
    # low half
    weight: WeightRef
    weight_scale: float  # what the numbers (fp8) or the block scales (nvfp4) are multiplied by
    block_scales: WeightRef | None  # nvfp4: float8_e4m3fn [out, in / 16], row by row
    # fp8: activations are `x / input_scale`; nvfp4: the tensor's scale when activations are
    # quantized. None leaves activations as they are.
    input_scale: float | None

    def __post_init__(self) -> None:
        expected = {"fp8": "float8_e4m3fn", "nvfp4": "float4_e2m1fn"}
        if self.weight.dtype != expected.get(self.format) or len(self.weight.shape) != 2:
            raise ArtifactError(
                f"{self.weight.path}: a weight of format {self.format!r} has dtype "
                f"{self.weight.dtype} and shape {self.weight.shape}, expected one of "
                f"{', '.join(FORMATS)} with a matrix of its dtype; quantize again"
            )
        scales = self.block_scales
        rows, columns = self.weight.shape
        if self.format == "nvfp4" and (
            scales is None
            or scales.dtype != "float8_e4m3fn"
            or columns % BLOCK
            or scales.shape != (rows, columns // BLOCK)
        ):
            got = "none" if scales is None else f"{scales.dtype} of shape {scales.shape}"
            raise ArtifactError(
                f"{self.weight.path}: block scales of an nvfp4 weight {self.weight.shape} are "
                f"{got}, expected float8_e4m3fn, one per {BLOCK} numbers of a row; quantize again"
            )
        for name in ("weight_scale", "input_scale"):
            value = getattr(self, name)
            if value is not None and not (np.isfinite(value) and value > 0):
                raise ArtifactError(
                    f"{self.weight.path}: {name} is {value}, expected a positive number; quantize "
                    "again"
                )

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in]."""
        return self.weight.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers and their block scales."""
        return self.weight.nbytes + (0 if self.block_scales is None else self.block_scales.nbytes)

    def rows(self, start: int, stop: int) -> "QuantizedLinear":
        """Output features `start` to `stop` (exclusive); nothing is read."""
        scales = None if self.block_scales is None else self.block_scales.rows(start, stop)
        weight = self.weight.rows(start, stop)
        return QuantizedLinear(self.format, weight, self.weight_scale, scales, self.input_scale)

    def dequantize(self) -> NDArray[np.float32]:
        """What the weight stands for: float32 [out, in]."""
        numbers = map_weight(self.weight)
        if self.block_scales is None:
            return dequantize_fp8(numbers, self.weight_scale)
        return dequantize_nvfp4(numbers, map_weight(self.block_scales), self.weight_scale)


def is_block_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the weight of a linear layer inside a block, by its checkpoint name."""
    return name.startswith(_BLOCKS) and len(shape) == 2


def fp8_scale(amax: float) -> float:
    """Scale with which values up to `amax` in magnitude use the whole of e4m3, a float32 number."""
    return _positive(np.float32(amax) / np.float32(FP8_MAX))


def nvfp4_scale(amax: float) -> float:
    """Scale of a tensor with values up to `amax` in magnitude, a float32 number."""
    return _positive(np.float32(amax) / np.float32(FP8_MAX * FP4_MAX))


def _positive(scale: np.float32) -> float:
    # A tensor of zeros: any scale is right, and 1 divides without a warning.
    return float(scale) if scale > 0 else 1.0


def quantize_fp8(values: NDArray[Any], scale: float) -> NDArray[Any]:
    """Rounds `values / scale` to float8_e4m3; magnitudes over 448 become 448, NaN stays NaN."""
    scaled = np.asarray(values, np.float32) / np.float32(scale)
    numbers: NDArray[Any] = np.clip(scaled, -FP8_MAX, FP8_MAX).astype(_E4M3)
    return numbers


def dequantize_fp8(numbers: NDArray[Any], scale: float) -> NDArray[np.float32]:
    """`numbers * scale` in float32."""
    values: NDArray[np.float32] = numbers.astype(np.float32) * np.float32(scale)
    return values


def quantize_nvfp4(values: NDArray[Any], scale: float) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Rounds blocks of 16 along the last axis of [..., K] to e2m1; `scale` is the tensor's.

    Gives packed numbers uint8 [..., K / 2] and block scales float8_e4m3fn [..., K / 16]. A block
    whose scale rounds to zero becomes zeros.
    """
    blocks = np.asarray(values, np.float32).reshape(*values.shape[:-1], -1, BLOCK)
    largest = np.abs(blocks).max(axis=-1)
    block_scales = quantize_fp8(largest / np.float32(FP4_MAX), scale)
    steps = block_scales.astype(np.float32) * np.float32(scale)
    scaled = np.where((steps == 0)[..., None], np.float32(0), blocks)
    scaled /= np.where(steps == 0, np.float32(1), steps)[..., None]
    numbers = np.clip(scaled, -FP4_MAX, FP4_MAX).astype(_E2M1)
    return pack_fp4(numbers.view(np.uint8).reshape(values.shape)), block_scales


def dequantize_nvfp4(
    packed: NDArray[np.uint8], block_scales: NDArray[Any], scale: float
) -> NDArray[np.float32]:
    """`number * (block scale * scale)` in float32 [..., K], from what `quantize_nvfp4` gave."""
    numbers = _E2M1_VALUES[unpack_fp4(packed)]
    blocks = numbers.reshape(*numbers.shape[:-1], -1, BLOCK)
    steps = block_scales.astype(np.float32) * np.float32(scale)
    values: NDArray[np.float32] = (blocks * steps[..., None]).reshape(numbers.shape)
    return values


def pack_fp4(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """4-bit codes, one per byte [..., K], to two per byte [..., K / 2], the first in the low half.

    As ONNX (FLOAT4E2M1, "IR", external data), TensorRT and safetensors (F4) have it.
    """
    high: NDArray[np.uint8] = np.left_shift(codes[..., 1::2], 4, dtype=np.uint8)
    return codes[..., ::2] | high


def unpack_fp4(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The reverse of `pack_fp4`."""
    codes: NDArray[np.uint8] = np.stack([packed & 15, packed >> 4], axis=-1)
    return codes.reshape(*packed.shape[:-1], -1)
