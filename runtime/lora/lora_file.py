"""Reads a LoRA, from a safetensors file or a dictionary: which of our tensors it changes, and how.

Written by PEFT and diffusers, DiffSynth, ai-toolkit, kohya and musubi-tuner, fal, Black Forest
Labs, OneTrainer, LyCORIS or ComfyUI: LoRA, LoKr, LoHa, each with DoRA; differences, whole weights.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klein_kv.errors import RequestError
from klein_kv.runtime.lora.changes import Matrix, TensorChange, WeightedChanges
from klein_kv.runtime.lora.lora_keys import (
    Piece,
    file_format,
    group_keys,
    likely_model,
    matrix_slots,
    module_table,
    some,
    why_unmatched,
)
from klein_kv.runtime.lora.lora_source import LoraSource, open_lora

__all__ = ["Adapter", "WeightedAdapter", "changes_by_tensor", "describe_lora", "read_adapter"]

_log = logging.getLogger(__name__)
_MAX_RANK = 4096


@dataclass(frozen=True, slots=True)
class Adapter:
    """What one LoRA changes, by our tensor names; several changes of one are of different rows."""

    changes: Mapping[str, tuple[TensorChange, ...]]
    digest: str  # of all that has an effect: the same from a file and from a dictionary
    ignored: tuple[str, ...]  # keys that matched nothing


WeightedAdapter = tuple[Adapter, float]


def changes_by_tensor(adapters: Iterable[WeightedAdapter]) -> dict[str, WeightedChanges]:
    """What adapters at their weights do to each tensor, one adapter after the other."""
    changes: dict[str, list[tuple[TensorChange, float]]] = {}
    for adapter, strength in adapters:
        for tensor, own in adapter.changes.items():
            changes.setdefault(tensor, []).extend((change, strength) for change in own)
    return dict(changes)


def read_adapter(
    source: Path | Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    strict: bool = True,
) -> Adapter:
    """Reads a LoRA for a transformer.

    Args:
        source: a safetensors file, whose tensors are mapped, or arrays or torch tensors by key,
            which are copied.
        shapes: those of `transformer_parameters`.
        strict: refuse keys that match nothing; otherwise they are left out with a warning.

    Raises:
        RequestError: no whole safetensors file; keys that match nothing; tensors of another model,
            of a rank above 4096, or with values that are not finite.
    """
    file = open_lora(source)
    modules, ignored = group_keys(file.tensors, file.name)
    table = module_table(shapes)
    changes: dict[str, list[TensorChange]] = {}
    for module, slots in modules.items():
        if module not in table or slots.keys() <= {"alpha", "magnitude"}:
            ignored += slots.values()
            continue
        for tensor, change in _changes(file, module, slots, table[module], shapes):
            changes.setdefault(tensor, []).append(change)
    _check_ignored(file, ignored, bool(changes), strict)
    _check_overlap(file.name, changes)
    fixed = {tensor: tuple(its) for tensor, its in changes.items()}
    return Adapter(fixed, _digest(fixed), tuple(ignored))


def describe_lora(path: Path) -> dict[str, Any]:
    """What a file's keys and shapes tell without a model; errors as of `read_adapter`."""
    file = open_lora(path)
    modules, _ = group_keys(file.tensors, file.name)
    kinds: Counter[str] = Counter()
    ranks: set[int] = set()
    alphas = set() if file.peft.alpha is None else {file.peft.alpha}
    for module, slots in modules.items():
        if slots.keys() <= {"alpha", "magnitude"}:
            continue
        kind, matrices = matrix_slots(slots, f"{file.name}: {module}")
        kinds[kind] += 1
        if pairs := [pair for pair in matrices if len(pair) == 2]:
            ranks.update(file.array(slots[pairs[-1][0]]).shape[1:2])
            if "alpha" in slots:
                alphas.add(file.number(slots["alpha"]))
    return {
        "format": file_format(list(file.tensors)),
        "keys": len(file.tensors),
        "kinds": dict(kinds),
        "ranks": sorted(ranks),
        "alphas": sorted(alphas),
    }


def _changes(
    file: LoraSource,
    module: str,
    slots: Mapping[str, str],
    pieces: Sequence[Piece],
    shapes: Mapping[str, tuple[int, ...]],
) -> Iterator[tuple[str, TensorChange]]:
    """The change of each tensor that a module's change is cut into."""
    where = f"{file.name}: {module}"
    kind, names = matrix_slots(slots, where)
    matrices = tuple(tuple(file.array(slots[x]) for x in matrix) for matrix in names)
    rows = max(piece.source[1] for piece in pieces)
    expected = (rows, *shapes[pieces[0].tensor][1:])
    got = _combined_shape(where, kind, matrices)
    if got != expected:
        hidden = shapes["norm_out.linear.weight"][1]
        width = next((g for g, e in zip(got, expected, strict=False) if e == hidden), hidden)
        model = likely_model(file.tensors, width if width != hidden else None)
        raise RequestError(
            f"{where} is for a shape of {got}, expected {expected} as of "
            f"{some([piece.tensor for piece in pieces])}{model}; take a LoRA of this model's size"
        )
    scale = 1.0  # that of a LoKr of two whole matrices too, whatever its alpha says (LyCORIS)
    if ranks := [matrix[0].shape[1] for matrix in matrices if len(matrix) == 2]:
        scale = file.peft.scale(module, ranks[-1])
        if "alpha" in slots:
            scale = file.number(slots["alpha"]) / ranks[-1]
    norms = None
    if "magnitude" in slots:
        norms = _magnitude(file, slots["magnitude"], expected, len(pieces))
    for tensor, source, target in pieces:
        part = norms
        if norms is not None and norms.shape[1] == 1:
            part = norms[source[0] : source[1]]
        yield tensor, TensorChange(kind, matrices, scale, source, target, part)


def _combined_shape(where: str, kind: str, matrices: tuple[Matrix, ...]) -> tuple[int, ...]:
    """Shape of what the matrices make together, once they fit each other."""
    for matrix in matrices:
        shapes = [factor.shape for factor in matrix]
        flat = kind in ("full", "set") or all(len(shape) == 2 for shape in shapes)
        if not flat or (len(matrix) == 2 and shapes[0][1] != shapes[1][0]):
            raise RequestError(
                f"{where} has factors of shape {' and '.join(map(str, shapes))}, expected "
                "(rows, rank) and (rank, columns)"
            )
        if len(matrix) == 2 and not 0 < shapes[1][0] <= _MAX_RANK:
            raise RequestError(f"{where} has rank {shapes[1][0]}, expected 1 to {_MAX_RANK}")
    # Of one array, or of the product of two.
    first, *others = ((*matrix[0].shape[:1], *matrix[-1].shape[1:]) for matrix in matrices)
    if kind == "LoKr":
        return first[0] * others[0][0], first[1] * others[0][1]
    if kind == "LoHa" and first != others[0]:
        raise RequestError(f"{where} has two matrices of shape {first} and {others[0]}")
    return first


def _magnitude(
    file: LoraSource, key: str, shape: tuple[int, ...], pieces: int
) -> NDArray[np.float32]:
    """DoRA's norms, [rows, 1] or [1, columns]."""
    norms = np.asarray(file.array(key), np.float32)
    norms = norms[:, None] if norms.ndim == 1 else norms
    if norms.shape not in ((shape[0], 1), (1, shape[1])):
        raise RequestError(
            f"{file.name}: {key} has shape {norms.shape}, expected ({shape[0]}, 1) or "
            f"(1, {shape[1]})"
        )
    if pieces > 1 and len(norms) == 1:
        raise RequestError(
            f"{file.name}: {key} holds norms of columns that reach over several tensors, which are "
            "merged one by one; expected norms of rows, or a file with q, k and v apart"
        )
    return norms


def _check_ignored(file: LoraSource, ignored: list[str], matched: bool, strict: bool) -> None:
    count, total = len(ignored), len(file.tensors)
    if matched and not ignored:
        return
    text = (
        f"{file.name}: {count} of {total} keys match no tensor of the transformer: "
        f"{some(ignored)}{why_unmatched(ignored)}"
    )
    if not matched:
        raise RequestError(f"{text}; nothing is left")
    if strict:
        raise RequestError(f"{text}; strict=False leaves them out")
    _log.warning("%s; they are left out", text)


def _check_overlap(where: str, changes: Mapping[str, Sequence[TensorChange]]) -> None:
    for tensor, its in changes.items():
        ranges = sorted(change.target for change in its)
        if any(stop > start for (_, stop), (start, _) in pairwise(ranges)):
            raise RequestError(f"{where} changes {tensor} twice, under two names; expected once")


def _digest(changes: Mapping[str, Sequence[TensorChange]]) -> str:
    digest = hashlib.sha256()
    for tensor in sorted(changes):
        for change in sorted(changes[tensor], key=lambda change: change.target):
            arrays = [factor for matrix in change.matrices for factor in matrix]
            arrays += [] if change.magnitude is None else [change.magnitude]
            facts = (change.kind, change.scale, change.source, change.target)
            shapes = [array.shape for array in arrays]
            digest.update(f"{tensor} {facts} {shapes}\n".encode())
            for array in arrays:
                digest.update(np.ascontiguousarray(array, np.float32).data)
    return digest.hexdigest()
