"""The transformer out of one safetensors file, under diffusers' names, without copying it.

Files of Black Forest Labs name and lay out some of them differently (`networks.transformer_names`).
The last modulation, whose halves change places, is the one tensor that has to be written anew.
Files with diffusers' own names, or with q, k and v apart, are read too.
"""

from collections.abc import Mapping
from pathlib import Path

from klein_kv.artifacts.config import TransformerConfig
from klein_kv.errors import CheckpointError
from klein_kv.export.checkpoints.quantized_files import FileWeight, read_weights
from klein_kv.export.checkpoints.stored_weights import JoinedRows, StoredWeight
from klein_kv.export.checkpoints.weight_index import check_names
from klein_kv.networks.transformer import transformer_parameters
from klein_kv.networks.transformer_names import Rows, bfl_rows

__all__ = ["read_single_file"]

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")

_MODELS = {3072: "klein 4B", 4096: "klein 9B"}
"""Released models by the width of their transformer."""


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
        table = bfl_rows(shapes, stored)
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
