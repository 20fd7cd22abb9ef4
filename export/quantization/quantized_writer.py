"""Writes quantized weights, a piece at a time, in the layout of `quantized_weights`.

What is written is either rounded here from a weight of the artifacts, or taken over from a file
that was quantized by its maker: then numbers, block scales and scales stay what they are, bit for
bit, and only their order changes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
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
from klein_kv.export.checkpoints.quantized_files import Fp8Weight, Nvfp4Weight
from klein_kv.export.checkpoints.weight_files import require_space

__all__ = ["LayerSource", "write_layers"]

_CHUNK = 16 << 20  # numbers at a time


@dataclass(frozen=True, slots=True)
class LayerSource:
    """One weight to write.

    Attributes:
        format: one of `quantization.FORMATS`.
        weight: a float tensor to round, or a weight of that very format to take over.
    """

    format: str
    weight: WeightRef | Fp8Weight | Nvfp4Weight

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in]."""
        return self.weight.shape

    def scale(self) -> float:
        """The tensor's scale, float32; reads the whole weight if it is to be rounded.

        Raises:
            CheckpointError: a weight that is not finite.
        """
        if not isinstance(self.weight, WeightRef):
            return float(self.weight.scale)
        largest = 0.0
        for _, rows in self._pieces():
            largest = max(largest, float(np.abs(rows).max(initial=0)))
            if not np.isfinite(largest):
                raise CheckpointError(
                    f"{self.weight.path}: a weight of shape {self.shape} holds {largest}; "
                    "expected finite numbers, download the checkpoint again"
                )
        return fp8_scale(largest) if self.format == "fp8" else nvfp4_scale(largest)

    def numbers(self, scale: float, block_scales: NDArray[Any] | None) -> Iterator[NDArray[Any]]:
        """Pieces of the stored numbers, row by row.

        Args:
            scale: what `scale` returned.
            block_scales: nvfp4: filled with the block scales [out, in / 16].
        """
        if isinstance(self.weight, Fp8Weight):
            yield map_weight(self.weight.values)
        elif isinstance(self.weight, Nvfp4Weight):
            packed = map_weight(self.weight.packed)
            if block_scales is not None:
                block_scales[:] = self.weight.linear_block_scales()
            yield packed >> 4 | packed << 4  # the first number from the high to the low half
        else:
            for start, rows in self._pieces():
                if block_scales is None:
                    yield quantize_fp8(rows, scale)
                else:
                    numbers, scales = quantize_nvfp4(rows, scale)
                    block_scales[start : start + len(rows)] = scales
                    yield numbers

    def _pieces(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        assert isinstance(self.weight, WeightRef)  # noqa: S101 - the callers looked
        mapped = map_weight(self.weight)
        step = max(1, _CHUNK // self.shape[1])
        for start in range(0, self.shape[0], step):
            yield start, mapped[start : start + step].astype(np.float32)


def write_layers(path: Path, layers: Mapping[str, LayerSource]) -> dict[str, float]:
    """Writes one safetensors file.

    Args:
        path: the file.
        layers: by weight name.

    Returns:
        The scale of each tensor.

    Raises:
        CapacityError: not enough disk; nothing has been written then.
        CheckpointError: a weight that is not finite.
    """
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, layer in layers.items():
        rows, columns = layer.shape
        if layer.format == "fp8":
            tensors[name] = ("float8_e4m3fn", (rows, columns))
        else:
            tensors[name] = ("float4_e2m1fn", (rows, columns))
            tensors[name + BLOCK_SCALES] = ("float8_e4m3fn", (rows, columns // BLOCK))
    header = safetensors_header(tensors)
    total = sum(layer.shape[0] * layer.shape[1] for layer in layers.values())
    nbytes = sum(tensor_bytes(kind, shape) for kind, shape in tensors.values())
    require_space(path.parent, len(header) + nbytes)
    scales = {}
    progress: Any = tqdm(total=total, unit="", unit_scale=True, desc=path.name, disable=None)
    with path.open("wb") as file, progress as bar:
        file.write(header)
        for name, layer in layers.items():
            block_scales = None
            if layer.format == "nvfp4":
                shape = tensors[name + BLOCK_SCALES][1]
                block_scales = np.zeros(shape, ml_dtypes.float8_e4m3fn)
            scales[name] = layer.scale()
            for piece in layer.numbers(scales[name], block_scales):
                file.write(np.ascontiguousarray(piece).view(np.uint8).data)
            if block_scales is not None:
                file.write(block_scales.tobytes())
            bar.update(layer.shape[0] * layer.shape[1])
    return scales
