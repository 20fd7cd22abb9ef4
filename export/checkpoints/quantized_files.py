"""Tensors of safetensors files, quantized or not: BFL's bf16, fp8 and nvfp4, and ComfyUI's fp8.

Quantized files hold, beside `NAME.weight`, what its numbers mean:

    fp8     weight F8_E4M3 or F8_E5M2 [out, in]; weight_scale F32 [], or [out] or [out, 1], one per
            row; input_scale F32 [] (activations)
    nvfp4   weight U8 [out, in / 2], two e2m1 numbers per byte, the first in the high half;
            weight_scale F8_E4M3, one per 16 numbers of a row, in tiles (below);
            weight_scale_2 F32 []; input_scale F32 []

A weight is `value * weight_scale` in fp8 and `value * (block scale * weight_scale_2)` in nvfp4, in
float32 in this order, which is that of ComfyUI and of two ONNX DequantizeLinear nodes.

Older files of ComfyUI say `scale_weight` and `scale_input`, and have a tensor `scaled_fp8` that
marks them; a scale_input of 1 means none (ComfyUI, `comfy/utils.py`, `convert_old_quants`). Files
without any scale were cast: their numbers are the weights.

Block scales lie in the tiles that cuBLAS multiplies from (its manual, "1D Block Scaling Factors
Layout"): 128 rows by 4 scales per tile, rows and columns padded to whole tiles; in a tile, the
scale of row r and column c is number (r % 32) * 16 + (r // 32) * 4 + c.

Which layers are quantized is read from the file, layer by layer: the published files differ in it.
docs/checkpoints.md says where each of these facts comes from.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klein_kv.artifacts.numbers import BLOCK, dequantize_fp8, dequantize_nvfp4
from klein_kv.artifacts.weights import WeightRef, map_weight, read_header, read_metadata
from klein_kv.errors import MALFORMED, CheckpointError

__all__ = ["BESIDE", "FileWeight", "PublishedWeight", "read_weights", "weights_from_refs"]

_TILE_ROWS, _TILE_COLUMNS = 128, 4
_COMPANIONS = {  # and what older files call them
    "weight_scale": "weight_scale",
    "weight_scale_2": "weight_scale_2",
    "input_scale": "input_scale",
    "comfy_quant": "comfy_quant",
    "scale_weight": "weight_scale",
    "scale_input": "input_scale",
}
_MARK = "scaled_fp8"
_OTHERS = {
    ".weight_scale_inv": "fp8 with a scale per block of 128 x 128 (Qwen's and DeepSeek's releases)",
    ".absmax": "numbers of four or eight bits of bitsandbytes",
}
_FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
BESIDE = ("text_encoders.", "cond_stage_model.", "vae.", "first_stage_model.")
"""What files with a whole pipeline hold beside the transformer."""


@dataclass(frozen=True, slots=True)
class PublishedWeight:
    """A quantized matrix [out, in] as the file holds it."""

    format: str  # "fp8" or "nvfp4"; "fp8 of e5m2" or "fp8 by rows", which artifacts do not hold
    numbers: WeightRef  # float8 [out, in], or uint8 [out, in / 2]
    scale: float  # what numbers or block scales are multiplied by; 1 beside `row_scales`
    input_scale: float | None  # of the layer's activations, as the file's maker calibrated it
    block_scales: WeightRef | None = None  # nvfp4: in tiles, for all rows of the file's tensor
    row_scales: WeightRef | None = None  # fp8: float32, one per row of the file's tensor
    first_row: int = 0  # row of `block_scales` or `row_scales` that row 0 of `numbers` has

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
        if self.row_scales is not None:
            scales = map_weight(self.row_scales).reshape(-1, 1)
            rows = scales[self.first_row + start : self.first_row + stop]
            values: NDArray[Any] = numbers.astype(np.float32) * rows
            return values
        if self.block_scales is None:
            return dequantize_fp8(numbers, self.scale)
        return dequantize_nvfp4(numbers, self.linear_block_scales()[start:stop], self.scale)


FileWeight = WeightRef | PublishedWeight
"""A tensor of a file, with the scales that belong to it."""


def read_weights(path: Path, prefixes: Sequence[str] = ()) -> dict[str, FileWeight]:
    """Tensors of one safetensors file, scales folded into their weights; no weight is read.

    By the file's own names, without the first of `prefixes` that any has; what a file with a whole
    pipeline holds beside those with it is left out.

    Raises:
        CheckpointError: not a whole safetensors file, a scale that is missing, left over or
            malformed, or another kind of quantization.
    """
    refs = read_header(path, quantized=True)
    for prefix in prefixes:
        inside = {n.removeprefix(prefix): ref for n, ref in refs.items() if n.startswith(prefix)}
        if inside:
            _check_rest(path, prefix, [name for name in refs if not name.startswith(prefix)])
            refs = inside
            break
    return weights_from_refs(path, refs, read_metadata(path))


def _check_rest(path: Path, prefix: str, rest: Sequence[str]) -> None:
    """Refuses names beside the transformer's that are of no other part of a pipeline."""
    strange = [name for name in rest if not name.startswith(BESIDE)]
    if strange:
        raise CheckpointError(
            f"{path} holds {strange[0]} beside tensors of {prefix}*, expected the transformer "
            f"alone, or a pipeline ({'*, '.join(BESIDE)}*)"
        )


def weights_from_refs(
    path: Path, refs: Mapping[str, WeightRef], metadata: Mapping[str, str]
) -> dict[str, FileWeight]:
    """The same from the tensors of one file or of several; `path` is for messages."""
    _check_formats(path, refs, metadata)
    layers: dict[str, dict[str, WeightRef]] = {}
    plain: dict[str, WeightRef] = {}
    for name, ref in refs.items():
        layer, _, part = name.rpartition(".")
        if part in _COMPANIONS:
            known = layers.setdefault(layer, {})
            if _COMPANIONS[part] in known:
                raise CheckpointError(f"{path}: {layer} has two scales that mean the same, {name}")
            if part != "scale_input" or not (map_weight(ref) == 1).all():
                known[_COMPANIONS[part]] = ref
        elif part != _MARK:
            plain[name] = ref
    scaled = any(
        {"weight_scale", "input_scale"} & companions.keys() for companions in layers.values()
    )
    weights: dict[str, FileWeight] = {}
    for name, ref in plain.items():
        layer, _, part = name.rpartition(".")
        companions = layers.pop(layer, {}) if part == "weight" else {}
        weights[name] = _weight(name, ref, companions, scaled=scaled)
    for layer, companions in layers.items():
        if companions:
            raise CheckpointError(
                f"{path}: {layer} has {', '.join(companions)} but no {layer}.weight; the file is "
                "not whole"
            )
    return weights


def _check_formats(path: Path, refs: Mapping[str, WeightRef], metadata: Mapping[str, str]) -> None:
    """Reads what the header, or a tensor beside a weight, says of quantized layers."""
    try:
        text = metadata.get("_quantization_metadata", '{"layers": {}}')
        kinds = {layer: entry["format"] for layer, entry in json.loads(text)["layers"].items()}
        for name, ref in refs.items():
            if name.endswith(".comfy_quant"):
                kinds[name] = json.loads(map_weight(ref).tobytes())["format"]
    except MALFORMED as error:
        raise CheckpointError(
            f"{path}: what it says of its quantized layers (_quantization_metadata, comfy_quant) "
            f"is not what ComfyUI writes ({error!r}); download it again"
        ) from error
    for name, kind in kinds.items():
        if kind not in (*_FLOAT8, "nvfp4"):
            raise CheckpointError(
                f"{path}: {name} is quantized as {kind!r}, expected {', '.join(_FLOAT8)} or nvfp4; "
                "take another file of this model"
            )
    for name in refs:
        for end, what in _OTHERS.items():
            if name.endswith(end):
                raise CheckpointError(
                    f"{path}: {name} belongs to {what}, expected fp8 with one scale per tensor or "
                    "per row, or nvfp4, as Black Forest Labs and ComfyUI write them; take such a "
                    "file, or the bf16 weights"
                )


def _weight(
    name: str, ref: WeightRef, companions: Mapping[str, WeightRef], *, scaled: bool
) -> FileWeight:
    def scalar(part: str) -> float:
        return _scalar(f"{name.removesuffix('weight')}{part}", companions.get(part), ref)

    def input_scale() -> float | None:
        return scalar("input_scale") if "input_scale" in companions else None

    is_matrix = len(ref.shape) == 2
    if ref.dtype == "uint8" and is_matrix and companions:
        scales = _block_scales(name, ref, companions.get("weight_scale"))
        return PublishedWeight("nvfp4", ref, scalar("weight_scale_2"), input_scale(), scales)
    if ref.dtype == "uint8" or (ref.dtype in _FLOAT8 and companions and not is_matrix):
        raise CheckpointError(
            f"{ref.path}: {name} is {ref.dtype} of shape {ref.shape}, expected a matrix with its "
            "weight_scale (fp8 or nvfp4 as Black Forest Labs publishes them), or a plain float"
        )
    if "weight_scale_2" in companions:
        raise CheckpointError(
            f"{ref.path}: {name} is {ref.dtype} but has a weight_scale_2, which only nvfp4 (uint8) "
            "has"
        )
    if ref.dtype in _FLOAT8:
        kind = "fp8" if ref.dtype == "float8_e4m3fn" else "fp8 of e5m2"
        if not scaled:  # numbers that were cast
            return PublishedWeight(kind, ref, 1.0, None) if is_matrix else ref
        scales, rows = companions.get("weight_scale", ref), ref.shape[0]
        if scales.dtype == "float32" and rows > 1 and scales.shape in ((rows,), (rows, 1)):
            _check_row_scales(name, scales)
            return PublishedWeight("fp8 by rows", ref, 1.0, input_scale(), row_scales=scales)
        return PublishedWeight(kind, ref, scalar("weight_scale"), input_scale())
    # A layer that was left alone may still carry the scales of its neighbours: of activations,
    # which say nothing of the weight, or of a weight that is stored as it is.
    if "weight_scale" in companions and scalar("weight_scale") != 1:
        raise CheckpointError(
            f"{ref.path}: {name} is {ref.dtype} but has a weight_scale other than 1; expected a "
            "float8 weight with it; take another file of this model"
        )
    return ref


def _check_row_scales(name: str, scales: WeightRef) -> None:
    values = map_weight(scales)
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise CheckpointError(
            f"{scales.path}: the scales of the rows of {name} are not all positive numbers; take "
            "another file of this model"
        )


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
            f"{weight.path}: {name} is missing beside a weight in {weight.dtype}, while other "
            "weights have theirs, so that its numbers have no meaning; take another file"
        )
    if ref.dtype != "float32" or ref.nbytes != 4:
        raise CheckpointError(
            f"{ref.path}: {name} is {ref.dtype} of shape {ref.shape}, expected one float32 "
            "for the tensor, or one per row"
        )
    value = float(map_weight(ref).reshape(-1)[0])
    if not 0 < value < float("inf"):
        raise CheckpointError(
            f"{ref.path}: {name} is {value}, expected a positive number; take another file"
        )
    return value
