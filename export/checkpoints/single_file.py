"""The transformer out of one safetensors file, under diffusers' names, without copying it.

Files of Black Forest Labs hold the same numbers as a diffusers folder under other names (source of
the names: black-forest-labs/flux2, `src/flux2/model.py`). Two things are laid out differently:

- q, k and v of a double block are one tensor, so that each is a range of its rows;
- the last modulation holds shift before scale, diffusers' `norm_out` scale before shift: its two
  halves change places (diffusers: `scripts/convert_flux2_to_diffusers.py`). This is the one tensor
  that has to be written anew.

Files with diffusers' own names, or with q, k and v apart, are read too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klein_kv.artifacts.config import TransformerConfig
from klein_kv.artifacts.weights import WeightRef, map_weight
from klein_kv.errors import CheckpointError
from klein_kv.export.checkpoints.quantized_files import Fp8Weight, Nvfp4Weight, read_weights
from klein_kv.networks.transformer import transformer_parameters

__all__ = ["JoinedRows", "StoredWeight", "bfl_rows", "read_single_file"]

StoredWeight = WeightRef | Fp8Weight | Nvfp4Weight
"""A tensor as a file holds it."""

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")
_WHOLE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "proj_out": "final_layer.linear",
}
_DOUBLE = {
    "attn.to_out.0.weight": "img_attn.proj.weight",
    "attn.to_add_out.weight": "txt_attn.proj.weight",
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "ff.linear_in.weight": "img_mlp.0.weight",
    "ff.linear_out.weight": "img_mlp.2.weight",
    "ff_context.linear_in.weight": "txt_mlp.0.weight",
    "ff_context.linear_out.weight": "txt_mlp.2.weight",
}
_SINGLE = {
    "attn.to_qkv_mlp_proj.weight": "linear1.weight",
    "attn.to_out.weight": "linear2.weight",
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
}
_QKV = (
    ("img_attn", ("to_q", "to_k", "to_v")),
    ("txt_attn", ("add_q_proj", "add_k_proj", "add_v_proj")),
)

Rows = tuple[str, int, int]
"""Name of a tensor and a range of its rows."""


@dataclass(frozen=True, slots=True)
class JoinedRows:
    """A tensor made of ranges of rows that do not follow each other in the file."""

    parts: tuple[StoredWeight, ...]

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
                pieces.append(
                    map_weight(part)[low:high]
                    if isinstance(part, WeightRef)
                    else part.read(low, high)
                )
            first += part.shape[0]
        return np.concatenate(pieces)


def bfl_rows(config: TransformerConfig) -> dict[str, tuple[Rows, ...]]:
    """For each diffusers name, the rows of the Black Forest Labs tensors that it is made of."""
    dim = config.inner_dim
    table: dict[str, tuple[Rows, ...]] = {}
    whole: dict[str, str] = {f"{ours}.weight": f"{bfl}.weight" for ours, bfl in _WHOLE.items()}
    for i in range(config.num_layers):
        ours, bfl = f"transformer_blocks.{i}", f"double_blocks.{i}"
        whole |= {f"{ours}.{name}": f"{bfl}.{source}" for name, source in _DOUBLE.items()}
        for stream, names in _QKV:
            for part, name in enumerate(names):
                rows = (f"{bfl}.{stream}.qkv.weight", part * dim, (part + 1) * dim)
                table[f"{ours}.attn.{name}.weight"] = (rows,)
    for i in range(config.num_single_layers):
        ours, bfl = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        whole |= {f"{ours}.{name}": f"{bfl}.{source}" for name, source in _SINGLE.items()}
    shapes = transformer_parameters(config)
    table |= {ours: ((bfl, 0, shapes[ours][0]),) for ours, bfl in whole.items()}
    last = "final_layer.adaLN_modulation.1.weight"
    table["norm_out.linear.weight"] = ((last, dim, 2 * dim), (last, 0, dim))
    return table


def read_single_file(path: Path, config: TransformerConfig) -> dict[str, StoredWeight | JoinedRows]:
    """Finds every tensor of the transformer in one file; no weight is read.

    Args:
        path: a safetensors file, bf16 (or another float), fp8 or nvfp4.
        config: the transformer's configuration, from the base checkpoint.

    Returns:
        Tensors by diffusers' names.

    Raises:
        CheckpointError: not a whole safetensors file; missing, unexpected or misshapen tensors.
    """
    stored = _without_prefix(read_weights(path))
    shapes = transformer_parameters(config)
    table: dict[str, tuple[Rows, ...]] = {name: ((name, 0, shapes[name][0]),) for name in shapes}
    if "x_embedder.weight" not in stored:
        table = bfl_rows(config)
        _take_split_qkv(table, stored, config)
    _check_names(path, table, stored)
    found: dict[str, StoredWeight | JoinedRows] = {}
    for name, shape in shapes.items():
        parts = tuple(_rows(stored[source], start, stop) for source, start, stop in table[name])
        found[name] = parts[0] if len(parts) == 1 else JoinedRows(parts)
        if found[name].shape != shape:
            raise CheckpointError(
                f"{path}: {name} has shape {found[name].shape}, expected {shape} from the base "
                "checkpoint's transformer/config.json; take the base of the same model size"
            )
    return found


def _without_prefix(stored: Mapping[str, StoredWeight]) -> dict[str, StoredWeight]:
    for prefix in _PREFIXES:
        if stored and all(name.startswith(prefix) for name in stored):
            return {name.removeprefix(prefix): weight for name, weight in stored.items()}
    return dict(stored)


def _take_split_qkv(
    table: dict[str, tuple[Rows, ...]],
    stored: Mapping[str, StoredWeight],
    config: TransformerConfig,
) -> None:
    """Points q, k and v at tensors of their own where a file has those, block by block."""
    for i in range(config.num_layers):
        for stream, names in _QKV:
            for name, short in zip(names, ("to_q", "to_k", "to_v"), strict=True):
                source = f"double_blocks.{i}.{stream}.{short}.weight"
                if source in stored:
                    rows = (source, 0, config.inner_dim)
                    table[f"transformer_blocks.{i}.attn.{name}.weight"] = (rows,)


def _check_names(
    path: Path, table: Mapping[str, tuple[Rows, ...]], stored: Mapping[str, StoredWeight]
) -> None:
    ends: dict[str, int] = {}
    for source, _, stop in (rows for entry in table.values() for rows in entry):
        ends[source] = max(ends.get(source, 0), stop)
    missing = [name for name in ends if name not in stored]
    extra = [name for name in stored if name not in ends]
    if missing or extra:
        raise CheckpointError(
            f"{path}: its tensors are not those of a FLUX.2 [klein] transformer of the base "
            f"checkpoint's size: {len(missing)} missing{_some(missing)}, {len(extra)} "
            f"unexpected{_some(extra)}"
        )
    for name, end in ends.items():
        if not stored[name].shape or stored[name].shape[0] != end:
            raise CheckpointError(
                f"{path}: {name} has shape {stored[name].shape}, expected {end} rows from the base "
                "checkpoint's transformer/config.json; take the base of the same model size"
            )


def _some(names: list[str]) -> str:
    return " (" + ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") + ")" if names else ""


def _rows(weight: StoredWeight, start: int, stop: int) -> StoredWeight:
    return weight if (start, stop) == (0, weight.shape[0]) else weight.rows(start, stop)
