"""A LoRA merged on the device that weights lie on: `weight + up @ down`, some rows at a time.

Rows come in parts, so that what passes is small and stays in the caches of a GPU; factors are
padded with zeros to ranks that come again, so that a second adapter finds its kernels compiled.
"""

from typing import TypeVar

from klein_kv.networks.ops import MergeOps

__all__ = ["MOST_ROWS", "RANKS", "merge_lora", "rows_at_once"]

T = TypeVar("T")

RANKS = (16, 32, 64, 128, 256, 512)
"""Ranks of the factors, after padding."""

MOST_ROWS = 1024

_MOST_NUMBERS = 1 << 22


def rows_at_once(columns: int) -> int:
    """How many rows of a weight one run takes: a power of two, about 4 million numbers."""
    return min(MOST_ROWS, 1 << max(0, (_MOST_NUMBERS // columns).bit_length() - 1))


def merge_lora(
    ops: MergeOps[T], weight: T, up: T, down: T, largest_before: T, scale: T | None = None
) -> tuple[T, T]:
    """Rows of a weight [rows, columns] with a change added in float32, as the graphs read them.

    `up` [rows, rank] (strengths and scales included) and `down` [rank, columns] are float32.
    `scale` [1] is that of numbers in float8; None for a weight of the model's type.

    Gives the rows in the model's type, or `rows / scale` in float8; and their largest magnitude,
    float32 [1], or `largest_before`, that of the rows before: it tells whether they fit there.
    """
    merged = ops.add(ops.to_float32(weight), ops.product(up, down))
    largest = ops.largest(merged, largest_before)
    if scale is None:
        return ops.to_model_dtype(merged), largest
    return ops.round_to_float8(merged, scale), largest
