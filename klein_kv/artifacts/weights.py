"""Where each tensor of a component lies in its safetensors files, without reading any of them.

A safetensors file is eight bytes of header length (little endian), a JSON header that gives dtype,
shape and byte range of every tensor, and the tensors (https://github.com/huggingface/safetensors,
"Format"). The header alone is enough to point ONNX external data, or a TensorRT input, into the
file; the data is mapped when a backend asks for it. Only this format is read: never pickle.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from klein_kv.artifacts.config import tensor_bytes
from klein_kv.artifacts.digest import inside, stand_in
from klein_kv.errors import MALFORMED, ArtifactError, CheckpointError
from klein_kv.json_values import from_json

__all__ = [
    "NUMPY_DTYPES",
    "WeightPlace",
    "WeightRef",
    "graph_weights",
    "map_weight",
    "read_header",
    "read_metadata",
    "refs_from_places",
    "safetensors_header",
    "save_graph_weights",
    "split_part",
    "weights_file",
    "whole_weights",
]

_DTYPES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "U8": "uint8",
}
_QUANTIZED_DTYPES = _DTYPES | {
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F4": "float4_e2m1fn",
}
_CODES = {name: code for code, name in _QUANTIZED_DTYPES.items()}
_MAX_HEADER = 100_000_000
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "int64": np.dtype(np.int64),
    "uint8": np.dtype(np.uint8),
}
"""How each type lies in host memory."""


@dataclass(frozen=True, slots=True)
class WeightRef:
    """One tensor, or a range of rows of one: `nbytes` bytes from `offset` of `path`."""

    path: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]

    def rows(self, start: int, stop: int) -> "WeightRef":
        """Rows `start` to `stop` (exclusive) of axis 0: contiguous, so again a plain byte range."""
        row = self.nbytes // self.shape[0]
        shape = (stop - start, *self.shape[1:])
        offset, nbytes = self.offset + start * row, (stop - start) * row
        return WeightRef(self.path, offset, nbytes, self.dtype, shape)

    def place(self, folder: Path) -> "WeightPlace":
        """The same, as tables of files in or below this folder name it."""
        file = self.path.relative_to(folder).as_posix()
        return WeightPlace(file, self.offset, self.nbytes, self.dtype, self.shape)


def read_header(path: Path, *, quantized: bool = False) -> dict[str, WeightRef]:
    """Where the tensors of one safetensors file lie.

    `quantized` accepts float8 and float4 tensors too, which mean nothing without their scales. A
    `CheckpointError` tells of a file that is missing, truncated, or not safetensors.
    """
    header, start, size = _parse_header(path)
    dtypes = _QUANTIZED_DTYPES if quantized else _DTYPES
    refs = {
        name: _ref_from_entry(path, name, entry, start, dtypes)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    end = start
    for name, ref in sorted(refs.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if ref.offset != end:  # the format allows neither
            what = "overlaps the tensor before it" if ref.offset < end else "follows a gap"
            raise CheckpointError(
                f"{path}: {name} starts at byte {ref.offset}, expected {end}: it {what}; "
                "download the file again"
            )
        end += ref.nbytes
    if end != size:
        raise CheckpointError(
            f"{path} is truncated or has a tail: it has {size} bytes, its tensors end at {end}; "
            "download it again"
        )
    return refs


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that a safetensors file carries beside its tensors; errors as of `read_header`."""
    metadata = _parse_header(path)[0].get("__metadata__", {})
    try:
        texts: dict[str, str] = from_json(dict[str, str], metadata)
        return texts
    except MALFORMED as error:
        raise CheckpointError(
            f"{path}: the metadata is no JSON object of texts ({error})"
        ) from error


def _parse_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header's JSON object, where the tensors start, and how long the file is."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size and (other := stand_in(path)):
                raise CheckpointError(f"{path} {other}")
            if size < 8 or length > min(_MAX_HEADER, size - 8):
                raise CheckpointError(
                    f"{path} is not a whole safetensors file: its header claims {length} bytes, "
                    f"the file has {size}; download it again (only safetensors is read)"
                )
            header = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"weight file is missing: {path}; download the whole checkpoint"
        ) from error
    except (OSError, *MALFORMED) as error:
        raise CheckpointError(
            f"{path} is not a safetensors file ({error}); only safetensors is read, never pickle"
        ) from error
    start = 8 + length
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is not a safetensors file: its header is no JSON object")
    return header, start, size


def _ref_from_entry(
    path: Path, name: str, entry: Any, start: int, dtypes: Mapping[str, str]
) -> WeightRef:
    try:
        code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except MALFORMED as error:
        raise CheckpointError(
            f"{path}: the header entry of {name} is malformed: {error!r}"
        ) from error
    dtype = dtypes.get(code, "") if isinstance(code, str) else ""
    wrong = None
    if not all(type(value) is int and value >= 0 for value in (*shape, begin, end)):
        wrong = f"has shape {shape} and bytes {begin!r} to {end!r}, expected integers of 0 or more"
    elif not dtype:
        wrong = f"has dtype {code}, expected one of {', '.join(dtypes)}"
    elif dtype == "float4_e2m1fn" and (not shape or shape[-1] % 2):
        wrong = f"is {dtype} of shape {shape}, expected an even last axis: two share a byte"
    elif end - begin != tensor_bytes(dtype, shape):
        wrong = (
            f"of shape {shape} and dtype {dtype} should take {tensor_bytes(dtype, shape)} bytes, "
            f"its header gives {begin} to {end}"
        )
    if wrong is not None:
        raise CheckpointError(f"{path}: {name} {wrong}")
    return WeightRef(path, start + begin, end - begin, dtype, shape)


def map_weight(ref: WeightRef) -> NDArray[Any]:
    """Maps a tensor read-only, in its shape and type; nothing is read until it is used.

    float4 comes as it is stored: uint8, two elements per byte, so the last axis is half as long.
    """
    mapped = np.memmap(ref.path, mode="r", dtype=np.uint8, offset=ref.offset, shape=(ref.nbytes,))
    if ref.dtype == "float4_e2m1fn":
        return np.asarray(mapped).reshape(*ref.shape[:-1], ref.shape[-1] // 2)
    return np.asarray(mapped).view(NUMPY_DTYPES[ref.dtype]).reshape(ref.shape)


def safetensors_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The header of a safetensors file that holds these tensors: name -> (dtype, shape).

    The default of `metadata`, texts to carry, makes other libraries take the file for weights.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin = end
        end += tensor_bytes(dtype, shape)
        entries[name] = {
            "dtype": _CODES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class WeightPlace(NamedTuple):
    """Where the bytes of a tensor lie, as tables name it: `file` is relative to a folder."""

    file: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


def refs_from_places(
    folder: Path, places: Mapping[str, WeightPlace], table: Path | str
) -> dict[str, WeightRef]:
    """Where the tensors lie; `table` names the places in an `ArtifactError`.

    It tells of a file outside the folder, a missing one, or one that does not hold the tensor.
    """
    refs: dict[str, WeightRef] = {}
    files: dict[str, tuple[Path, int]] = {}
    for name, place in places.items():
        try:
            if place.file not in files:
                path = inside(folder, place.file)
                files[place.file] = path, path.stat().st_size
            path, size = files[place.file]
            expected = tensor_bytes(place.dtype, place.shape)
        except (OSError, RuntimeError, ArtifactError, *MALFORMED) as error:
            kind = type(error).__name__  # the text of some, a KeyError for one, is the key alone
            raise ArtifactError(
                f"{table}: {name} of type {place.dtype} in {place.file!r} cannot be read: "
                f"{kind}: {error}; export again"
            ) from error
        if (
            not 0 <= place.offset <= size - place.nbytes
            or place.nbytes != expected
            or min((0, *place.shape)) < 0
        ):
            raise ArtifactError(
                f"{table}: {name} of shape {place.shape} and dtype {place.dtype} is said to take "
                f"bytes {place.offset} to {place.offset + place.nbytes} of {path.name}, which has "
                f"{size}; export again"
            )
        refs[name] = WeightRef(path, place.offset, place.nbytes, place.dtype, place.shape)
    return refs


def weights_file(graph_file: str) -> str:
    """Path of the weight table beside a graph: `x/y.onnx` -> `x/y.weights.json`."""
    return graph_file.removesuffix(".onnx") + ".weights.json"


def save_graph_weights(path: Path, weights: Mapping[str, WeightRef]) -> None:
    """Writes the weight table of one graph: the place of each initializer, beside the table."""
    table = {name: ref.place(ref.path.parent) for name, ref in weights.items()}
    path.write_text(json.dumps(table) + "\n", encoding="utf-8")


def graph_weights(folder: Path, file: str) -> dict[str, WeightRef]:
    """Where the initializers of one graph of an artifact folder lie, by initializer name.

    An `ArtifactError` tells of a table that is unreadable or points outside its folder or file.
    """
    path = folder / weights_file(file)
    try:
        text = path.read_text(encoding="utf-8")
        places = from_json(dict[str, WeightPlace], json.loads(text))
    except (OSError, *MALFORMED) as error:
        kind = type(error).__name__
        raise ArtifactError(f"{path} cannot be read: {kind}: {error}; export again") from error
    return refs_from_places(path.parent, places, path)


def split_part(name: str) -> tuple[str, slice]:
    """Tensor and rows that a name in a weight table stands for: `x[0:8]`; `x` is all rows."""
    head, _, rest = name.partition("[")
    span, _, tail = rest.partition("]")
    rows = slice(*map(int, span.split(":"))) if span else slice(None)
    return head + tail, rows


def whole_weights(table: Mapping[str, WeightRef]) -> dict[str, WeightRef]:
    """Joins the row ranges that graphs name apart: `x[0:8]` and `x[8:24]` make `x`.

    An `ArtifactError` if rows are missing, or are not neighbours in the file.
    """
    whole = {name: ref for name, ref in table.items() if "[" not in name}
    parts: dict[str, list[tuple[int, WeightRef]]] = {}
    for key, ref in table.items():
        name, rows = split_part(key)
        if name not in whole:
            parts.setdefault(name, []).append((rows.start, ref))
    for name, ranges in parts.items():
        ranges.sort(key=lambda part: part[0])
        start = ranges[0][1]
        end, offset = 0, start.offset
        for row, ref in ranges:
            if (row, ref.offset, ref.path) != (end, offset, start.path):
                raise ArtifactError(
                    f"{name}: row {row} is at byte {ref.offset} of {ref.path.name}, expected row "
                    f"{end} at byte {offset} of {start.path.name}; export again"
                )
            end, offset = end + ref.shape[0], offset + ref.nbytes
        shape, nbytes = (end, *start.shape[1:]), offset - start.offset
        whole[name] = WeightRef(start.path, start.offset, nbytes, start.dtype, shape)
    return whole
