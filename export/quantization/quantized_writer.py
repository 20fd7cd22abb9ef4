"""Writes quantized weights, a piece at a time, in the layout of `quantized_weights`.

What is written is either rounded here from a weight of the artifacts, or taken over from a file
that was quantized by its maker: then numbers, block scales and scales stay what they are, bit for
bit, and only their order changes.
"""

from collections.abc import Iterator, Mapping
from io import BufferedWriter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from klein_kv.artifacts.config import tensor_bytes
from klein_kv.artifacts.numbers import (
    BLOCK,
    fp8_scale,
    nvfp4_scale,
    quantize_fp8,
    quantize_nvfp4,
)
from klein_kv.artifacts.quantized_weights import BLOCK_SCALES
from klein_kv.artifacts.weights import WeightRef, map_weight, safetensors_header
from klein_kv.errors import CheckpointError
from klein_kv.export.checkpoints.quantized_files import PublishedWeight
from klein_kv.export.checkpoints.weight_files import require_space

__all__ = ["LayerSource", "write_layers"]

_CHUNK = 16 << 20  # numbers at a time
_ROOM = 2.0
"""How much larger than its largest number a weight may become under its scale, by an adapter merged
into it later. A power of two: numbers of floating point lose nothing but the smallest of them."""

LayerSource = tuple[str, WeightRef | PublishedWeight]
"""A format, and a float tensor to round to it or a weight of that very format to take over."""


def write_layers(path: Path, layers: Mapping[str, LayerSource]) -> dict[str, float]:
    """Writes one safetensors file; the scale of each tensor, by weight name.

    Raises:
        CapacityError: not enough disk; nothing has been written then.
        CheckpointError: a weight that is not finite.
    """
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (kind, weight) in layers.items():
        rows, columns = weight.shape
        tensors[name] = ("float8_e4m3fn" if kind == "fp8" else "float4_e2m1fn", (rows, columns))
        if kind == "nvfp4":
            tensors[name + BLOCK_SCALES] = ("float8_e4m3fn", (rows, columns // BLOCK))
    header = safetensors_header(tensors)
    nbytes = sum(tensor_bytes(*tensor) for tensor in tensors.values())
    require_space(path.parent, len(header) + nbytes)
    scales = {}
    progress: Any = tqdm(total=nbytes, unit="B", unit_scale=True, desc=path.name, disable=None)
    with path.open("wb") as file, progress as bar:
        file.write(header)
        for name, (kind, weight) in layers.items():
            start = file.tell()
            scales[name] = _write_layer(file, kind, weight)
            bar.update(file.tell() - start)
    return scales


def _write_layer(file: BufferedWriter, kind: str, weight: WeightRef | PublishedWeight) -> float:
    """Numbers row by row, then block scales; returns the tensor's scale."""
    block_scales = []
    if isinstance(weight, PublishedWeight):
        scale = weight.scale
        _write(file, weight.packed(0, weight.shape[0]))
        if kind == "nvfp4":
            block_scales.append(weight.linear_block_scales())
    else:
        scale = _scale(kind, weight)
        for rows in _pieces(weight):
            if kind == "fp8":
                _write(file, quantize_fp8(rows, scale))
            else:
                numbers, steps = quantize_nvfp4(rows, scale)
                _write(file, numbers)
                block_scales.append(steps)
    for steps in block_scales:
        _write(file, steps)
    return scale


def _write(file: BufferedWriter, array: NDArray[Any]) -> None:
    file.write(np.ascontiguousarray(array).view(np.uint8).data)


def _scale(kind: str, weight: WeightRef) -> float:
    largest = 0.0
    for rows in _pieces(weight):
        largest = max(largest, float(np.abs(rows).max(initial=0)))
        if not np.isfinite(largest):
            raise CheckpointError(
                f"{weight.path}: a weight of shape {weight.shape} holds {largest}; expected finite "
                "numbers, download the checkpoint again"
            )
    return fp8_scale(_ROOM * largest) if kind == "fp8" else nvfp4_scale(_ROOM * largest)


def _pieces(weight: WeightRef) -> Iterator[NDArray[np.float32]]:
    mapped = map_weight(weight)
    step = max(1, _CHUNK // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        yield mapped[start : start + step].astype(np.float32)
