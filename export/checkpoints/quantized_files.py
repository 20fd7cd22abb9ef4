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
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from klein_kv.artifacts.weights import WeightRef, map_weight, read_header, read_metadata
from klein_kv.errors import CheckpointError

__all__ = ["Fp8Weight", "Nvfp4Weight", "read_weights", "tile_block_scales", "untile_block_scales"]

BLOCK = 16
"""Numbers that share one block scale in nvfp4."""

_TILE_ROWS, _TILE_COLUMNS = 128, 4
_E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
_COMPANIONS = ("weight_scale", "weight_scale_2", "input_scale", "comfy_quant")


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A matrix in float8 with one scale.

    Attributes:
        values: float8_e4m3fn [out, in], as the file holds them.
        scale: what to multiply them by.
        input_scale: scale of the layer's activations, as calibrated by the file's maker; None if
            the file has none.
    """

    values: WeightRef
    scale: np.float32
    input_scale: np.float32 | None

    @property
    def dtype(self) -> str:
        """What `read` returns."""
        return "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in]."""
        return self.values.shape

    def rows(self, start: int, stop: int) -> "Fp8Weight":
        """Output features `start` to `stop` (exclusive); nothing is read."""
        return replace(self, values=self.values.rows(start, stop))

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Dequantized rows, float32."""
        values: NDArray[Any] = map_weight(self.values)[start:stop].astype(np.float32)
        return values * self.scale


@dataclass(frozen=True, slots=True)
class Nvfp4Weight:
    """A matrix in e2m1 with a scale for every 16 numbers of a row, and one for all of it.

    Attributes:
        packed: uint8 [out, in / 2], as the file holds them.
        block_scales: float8_e4m3fn, in tiles, for all rows of the file's tensor.
        first_row: row of `block_scales` that row 0 of `packed` belongs to.
        scale: what to multiply the block scales by.
        input_scale: scale of the layer's activations; None if the file has none.
    """

    packed: WeightRef
    block_scales: WeightRef
    first_row: int
    scale: np.float32
    input_scale: np.float32 | None

    @property
    def dtype(self) -> str:
        """What `read` returns."""
        return "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in]."""
        rows, half = self.packed.shape
        return rows, 2 * half

    def rows(self, start: int, stop: int) -> "Nvfp4Weight":
        """Output features `start` to `stop` (exclusive); nothing is read."""
        return replace(self, packed=self.packed.rows(start, stop), first_row=self.first_row + start)

    def codes(self, start: int, stop: int) -> NDArray[np.uint8]:
        """The 4-bit numbers, one per byte: uint8 [rows, in]."""
        packed = map_weight(self.packed)[start:stop]
        codes: NDArray[np.uint8] = np.stack([packed >> 4, packed & 15], axis=-1)
        return codes.reshape(len(packed), -1)

    def linear_block_scales(self) -> NDArray[Any]:
        """Block scales row by row: float8_e4m3fn [out, in / 16]."""
        rows, columns = self.shape[0], self.shape[1] // BLOCK
        scales = untile_block_scales(map_weight(self.block_scales), columns)
        return scales[self.first_row : self.first_row + rows]

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Dequantized rows, float32."""
        values = _E2M1[self.codes(start, stop)].reshape(stop - start, -1, BLOCK)
        scales = self.linear_block_scales()[start:stop].astype(np.float32) * self.scale
        weights: NDArray[Any] = (values * scales[..., None]).reshape(stop - start, -1)
        return weights


def tile_block_scales(scales: NDArray[Any]) -> NDArray[Any]:
    """Row-by-row block scales [rows, columns] to tiles, padded with zeros.

    Returns:
        The same type, [rows up to a multiple of 128, columns up to a multiple of 4].
    """
    rows, columns = (
        -(-axis // tile) * tile
        for axis, tile in zip(scales.shape, (_TILE_ROWS, _TILE_COLUMNS), strict=True)
    )
    padded = np.zeros((rows, columns), scales.dtype)
    padded[: scales.shape[0], : scales.shape[1]] = scales
    tiles = padded.reshape(rows // _TILE_ROWS, 4, 32, columns // _TILE_COLUMNS, _TILE_COLUMNS)
    return tiles.transpose(0, 3, 2, 1, 4).reshape(rows, columns)


def untile_block_scales(tiles: NDArray[Any], columns: int) -> NDArray[Any]:
    """The reverse of `tile_block_scales`, with `columns` scales per row; padding rows stay."""
    wide = -(-columns // _TILE_COLUMNS)
    grid = tiles.reshape(-1, wide, 32, 4, _TILE_COLUMNS).transpose(0, 3, 2, 1, 4)
    return grid.reshape(-1, wide * _TILE_COLUMNS)[:, :columns]


def read_weights(path: Path) -> dict[str, WeightRef | Fp8Weight | Nvfp4Weight]:
    """Reads one safetensors file: its header and its scalar scales, no weight.

    Returns:
        Tensors by the file's own names, companions folded into the weight that they belong to.

    Raises:
        CheckpointError: not a whole safetensors file, a scale that is missing, left over or
            malformed, or another kind of quantization.
    """
    refs = read_header(path, quantized=True)
    _check_metadata(path)
    layers: dict[str, dict[str, WeightRef]] = {}
    for name, ref in refs.items():
        layer, _, part = name.rpartition(".")
        if part in _COMPANIONS:
            layers.setdefault(layer, {})[part] = ref
    weights: dict[str, WeightRef | Fp8Weight | Nvfp4Weight] = {}
    for name, ref in refs.items():
        layer, _, part = name.rpartition(".")
        if part not in _COMPANIONS:
            companions = layers.pop(layer, {}) if part == "weight" else {}
            weights[name] = _weight(name, ref, companions)
    for layer, companions in layers.items():
        raise CheckpointError(
            f"{path}: {layer} has {', '.join(companions)} but no {layer}.weight; download it again"
        )
    return weights


def _weight(
    name: str, ref: WeightRef, companions: Mapping[str, WeightRef]
) -> WeightRef | Fp8Weight | Nvfp4Weight:
    if "comfy_quant" in companions:
        _check_companion(name, companions["comfy_quant"])
    if ref.dtype == "float8_e4m3fn" and len(ref.shape) == 2:
        scale = _scalar(name, companions, "weight_scale", ref)
        _refuse(name, ref, companions, "weight_scale_2")
        return Fp8Weight(ref, scale, _input_scale(name, companions, ref))
    if ref.dtype == "uint8" and len(ref.shape) == 2 and companions:
        return _nvfp4(name, ref, companions)
    if ref.dtype in ("float8_e4m3fn", "uint8"):
        raise CheckpointError(
            f"{ref.path}: {name} is {ref.dtype} of shape {ref.shape}, expected a matrix with its "
            "weight_scale (fp8 or nvfp4 as Black Forest Labs publishes them), or a plain float"
        )
    # A layer that was left alone may still carry the scales of its neighbours: of activations,
    # which say nothing of the weight, or of a weight that is stored as it is.
    _refuse(name, ref, companions, "weight_scale_2")
    if "weight_scale" in companions and _scalar(name, companions, "weight_scale", ref) != 1:
        raise CheckpointError(
            f"{ref.path}: {name} is {ref.dtype} but has a weight_scale other than 1; expected a "
            "float8 weight with it; download the file again"
        )
    return ref


def _nvfp4(name: str, ref: WeightRef, companions: Mapping[str, WeightRef]) -> Nvfp4Weight:
    rows, columns = ref.shape[0], 2 * ref.shape[1]
    tiled = math.prod(
        -(-axis // tile) * tile
        for axis, tile in ((rows, _TILE_ROWS), (columns // BLOCK, _TILE_COLUMNS))
    )
    scales = companions.get("weight_scale")
    if (
        scales is None
        or scales.dtype != "float8_e4m3fn"
        or scales.nbytes != tiled
        or columns % BLOCK
    ):
        got = "none" if scales is None else f"{scales.dtype} of shape {scales.shape}"
        raise CheckpointError(
            f"{ref.path}: {name} is nvfp4 [{rows}, {columns}] and needs {tiled} float8 block "
            f"scales in its weight_scale (whole tiles of 128 x 4, one scale per 16 numbers), got "
            f"{got}"
        )
    return Nvfp4Weight(
        ref,
        scales,
        0,
        _scalar(name, companions, "weight_scale_2", ref),
        _input_scale(name, companions, ref),
    )


def _check_metadata(path: Path) -> None:
    """Reads what the header may say of quantized layers, once for all of them."""
    text = read_metadata(path).get("_quantization_metadata")
    if text is None:
        return
    try:
        kinds = {layer: entry["format"] for layer, entry in json.loads(text)["layers"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: _quantization_metadata is not what ComfyUI writes ({error!r}); download it "
            "again"
        ) from error
    for layer, kind in kinds.items():
        _check_format(path, layer, kind)


def _check_companion(name: str, ref: WeightRef) -> None:
    """Reads what a tensor beside the weight says of it: the same JSON as in the header."""
    try:
        kind = json.loads(map_weight(ref).tobytes())["format"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"{ref.path}: the comfy_quant of {name} is not what ComfyUI writes ({error!r}); "
            "download it again"
        ) from error
    _check_format(ref.path, name, kind)


def _check_format(path: Path, name: str, kind: object) -> None:
    if kind not in ("float8_e4m3fn", "nvfp4"):
        raise CheckpointError(
            f"{path}: {name} is quantized as {kind!r}, expected float8_e4m3fn or nvfp4; take "
            "another file of this model"
        )


def _refuse(name: str, ref: WeightRef, companions: Mapping[str, WeightRef], part: str) -> None:
    if part in companions:
        raise CheckpointError(
            f"{ref.path}: {name} is {ref.dtype} but has a {part}, which only nvfp4 (uint8) has"
        )


def _input_scale(
    name: str, companions: Mapping[str, WeightRef], ref: WeightRef
) -> np.float32 | None:
    if "input_scale" not in companions:
        return None
    return _scalar(name, companions, "input_scale", ref)


def _scalar(
    name: str, companions: Mapping[str, WeightRef], part: str, weight: WeightRef
) -> np.float32:
    ref = companions.get(part)
    layer = name.removesuffix(".weight")
    if ref is None:
        raise CheckpointError(
            f"{weight.path}: {name} is {weight.dtype}, but {layer}.{part} is missing; download the "
            "file again"
        )
    if ref.dtype != "float32" or ref.nbytes != 4:
        raise CheckpointError(
            f"{ref.path}: {layer}.{part} is {ref.dtype} of shape {ref.shape}, expected one float32"
        )
    value = np.float32(map_weight(ref).reshape(-1)[0])
    if not (np.isfinite(value) and value > 0):
        raise CheckpointError(
            f"{ref.path}: {layer}.{part} is {value}, expected a positive number; download the "
            "file again"
        )
    return value
