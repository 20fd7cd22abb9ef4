"""A checkpoint's tensor with adapters merged into it, for artifacts that hold them for good."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klein_kv.runtime.lora.changes import TensorChange

__all__ = ["MergedWeight"]


@dataclass(frozen=True, slots=True, eq=False)
class MergedWeight:
    """What adapters make of a tensor.

    Attributes:
        dtype: type of the tensor in the checkpoint.
        shape: of the tensor.
        parts: where it lies; each has a `path` and a `shape`.
        read_own: reads all of it, any floating point type.
        changes: what is merged in, each at its strength, in order.
    """

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Any, ...]
    read_own: Callable[[], NDArray[Any]]
    changes: tuple[tuple[TensorChange, float], ...]

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows `start` to `stop` (exclusive) of the merged tensor, float32."""
        return _merged(self)[start:stop]


@functools.lru_cache(maxsize=1)  # a tensor is read in pieces, one after the other
def _merged(weight: MergedWeight) -> NDArray[np.float32]:
    values: NDArray[np.float32] = weight.read_own().astype(np.float32)
    for change, strength in weight.changes:
        values = change.apply(values, strength)
    return values
