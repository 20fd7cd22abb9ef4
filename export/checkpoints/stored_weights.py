"""Tensors as a checkpoint's files hold them: whole, quantized, in pieces, or to be merged."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klein_kv.artifacts.weights import WeightRef, map_weight
from klein_kv.export.checkpoints.quantized_files import FileWeight
from klein_kv.runtime.lora.changes import WeightedChanges, apply_changes

__all__ = ["JoinedRows", "MergedWeight", "StoredWeight", "read_rows", "stored_parts"]


@dataclass(frozen=True, slots=True)
class JoinedRows:
    """A tensor made of ranges of rows that do not follow each other in the file."""

    parts: tuple[FileWeight, ...]

    @property
    def dtype(self) -> str:
        """Type of the rows."""
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows of all parts, features of each."""
        return sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:]

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Rows `start` to `stop` (exclusive)."""
        pieces, first = [], 0
        for part in self.parts:
            low, high = max(start - first, 0), min(stop - first, part.shape[0])
            if low < high:
                pieces.append(read_rows(part, low, high))
            first += part.shape[0]
        return np.concatenate(pieces)


@dataclass(frozen=True, slots=True, eq=False)
class MergedWeight:
    """A tensor with adapters merged into it, for artifacts that hold them for good."""

    weight: "StoredWeight"
    changes: WeightedChanges

    @property
    def dtype(self) -> str:
        """Type of the tensor in the checkpoint."""
        return self.weight.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.weight.shape

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows `start` to `stop` (exclusive) of the merged tensor, float32."""
        return _merged(self)[start:stop]


@functools.lru_cache(maxsize=1)  # a tensor is read in pieces, one after the other
def _merged(merged: MergedWeight) -> NDArray[np.float32]:
    own = read_rows(merged.weight, 0, merged.shape[0])
    return apply_changes(own.astype(np.float32), merged.changes)


StoredWeight = FileWeight | JoinedRows | MergedWeight
"""A tensor as files hold it."""


def stored_parts(weight: StoredWeight) -> tuple[WeightRef, ...]:
    """Where its numbers lie in files, as they lie there."""
    if isinstance(weight, MergedWeight):
        return stored_parts(weight.weight)
    parts = weight.parts if isinstance(weight, JoinedRows) else (weight,)
    return tuple(part if isinstance(part, WeightRef) else part.numbers for part in parts)


def read_rows(weight: StoredWeight, start: int, stop: int) -> NDArray[Any]:
    """Rows `start` to `stop` (exclusive); quantized ones in float32."""
    if isinstance(weight, WeightRef):
        return np.atleast_1d(map_weight(weight))[start:stop]
    return weight.read(start, stop)
