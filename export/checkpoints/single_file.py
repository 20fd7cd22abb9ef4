"""The transformer out of one safetensors file, under diffusers' names, without copying it.

Files of Black Forest Labs hold the same numbers as a diffusers folder under other names (source of
the names: black-forest-labs/flux2, `src/flux2/model.py`). Two things are laid out differently:

- q, k and v of a double block are one tensor, so that each is a range of its rows;
- the last modulation holds shift before scale, diffusers' `norm_out` scale before shift: its two
  halves change places (diffusers: `scripts/convert_flux2_to_diffusers.py`). This is the one tensor
  that has to be written anew.

Files with diffusers' own names, or with q, k and v apart, are read too.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klein_kv.artifacts.config import TransformerConfig
from klein_kv.artifacts.weights import WeightRef, map_weight
from klein_kv.errors import CheckpointError
from klein_kv.export.checkpoints.quantized_files import FileWeight, read_weights
from klein_kv.export.checkpoints.weight_index import check_names
from klein_kv.networks.transformer import transformer_parameters

__all__ = ["JoinedRows", "StoredWeight", "read_rows", "read_single_file"]

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

_MODELS = {3072: "klein 4B", 4096: "klein 9B"}
"""Released models by the width of their transformer."""

Rows = tuple[str, int, int]
"""Name of a tensor and a range of its rows."""


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


StoredWeight = FileWeight | JoinedRows
"""A tensor as files hold it."""


def read_rows(weight: StoredWeight, start: int, stop: int) -> NDArray[Any]:
    """Rows `start` to `stop` (exclusive); quantized ones in float32."""
    if isinstance(weight, WeightRef):
        return np.atleast_1d(map_weight(weight))[start:stop]
    return weight.read(start, stop)


def _bfl_rows(config: TransformerConfig, stored: Collection[str]) -> dict[str, tuple[Rows, ...]]:
    """For each diffusers name, the rows of the Black Forest Labs tensors that it is made of."""
    dim = config.inner_dim
    table: dict[str, tuple[Rows, ...]] = {}
    whole: dict[str, str] = {f"{ours}.weight": f"{bfl}.weight" for ours, bfl in _WHOLE.items()}
    for i in range(config.num_layers):
        ours, bfl = f"transformer_blocks.{i}", f"double_blocks.{i}"
        whole |= {f"{ours}.{name}": f"{bfl}.{source}" for name, source in _DOUBLE.items()}
        for stream, names in _QKV:
            for part, (name, short) in enumerate(zip(names, ("to_q", "to_k", "to_v"), strict=True)):
                rows = (f"{bfl}.{stream}.qkv.weight", part * dim, (part + 1) * dim)
                own = f"{bfl}.{stream}.{short}.weight"
                table[f"{ours}.attn.{name}.weight"] = ((own, 0, dim) if own in stored else rows,)
    for i in range(config.num_single_layers):
        ours, bfl = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        whole |= {f"{ours}.{name}": f"{bfl}.{source}" for name, source in _SINGLE.items()}
    shapes = transformer_parameters(config)
    table |= {ours: ((bfl, 0, shapes[ours][0]),) for ours, bfl in whole.items()}
    last = "final_layer.adaLN_modulation.1.weight"
    table["norm_out.linear.weight"] = ((last, dim, 2 * dim), (last, 0, dim))
    return table


def read_single_file(path: Path, config: TransformerConfig) -> dict[str, StoredWeight]:
    """Finds every tensor of the transformer in one file; no weight is read.

    Args:
        path: a safetensors file, bf16 (or another float), fp8 or nvfp4.
        config: the transformer's configuration, from the base checkpoint.

    Returns:
        Tensors by diffusers' names.

    Raises:
        CheckpointError: not a whole safetensors file; missing, unexpected or misshapen tensors.
    """
    stored = read_weights(path, _PREFIXES)
    shapes = transformer_parameters(config)
    table: dict[str, tuple[Rows, ...]] = {name: ((name, 0, shapes[name][0]),) for name in shapes}
    if "x_embedder.weight" not in stored:
        table = _bfl_rows(config, stored)
    expected: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        for source, _, stop in table[name]:
            rows = max(stop, expected.get(source, (0,))[0])
            expected[source] = (rows, *shape[1:])
    _check_tensors(path, stored, expected)
    weights: dict[str, StoredWeight] = {}
    for name in shapes:
        parts = tuple(
            stored[source]
            if stop - start == expected[source][0]
            else stored[source].rows(start, stop)
            for source, start, stop in table[name]
        )
        weights[name] = parts[0] if len(parts) == 1 else JoinedRows(parts)
    return weights


def _check_tensors(
    path: Path,
    stored: Mapping[str, FileWeight],
    expected: Mapping[str, tuple[int, ...]],
) -> None:
    for name in ("img_in.weight", "x_embedder.weight"):
        if name in stored and name in expected and stored[name].shape[:1] != expected[name][:1]:
            raise CheckpointError(_shape_text(path, name, stored[name].shape, expected[name]))
    check_names(
        stored,
        expected,
        f"{path}: its tensors are not those of a FLUX.2 [klein] transformer of the base "
        "checkpoint's size",
    )
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise CheckpointError(_shape_text(path, name, stored[name].shape, shape))


def _shape_text(path: Path, name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> str:
    models = (
        f"{x} ({_MODELS[x[0]]})" if x and x[0] in _MODELS else f"{x}" for x in (got, expected)
    )
    return (
        f"{path}: {name} has shape {next(models)}, expected {next(models)} from the base "
        "checkpoint's transformer/config.json; take the base of the same model size"
    )
