"""Quantized weights of a single file for an artifact folder, as their maker left them."""

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.numbers import is_block_linear
from klein_kv.artifacts.weights import WeightRef, map_weight
from klein_kv.errors import RequestError
from klein_kv.export.checkpoints.quantized_files import PublishedWeight
from klein_kv.export.checkpoints.single_file import read_single_file
from klein_kv.export.checkpoints.stored_weights import StoredWeight, read_rows

__all__ = ["read_quantized_source"]

_log = logging.getLogger(__name__)

_CHECKED_ROWS = 16
_USUAL_ERROR = {"fp8": 0.06, "nvfp4": 0.25}
"""Relative error (root of the mean square) above which numbers hardly stand for a weight: rounding
normally distributed weights gives about 0.027 and 0.10."""


def read_quantized_source(
    path: Path, manifest: Manifest, own: Mapping[str, WeightRef]
) -> dict[str, PublishedWeight]:
    """A file's quantized layers, by diffusers' names; its other tensors must be `own`'s.

    Raises:
        CheckpointError: not such a file, or of another size of model.
        RequestError: no quantized layer in it; quantized layers that the artifacts keep; tensors
            that differ from the artifacts': the file belongs to other weights.
    """
    layers: dict[str, PublishedWeight] = {}
    for name, weight in read_single_file(path, manifest.config.transformer).items():
        if not isinstance(weight, PublishedWeight):
            _check_equal(path, name, weight, own[name])
            continue
        if weight.format not in _USUAL_ERROR:
            raise RequestError(
                f"{path}: {name} is {weight.format}, expected float8_e4m3fn with one scale per "
                "tensor, or nvfp4, whose numbers can stay as they are; export the file (with "
                "--dtype bf16) and quantize that"
            )
        if not is_block_linear(name, weight.shape):
            raise RequestError(
                f"{path}: {name} is quantized; expected linear layers of the blocks alone"
            )
        layers[name] = weight
        _check_near(path, name, weight, own[name])
    if not layers:
        raise RequestError(
            f"{path} holds no fp8 or nvfp4 weight; take a quantized file, or leave --from out to "
            "quantize the artifacts' own weights"
        )
    return layers


def _check_equal(path: Path, name: str, weight: StoredWeight, own: WeightRef) -> None:
    step = max(1, (4 << 20) // max(1, weight.shape[-1]))
    for start in range(0, weight.shape[0], step):
        stop = min(start + step, weight.shape[0])
        ours = map_weight(own)[start:stop]
        if not np.array_equal(read_rows(weight, start, stop).astype(ours.dtype), ours):
            raise RequestError(
                f"{path}: {name} is not that of the artifacts, so its quantized layers belong to "
                "other weights; export this very file (with --dtype bf16) and quantize that"
            )


def _check_near(path: Path, name: str, weight: PublishedWeight, own: WeightRef) -> None:
    rows = min(_CHECKED_ROWS, weight.shape[0])
    ours = map_weight(own)[:rows].astype(np.float32)
    error, size = (float(np.linalg.norm(x)) for x in (weight.read(0, rows) - ours, ours))
    if error > _USUAL_ERROR[weight.format] * size:
        _log.warning(
            "%s: %s is %.2f of its size away from the artifacts' weight, more than rounding "
            "to %s explains; are the artifacts of the same model?",
            path.name,
            name,
            error / max(size, 1e-30),
            weight.format,
        )
