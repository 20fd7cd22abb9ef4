"""Weights beside the graphs: linked where their type fits, converted once where it does not."""

import contextlib
import logging
import math
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from klein_kv.artifacts.config import ITEM_SIZE
from klein_kv.artifacts.weights import (
    NUMPY_DTYPES,
    WeightRef,
    map_weight,
    read_header,
    safetensors_header,
)
from klein_kv.errors import CapacityError, CheckpointError
from klein_kv.export.checkpoints.quantized_files import Fp8Weight
from klein_kv.export.checkpoints.single_file import JoinedRows, StoredWeight

__all__ = ["Placement", "place_weights", "require_space"]

_log = logging.getLogger(__name__)
_FLOATS = ("float32", "float16", "bfloat16")
_CHUNK = 64 << 20
_FICLONE = 0x40049409
"""linux/fs.h: let one file share the blocks of another, until either is written to."""

Weights = Mapping[str, StoredWeight | JoinedRows]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the weights of a component lie now.

    Attributes:
        refs: each tensor that the graphs use.
        sources: files of the folder that hold the very bytes of a checkpoint's file.
        shared: those of them that take no space of their own.
    """

    refs: dict[str, WeightRef]
    sources: dict[Path, Path]
    shared: frozenset[Path]


def place_weights(
    weights: Weights, names: Iterable[str], dtype: str, folder: Path, component: str
) -> Placement:
    """Puts a component's weights into the artifact folder.

    A checkpoint's file is linked (hard link, else reflink, else a copy, with a warning) if most of
    what is used of it can be used as it lies there. All other tensors are converted, a piece at a
    time, into one file.

    Args:
        weights: the component's tensors.
        names: the tensors that the graphs use.
        dtype: wanted floating point type; integer tensors stay as they are.
        folder: the component's folder inside the artifact folder; must exist.
        component: its name, for the converted file and for messages.

    Raises:
        CapacityError: not enough disk.
        CheckpointError: a value that the wanted type cannot hold, or a type that is not a float.
    """
    used = {name: weights[name] for name in names}
    fitting = {
        name: weight
        for name, weight in used.items()
        if isinstance(weight, WeightRef) and (weight.dtype == dtype or not _is_float(weight.dtype))
    }
    linked = _files_worth_linking(used, fitting)
    targets, shared = {}, set()
    for path in sorted(linked):
        targets[path], is_shared = _link(path, folder)
        if is_shared:
            shared.add(targets[path])
    refs, rest = {}, {}
    for name, weight in used.items():
        if name in fitting and fitting[name].path in targets:
            ref = fitting[name]
            refs[name] = WeightRef(targets[ref.path], ref.offset, ref.nbytes, ref.dtype, ref.shape)
        else:
            rest[name] = weight
    if rest:
        path = folder / f"{component}.{dtype}.safetensors"
        _convert(rest, dtype, path, component)
        refs |= {name: ref for name, ref in read_header(path).items() if name in rest}
    sources = {target: path for path, target in targets.items()}
    return Placement({name: refs[name] for name in used}, sources, frozenset(shared))


def _is_float(dtype: str) -> bool:
    return dtype in _FLOATS or dtype.startswith("float8")


def _count(weight: StoredWeight | JoinedRows) -> int:
    return math.prod(weight.shape)


def _files_worth_linking(used: Weights, fitting: Mapping[str, WeightRef]) -> set[Path]:
    """Files of which at least half of the used numbers fit as they are."""
    total: dict[Path, int] = {}
    fit: dict[Path, int] = {}
    for name, weight in used.items():
        for part in weight.parts if isinstance(weight, JoinedRows) else (weight,):
            path = _path(part)
            total[path] = total.get(path, 0) + _count(part)
            if name in fitting:
                fit[path] = fit.get(path, 0) + _count(part)
    return {path for path, count in fit.items() if 2 * count >= total[path]}


def _path(weight: StoredWeight) -> Path:
    if isinstance(weight, WeightRef):
        return weight.path
    return weight.values.path if isinstance(weight, Fp8Weight) else weight.packed.path


def _link(source: Path, folder: Path) -> tuple[Path, bool]:
    """Gives `folder` the file, and says whether it takes no space."""
    target = folder / source.name
    real = source.resolve()
    try:
        os.link(real, target)
        return target, True
    except OSError as error:
        reason = error.strerror or str(error)
    if _clone(real, target):
        return target, True
    size = real.stat().st_size
    require_space(folder, size)
    _log.warning(
        "copying %s (%.2f GB): the file system does not link it (%s)",
        source.name,
        size / 1e9,
        reason,
    )
    shutil.copyfile(real, target)
    return target, False


def _clone(source: Path, target: Path) -> bool:
    """Makes a reflink; False where the file system has none (btrfs and XFS have)."""
    if sys.platform != "linux":
        return False
    import fcntl

    try:
        with source.open("rb") as old, target.open("xb") as new:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            target.unlink()
        return False
    return True


def require_space(folder: Path, nbytes: int) -> None:
    """Checks free disk before writing.

    Raises:
        CapacityError: less than `nbytes` free.
    """
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise CapacityError(
            f"not enough disk in {folder}: {nbytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB "
            "are free; free some space or choose another folder"
        )


def _convert(weights: Weights, dtype: str, path: Path, component: str) -> None:
    kinds = {
        name: (dtype if _is_float(weight.dtype) else weight.dtype, weight.shape)
        for name, weight in weights.items()
    }
    header = safetensors_header(kinds)
    sizes = {name: _count(weight) * ITEM_SIZE[kinds[name][0]] for name, weight in weights.items()}
    total = sum(sizes.values())
    require_space(path.parent, len(header) + total)
    with (
        path.open("wb") as file,
        tqdm(
            total=total,
            unit="B",
            unit_scale=True,
            desc=f"{component} to {dtype}",
            disable=None,
        ) as bar,
    ):
        file.write(header)
        for name, weight in weights.items():
            _write_tensor(file, name, weight, kinds[name][0])
            bar.update(sizes[name])


def _write_tensor(
    file: BufferedWriter, name: str, weight: StoredWeight | JoinedRows, dtype: str
) -> None:
    if not _is_float(weight.dtype):
        file.write(_read(weight, 0, weight.shape[0] if weight.shape else 1).tobytes())
        return
    rows = weight.shape[0] if weight.shape else 1
    step = max(1, _CHUNK // 4 // max(1, _count(weight) // max(rows, 1)))
    for start in range(0, rows, step):
        piece = _read(weight, start, min(start + step, rows))
        with np.errstate(over="ignore"):
            converted = piece.astype(NUMPY_DTYPES[dtype])
        if not np.isfinite(converted.astype(np.float32)).all():
            raise CheckpointError(
                f"{name}: values that {dtype} cannot hold (or not finite to begin with); export "
                "with another --dtype"
            )
        file.write(converted.tobytes())


def _read(weight: StoredWeight | JoinedRows, start: int, stop: int) -> NDArray[Any]:
    if isinstance(weight, WeightRef):
        return np.atleast_1d(map_weight(weight))[start:stop]
    return weight.read(start, stop)
