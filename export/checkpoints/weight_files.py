"""Weights beside the graphs: linked where their type fits, converted once where it does not."""

import contextlib
import logging
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from klein_kv.artifacts.config import DTYPES, tensor_bytes
from klein_kv.artifacts.weights import (
    NUMPY_DTYPES,
    WeightRef,
    read_header,
    safetensors_header,
)
from klein_kv.errors import CapacityError, CheckpointError
from klein_kv.export.checkpoints.stored_weights import StoredWeight, read_rows, stored_parts

__all__ = ["Placement", "place_weights", "require_space"]

_log = logging.getLogger(__name__)
_CHUNK = 16 << 20  # numbers at a time
_HEADER = 64 << 10  # bytes of a file that are no tensors, about
_FICLONE = 0x40049409
"""linux/fs.h: let one file share the blocks of another, until either is written to."""

Weights = Mapping[str, StoredWeight]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the weights of a component lie now."""

    refs: dict[str, WeightRef]  # each tensor that the graphs use
    sources: dict[Path, Path]  # files that hold the very bytes of a checkpoint's file
    shared: frozenset[Path]  # those of them that take no space of their own


def place_weights(
    weights: Weights, names: Iterable[str], dtype: str, folder: Path, component: str
) -> Placement:
    """Puts a component's weights into the artifact folder.

    A checkpoint's file is linked (hard link, else reflink, else a copy, with a warning) if at least
    half of the numbers used of it can be used as they lie there. All other tensors are converted, a
    piece at a time, into one file.

    `names` are the tensors that the graphs use, `dtype` is the floating point type they want;
    integer tensors stay as they are.

    Raises:
        CapacityError: not enough disk.
        CheckpointError: a value that the wanted type cannot hold.
    """
    used = {name: weights[name] for name in names}
    fitting = {
        name: weight
        for name, weight in used.items()
        if isinstance(weight, WeightRef) and weight.dtype == _target(weight.dtype, dtype)
    }
    total: Counter[Path] = Counter()
    fit: Counter[Path] = Counter()
    for name, weight in used.items():
        for part in stored_parts(weight):
            count = math.prod(part.shape) * (2 if part.dtype == "uint8" else 1)  # of four bits
            total[part.path] += count
            fit[part.path] += count * (name in fitting)
    shared = set()
    targets = {}
    for path in sorted(path for path, count in fit.items() if 0 < total[path] <= 2 * count):
        read = sum(x.nbytes for x in fitting.values() if x.path == path)
        linked = _link(path, folder, copy=2 * read + _HEADER >= path.stat().st_size)
        if linked is not None:
            targets[path], is_shared = linked
            if is_shared:
                shared.add(targets[path])
    refs, rest = {}, {}
    for name, weight in used.items():
        if name in fitting and fitting[name].path in targets:
            refs[name] = replace(fitting[name], path=targets[fitting[name].path])
        else:
            rest[name] = weight
    if rest:
        path = folder / f"{component}.{dtype}.safetensors"
        _convert(rest, dtype, path, component)
        refs |= read_header(path)
    sources = {target: path for path, target in targets.items()}
    return Placement({name: refs[name] for name in used}, sources, frozenset(shared))


def _target(stored: str, dtype: str) -> str:
    """The type that a tensor of type `stored` gets."""
    return dtype if stored in DTYPES.values() or stored.startswith("float8") else stored


def _link(source: Path, folder: Path, *, copy: bool) -> tuple[Path, bool] | None:
    """Gives `folder` the file, and says whether it takes no space.

    None where it would have to be a copy and is not worth one: of a whole pipeline for each part.
    """
    target = folder / source.name
    real = source.resolve()
    try:
        os.link(real, target)
        return target, True
    except OSError as error:
        reason = error.strerror or str(error)
    if _clone(real, target):
        return target, True
    if not copy:
        return None
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
    """A `CapacityError` where less than `nbytes` are free."""
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise CapacityError(
            f"not enough disk in {folder}: {nbytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB "
            "are free; free some space or choose another folder"
        )


def _convert(weights: Weights, dtype: str, path: Path, component: str) -> None:
    kinds = {name: (_target(x.dtype, dtype), x.shape) for name, x in weights.items()}
    header = safetensors_header(kinds)
    total = sum(tensor_bytes(*kind) for kind in kinds.values())
    require_space(path.parent, len(header) + total)
    title = f"{component} to {dtype}"
    with (
        path.open("wb") as file,
        tqdm(total=total, unit="B", unit_scale=True, desc=title, disable=None) as bar,
    ):
        file.write(header)
        for name, weight in weights.items():
            kind, shape = kinds[name]
            rows = shape[0] if shape else 1
            step = max(1, _CHUNK * max(rows, 1) // max(1, math.prod(shape)))
            for start in range(0, rows, step):
                piece = read_rows(weight, start, min(start + step, rows))
                with np.errstate(over="ignore"):
                    converted = piece.astype(NUMPY_DTYPES[kind])
                if not np.isfinite(converted.astype(np.float32)).all():
                    raise CheckpointError(
                        f"{name}: values that {kind} cannot hold (or not finite to begin with); "
                        "export with another --dtype"
                    )
                bar.update(file.write(converted.tobytes()))
