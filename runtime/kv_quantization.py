"""Keys and values in eight bits, for keeping: float8 e4m3 with one scale per head.

Four times as many references fit into the same memory or file as in float32. The loss is that of a
4-bit significand; what it does to the latents is in docs/references.md. Graphs compute on what
`dequantize_kv` gives back.
"""

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

__all__ = ["dequantize_kv", "quantize_kv"]

_LARGEST = 448.0
"""Largest finite e4m3 value (OCP 8-bit floating point specification, table 1)."""
_TABLE = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
"""Value of each byte: looking it up takes a quarter of the time that the conversion takes."""


def quantize_kv(
    array: NDArray[np.floating],
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Bytes of e4m3 values and the scales to multiply them with.

    Args:
        array: k or v of one block, [1, R, H, D].

    Returns:
        uint8 [1, R, H, D] and float32 [H].
    """
    wide = np.asarray(array, np.float32)
    largest = np.max(np.abs(wide), axis=(0, 1, 3), initial=0.0)
    scale = np.where(largest > 0, largest / np.float32(_LARGEST), 1).astype(np.float32)  # [H]
    # Dividing may round above the largest value, which e4m3 would turn into NaN.
    scaled = np.clip(wide / scale[:, None], -_LARGEST, _LARGEST)
    return scaled.astype(ml_dtypes.float8_e4m3fn).view(np.uint8), scale


def dequantize_kv(
    packed: NDArray[np.uint8], scale: NDArray[np.float32], dtype: np.dtype[np.floating]
) -> NDArray[np.floating]:
    """What `quantize_kv` packed, [1, R, H, D] in `dtype`."""
    wide: NDArray[np.floating] = _TABLE[packed]
    wide *= scale[:, None]
    return wide.astype(dtype, copy=False)
