"""Reference keys and values in eight bits: float8 e4m3 with one scale per head and tensor.

Graphs with `kv_dtype` "float8_e4m3fn" hand keys and values on like this: half the bytes of 16 bits.
A scale is dynamic, the largest magnitude of its head over all tokens and channels by the largest
e4m3 value; so no calibration is needed, and nothing is clipped. The loss is that of a significand
of four bits: docs/references.md tells what it does to the latents.

The reference stream attends to its own keys and values as they were computed; only what leaves it
is rounded. `first_step` denoises on what it hands on, not on what it rounded: so it gives the bits
that `encode_references` and `cached_step` give.
"""

from collections.abc import Sequence
from typing import TypeVar

from klein_kv.networks.ops import Ops

__all__ = ["SMALLEST_SCALE", "dequantize_references", "quantize_references"]

T = TypeVar("T")

SMALLEST_SCALE = 2.0**-126
"""Scale of heads that hold zeros alone, or nothing (R = 0): the smallest normal float32."""


def quantize_references(ops: Ops[T], kv: Sequence[T]) -> list[T]:
    """Keys and values [1, R, H, D] as graphs hand them on, the scale [1, 1, H, 1] behind each."""
    return [part for tensor in kv for part in ops.quantize_kv(tensor)]


def dequantize_references(ops: Ops[T], packed: Sequence[T]) -> list[T]:
    """Keys and values as `denoise` takes them, from what `quantize_references` returned."""
    return [
        ops.dequantize_kv(values, scale)
        for values, scale in zip(packed[::2], packed[1::2], strict=True)
    ]
