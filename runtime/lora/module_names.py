"""Which rows of which of our tensors a module of a LoRA file changes: an exact table of names.

Files name modules as diffusers' `Flux2Transformer2DModel` or as Black Forest Labs do, with dots or
with underscores in their place. Every such name is written down here; none is taken apart.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

from klein_kv.networks.transformer_names import bfl_rows

__all__ = ["Piece", "module_table", "without_prefix"]

_PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "base_model.model.",
    "transformer.",
    "unet.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)


class Piece(NamedTuple):
    """Rows `source` (start, stop) of a module's change are for rows `target` of a tensor."""

    tensor: str
    source: tuple[int, int]
    target: tuple[int, int]


def without_prefix(name: str) -> str:
    """The name of a module without what the writers of files put before it."""
    while prefix := next((prefix for prefix in _PREFIXES if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    return name


def module_table(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[Piece, ...]]:
    """For each name that a file may give a module, the rows of our tensors that it changes.

    Args:
        shapes: names and shapes of `transformer_parameters`.
    """
    table: dict[str, tuple[Piece, ...]] = {}
    for name, (rows, *_) in shapes.items():
        table[name.removesuffix(".weight")] = (Piece(name, (0, rows), (0, rows)),)
    for name, parts in bfl_rows(shapes).items():
        end = 0
        for source, start, stop in parts:
            piece = Piece(name, (start, stop), (end, end + stop - start))
            end = piece.target[1]
            module = source.removesuffix(".weight").removesuffix(".scale")
            table[module] = (*table.get(module, ()), piece)
            if source.endswith(".scale"):
                table[source] = (piece,)
            elif source.endswith("qkv.weight"):  # OneTrainer: q, k and v apart
                number = start // (stop - start)
                table[f"{module}.{number}"] = (Piece(name, piece.target, piece.target),)
            elif source.endswith("linear1.weight"):  # OneTrainer: q, k, v and the MLP apart
                dim = shapes[name][1]
                bounds = (0, dim, 2 * dim, 3 * dim, stop)
                for number, (low, high) in enumerate(pairwise(bounds)):
                    table[f"{module}.{number}"] = (Piece(name, (0, high - low), (low, high)),)
    return {name.replace(".", "_"): pieces for name, pieces in table.items()} | table
