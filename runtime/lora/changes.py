"""What one adapter does to one tensor: small factors, and the weight that they make of another.

Factors stay as they are stored (a file's are mapped); a full matrix is made while a change is
applied and for one tensor only. The formulas are those of the programs that train the files:
PEFT 0.21 (`tuners/lora`), LyCORIS 4.1 (`modules/locon.py`, `loha.py`, `lokr.py`, `full.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Matrix", "TensorChange", "WeightedChanges", "apply_changes", "as_product"]

_ROWS = 64  # that a product is made of at a time

Matrix = tuple[NDArray[Any], ...]
"""One array, or the two factors [m, r] and [r, n] of a product."""


@dataclass(frozen=True, slots=True, eq=False)
class TensorChange:
    """One change of one tensor.

    Attributes:
        kind: "LoRA" (a product), "LoKr" (the Kronecker product of two matrices), "LoHa" (their
            elementwise product), "full" (a difference) or "set" (the new weight itself).
        matrices: one, or the two that "LoKr" and "LoHa" combine.
        scale: what the combined matrix is multiplied by before it is added.
        source: rows of the combined matrix that are taken: a file may hold q, k and v as one.
        target: rows of the tensor that they change.
        magnitude: DoRA: norms of the new weight's rows [rows, 1] or columns [1, columns].
    """

    kind: str
    matrices: tuple[Matrix, ...]
    scale: float
    source: tuple[int, int]
    target: tuple[int, int]
    magnitude: NDArray[np.float32] | None = None

    @property
    def rank(self) -> int | None:
        """The inner dimension of two factors whose product is added; None of any other change."""
        if self.kind != "LoRA" or self.magnitude is not None:
            return None
        return len(self.matrices[0][1])

    def apply(self, weight: NDArray[np.float32], strength: float) -> NDArray[np.float32]:
        """The weight [out, in] (or [n]) with the change at a strength; a new array, float32.

        0 gives the weight back bit for bit. What replaces or renormalises a weight goes as far from
        the old to the new one as the strength says (as ComfyUI's `weight_decompose` does; LyCORIS
        and PEFT agree with it at 1 alone).
        """
        out = np.array(weight, np.float32)
        if strength == 0:
            return out
        rows = out[self.target[0] : self.target[1]]
        if self.rank is not None:  # some rows at a time: the sum stays in the cache
            up, down = self.factors(strength)
            for start in range(0, len(rows), _ROWS):
                rows[start : start + _ROWS] += up[start : start + _ROWS] @ down
            return out
        new = self.dense()
        if self.kind != "set":
            new *= np.float32(self.scale if self.magnitude is not None else self.scale * strength)
            if self.magnitude is None:
                rows += new
                return out
            new += rows
            axis = 1 if self.magnitude.shape[1] == 1 else 0
            norm = np.sqrt(np.square(new).sum(axis, keepdims=True, dtype=np.float64))
            new *= (self.magnitude / (norm + np.finfo(np.float32).eps)).astype(np.float32)
        new -= rows
        new *= np.float32(strength)
        rows += new
        return out

    def factors(self, strength: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The factors of a product that is added: [rows of `target`, r], scaled, and [r, in]."""
        up, down = (np.asarray(factor, np.float32) for factor in self.matrices[0])
        return up[slice(*self.source)] * np.float32(self.scale * strength), down

    def dense(self) -> NDArray[np.float32]:
        """The rows `source` of the combined matrix, without the scale; a new array, float32."""
        start, stop = self.source
        if self.kind == "LoKr":
            left, right = (_product(matrix) for matrix in self.matrices)
            height = len(right)  # row i * height + k is the Kronecker product of row i and row k
            first, last = start // height, -(-stop // height)
            whole = np.kron(left[first:last], right)
            return whole[start - first * height : stop - first * height]
        first_matrix, *others = (_product(matrix, start, stop) for matrix in self.matrices)
        for other in others:  # LoHa
            first_matrix *= other
        return first_matrix


WeightedChanges = Sequence[tuple[TensorChange, float]]
"""Changes of one tensor, each at its strength, in order."""


def apply_changes(weight: NDArray[np.float32], changes: WeightedChanges) -> NDArray[np.float32]:
    """The weight with one change after the other; the caller refuses what is not finite then."""
    with np.errstate(over="ignore", invalid="ignore"):
        for change, strength in changes:
            weight = change.apply(weight, strength)
    return weight


def as_product(
    changes: WeightedChanges, rows: int, ranks: Sequence[int]
) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """The factors of changes that are products, together: [rows, r] and [r, in].

    They are padded with zeros to one of the ranks, of which the last suffices. None where the
    product might not be finite.
    """
    parts = [(change.target, *change.factors(strength)) for change, strength in changes]
    total = sum(len(down) for _, _, down in parts)
    rank = next(rank for rank in ranks if rank >= total)
    up = np.zeros((rows, rank), np.float32)
    down = np.zeros((rank, parts[0][2].shape[1]), np.float32)
    start = 0
    for target, left, right in parts:
        stop = start + len(right)
        up[target[0] : target[1], start:stop], down[start:stop] = left, right
        start = stop
    with np.errstate(over="ignore"):
        norms = float(np.linalg.norm(up)), float(np.linalg.norm(down))
    bound = norms[0] * norms[1]  # of any number of the product
    return (up, down) if bound < np.finfo(np.float32).max / 2 else None


def _product(matrix: Matrix, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
    """Rows of a matrix; a new array, float32."""
    first, *second = matrix
    rows = np.array(first[start:stop], np.float32)
    return rows @ np.asarray(second[0], np.float32) if second else rows
