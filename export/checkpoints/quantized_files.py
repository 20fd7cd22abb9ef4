"""Tensors of one safetensors file, quantized or not: BFL's bf16, fp8 and nvfp4 single files.

Quantized files hold, beside `NAME.weight`, what its numbers mean:

    fp8     weight F8_E4M3 [out, in]; weight_scale F32 []; input_scale F32 [] (activations)
    nvfp4   weight U8 [out, in / 2], two e2m1 numbers per byte, the first in the high half;
            weight_scale F8_E4M3, one per 16 numbers of a row, in tiles (below);
            weight_scale_2 F32 []; input_scale F32 []

A weight is `value * weight_scale` in fp8 and `value * (block scale * weight_scale_2)` in nvfp4, in
float32 in this order, which is that of ComfyUI and of two ONNX DequantizeLinear nodes.

Block scales lie in the tiles that cuBLAS multiplies from (its manual, "1D Block Scaling Factors
Layout"): 128 rows by 4 scales per tile, rows and columns padded to whole tiles; in a tile, the
scale of row r and column c is number (r % 32) * 16 + (r // 32) * 4 + c.

Which layers are quantized is read from the file, layer by layer: the published files differ in it.
docs/checkpoints.md says where each of these facts comes from.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from klein_kv.artifacts.numbers import BLOCK, dequantize_fp8, dequantize_nvfp4
from klein_kv.artifacts.weights import WeightRef, map_weight, read_header, read_metadata
from klein_kv.errors import CheckpointError

__all__ = ["PublishedWeight", "read_weights"]

_TILE_ROWS, _TILE_COLUMNS = 128, 4
_COMPANIONS = ("weight_scale", "weight_scale_2", "input_scale", "comfy_quant")


@dataclass(frozen=True, slots=True)
class PublishedWeight:
    """A quantized matrix [out, in] as the file holds it.

    Attributes:
        format: "fp8" or "nvfp4".
        numbers: float8_e4m3fn [out, in], or uint8 [out, in / 2].
        scale: what numbers or block scales are multiplied by.
        input_scale: of the layer's activations, as the file's maker calibrated it, if at all.
        block_scales: nvfp4: float8_e4m3fn, in tiles, for all rows of the file's tensor.
        first_row: row of `block_scales` that row 0 of `numbers` belongs to.
    """

    format: str
    numbers: WeightRef
    scale: float
    input_scale: float | None
    block_scales: WeightRef | None = None
    first_row: int = 0

    @property
    def path(self) -> Path:
        """The file."""
        return self.numbers.path

    @property
    def dtype(self) -> str:
        """What `read` returns."""
        return "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in]."""
        rows, columns = self.numbers.shape
        return rows, columns if self.block_scales is None else 2 * columns

    def rows(self, start: int, stop: int) -> "PublishedWeight":
        """Output features `start` to `stop` (exclusive); nothing is read."""
        numbers = self.numbers.rows(start, stop)
        return replace(self, numbers=numbers, first_row=self.first_row + start)

    def packed(self, start: int, stop: int) -> NDArray[Any]:
        """Rows of numbers as artifacts hold them: nvfp4 with the first one in the low half."""
        numbers = map_weight(self.numbers)[start:stop]
        return numbers if self.block_scales is None else numbers >> 4 | numbers << 4

    def linear_block_scales(self) -> NDArray[Any]:
        """Block scales of nvfp4 row by row: float8_e4m3fn [out, in / 16]."""
        assert self.block_scales is not None  # noqa: S101 - fp8 has none
        rows, columns = self.shape[0], self.shape[1] // BLOCK
        wide = -(-columns // _TILE_COLUMNS)
        tiles = map_weight(self.block_scales).reshape(-1, wide, 32, 4, _TILE_COLUMNS)
        scales = tiles.transpose(0, 3, 2, 1, 4).reshape(-1, wide * _TILE_COLUMNS)
        return scales[self.first_row : self.first_row + rows, :columns]

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Dequantized rows, float32."""
        numbers = self.packed(start, stop)
        if self.block_scales is None:
            return dequantize_fp8(numbers, self.scale)
        return dequantize_nvfp4(numbers, self.linear_block_scales()[start:stop], self.scale)


def read_weights(path: Path) -> dict[str, WeightRef | PublishedWeight]:
    """Reads one safetensors file: its header and its scalar scales, no weight.

    Returns:
        Tensors by the file's own names, companions folded into the weight that they belong to.

    Raises:
        CheckpointError: not a whole safetensors file, a scale that is missing, left over or
            malformed, or another kind of quantization.
    """
    refs = read_header(path, quantized=True)
    _check_formats(path, refs)
    layers: dict[str, dict[str, WeightRef]] = {}
    for name, ref in refs.items():
        layer, _, part = name.rpartition(".")
        if part in _COMPANIONS:
            layers.setdefault(layer, {})[part] = ref
    weights: dict[str, WeightRef | PublishedWeight] = {}
    for name, ref in refs.items():
        layer, _, part = name.rpartition(".")
        if part not in _COMPANIONS:
            weights[name] = _weight(name, ref, layers.pop(layer, {}) if part == "weight" else {})
    for layer, companions in layers.items():
        raise CheckpointError(
            f"{path}: {layer} has {', '.join(companions)} but no {layer}.weight; download it again"
        )
    return weights


def _check_formats(path: Path, refs: Mapping[str, WeightRef]) -> None:
    """Reads what the header, or a tensor beside a weight, says of quantized layers."""
    try:
        text = read_metadata(path).get("_quantization_metadata", '{"layers": {}}')
        kinds = {layer: entry["format"] for layer, entry in json.loads(text)["layers"].items()}
        for name, ref in refs.items():
            if name.endswith(".comfy_quant"):
                kinds[name] = json.loads(map_weight(ref).tobytes())["format"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: what it says of its quantized layers (_quantization_metadata, comfy_quant) "
            f"is not what ComfyUI writes ({error!r}); download it again"
        ) from error
    for name, kind in kinds.items():
        if kind not in ("float8_e4m3fn", "nvfp4"):
            raise CheckpointError(
                f"{path}: {name} is quantized as {kind!r}, expected float8_e4m3fn or nvfp4; take "
                "another file of this model"
            )


def _weight(
    name: str, ref: WeightRef, companions: Mapping[str, WeightRef]
) -> WeightRef | PublishedWeight:
    def scalar(part: str) -> float:
        return _scalar(f"{name.removesuffix('weight')}{part}", companions.get(part), ref)

    def input_scale() -> float | None:
        return scalar("input_scale") if "input_scale" in companions else None

    is_matrix = len(ref.shape) == 2
    if ref.dtype == "uint8" and is_matrix and companions:
        scales = _block_scales(name, ref, companions.get("weight_scale"))
        return PublishedWeight("nvfp4", ref, scalar("weight_scale_2"), input_scale(), scales)
    if ref.dtype == "uint8" or (ref.dtype == "float8_e4m3fn" and not is_matrix):
        raise CheckpointError(
            f"{ref.path}: {name} is {ref.dtype} of shape {ref.shape}, expected a matrix with its "
            "weight_scale (fp8 or nvfp4 as Black Forest Labs publishes them), or a plain float"
        )
    if "weight_scale_2" in companions:
        raise CheckpointError(
            f"{ref.path}: {name} is {ref.dtype} but has a weight_scale_2, which only nvfp4 (uint8) "
            "has"
        )
    if ref.dtype == "float8_e4m3fn":
        return PublishedWeight("fp8", ref, scalar("weight_scale"), input_scale())
    # A layer that was left alone may still carry the scales of its neighbours: of activations,
    # which say nothing of the weight, or of a weight that is stored as it is.
    if "weight_scale" in companions and scalar("weight_scale") != 1:
        raise CheckpointError(
            f"{ref.path}: {name} is {ref.dtype} but has a weight_scale other than 1; expected a "
            "float8 weight with it; download the file again"
        )
    return ref


def _block_scales(name: str, ref: WeightRef, scales: WeightRef | None) -> WeightRef:
    rows, columns = ref.shape[0], 2 * ref.shape[1]
    tiles = -(-rows // _TILE_ROWS) * -(-columns // BLOCK // _TILE_COLUMNS)
    nbytes = tiles * _TILE_ROWS * _TILE_COLUMNS
    got = "none" if scales is None else f"{scales.dtype} of shape {scales.shape}"
    if (
        scales is None
        or scales.dtype != "float8_e4m3fn"
        or scales.nbytes != nbytes
        or columns % BLOCK
    ):
        raise CheckpointError(
            f"{ref.path}: {name} is nvfp4 [{rows}, {columns}] and needs {nbytes} float8 block "
            f"scales in its weight_scale (whole tiles of 128 x 4, one scale per 16 numbers), got "
            f"{got}"
        )
    return scales


def _scalar(name: str, ref: WeightRef | None, weight: WeightRef) -> float:
    if ref is None:
        raise CheckpointError(
            f"{weight.path}: {name} is missing beside a weight in {weight.dtype}; download the "
            "file again"
        )
    if ref.dtype != "float32" or ref.nbytes != 4:
        raise CheckpointError(
            f"{ref.path}: {name} is {ref.dtype} of shape {ref.shape}, expected one float32"
        )
    value = float(map_weight(ref).reshape(-1)[0])
    if not 0 < value < float("inf"):
        raise CheckpointError(
            f"{ref.path}: {name} is {value}, expected a positive number; download the file again"
        )
    return value
