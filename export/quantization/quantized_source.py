"""Quantized weights of a single file for an artifact folder, as their maker left them."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.numbers import is_block_linear
from klein_kv.artifacts.weights import WeightRef, map_weight
from klein_kv.errors import RequestError
from klein_kv.export.checkpoints.quantized_files import Fp8Weight, Nvfp4Weight
from klein_kv.export.checkpoints.single_file import JoinedRows, StoredWeight, read_single_file
from klein_kv.export.quantization.quantized_writer import LayerSource

__all__ = ["QuantizedSource", "read_quantized_source"]

_log = logging.getLogger(__name__)

_CHECKED_ROWS = 16
_USUAL_ERROR = {"fp8": 0.06, "nvfp4": 0.25}
"""Relative error (root of the mean square) above which numbers hardly stand for a weight: rounding
normally distributed weights gives about 0.027 and 0.10."""


@dataclass(frozen=True, slots=True)
class QuantizedSource:
    """What a file gives.

    Attributes:
        precision: "fp8" or "nvfp4", by the formats of its layers.
        layers: its quantized layers, by diffusers' names.
        input_scales: of those layers for which the file has one.
    """

    precision: str
    layers: dict[str, LayerSource]
    input_scales: dict[str, float]


def read_quantized_source(
    path: Path, manifest: Manifest, own: Mapping[str, WeightRef]
) -> QuantizedSource:
    """Finds a file's quantized layers and compares its other tensors with the artifacts' own.

    Args:
        path: an fp8 or nvfp4 file of Black Forest Labs.
        manifest: the artifacts'.
        own: the artifacts' transformer.

    Raises:
        CheckpointError: not such a file, or of another size of model.
        RequestError: no quantized layer in it; quantized layers that the artifacts keep; tensors
            that differ from the artifacts': the file belongs to other weights.
    """
    stored = read_single_file(path, manifest.config.transformer)
    layers: dict[str, LayerSource] = {}
    input_scales: dict[str, float] = {}
    for name, weight in stored.items():
        if not isinstance(weight, Fp8Weight | Nvfp4Weight):
            _check_equal(path, name, weight, own[name])
            continue
        if not is_block_linear(name, weight.shape):
            raise RequestError(
                f"{path}: {name} is quantized; expected linear layers of the blocks alone"
            )
        kind = "fp8" if isinstance(weight, Fp8Weight) else "nvfp4"
        layers[name] = LayerSource(kind, weight)
        if weight.input_scale is not None:
            input_scales[name] = float(weight.input_scale)
        _check_near(path, name, kind, weight, own[name])
    if not layers:
        raise RequestError(
            f"{path} holds no fp8 or nvfp4 weight; take a quantized file, or leave --from out to "
            "quantize the artifacts' own weights"
        )
    formats = {layer.format for layer in layers.values()}
    return QuantizedSource("nvfp4" if "nvfp4" in formats else "fp8", layers, input_scales)


def _check_equal(path: Path, name: str, weight: StoredWeight | JoinedRows, own: WeightRef) -> None:
    step = max(1, (4 << 20) // max(1, weight.shape[-1]))
    for start in range(0, weight.shape[0], step):
        stop = min(start + step, weight.shape[0])
        ours = map_weight(own)[start:stop]
        theirs = (
            map_weight(weight)[start:stop]
            if isinstance(weight, WeightRef)
            else weight.read(start, stop)
        )
        if not np.array_equal(theirs.astype(ours.dtype), ours):
            raise RequestError(
                f"{path}: {name} is not that of the artifacts, so its quantized layers belong to "
                "other weights; export this very file (with --dtype bf16) and quantize that"
            )


def _check_near(
    path: Path, name: str, kind: str, weight: Fp8Weight | Nvfp4Weight, own: WeightRef
) -> None:
    rows = min(_CHECKED_ROWS, weight.shape[0])
    ours = map_weight(own)[:rows].astype(np.float32)
    error = np.linalg.norm(weight.read(0, rows) - ours)
    if error > _USUAL_ERROR[kind] * np.linalg.norm(ours):
        _log.warning(
            "%s: %s is %.2f of its size away from the artifacts' weight, more than rounding "
            "to %s explains; are the artifacts of the same model?",
            path.name,
            name,
            error / max(float(np.linalg.norm(ours)), 1e-30),
            kind,
        )
