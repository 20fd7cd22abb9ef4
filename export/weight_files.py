"""Weights beside the graphs: linked where their type fits, converted once where it does not."""

import logging
import os
import shutil
from collections.abc import Iterable
from io import BufferedWriter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from klein_kv.config import ITEM_SIZE
from klein_kv.errors import CapacityError, CheckpointError
from klein_kv.weights import (
    NUMPY_DTYPES,
    WeightIndex,
    WeightRef,
    map_weight,
    read_header,
    safetensors_header,
)

__all__ = ["place_weights"]

_log = logging.getLogger(__name__)
_FLOATS = ("float32", "float16", "bfloat16")
_CHUNK = 64 << 20


def place_weights(
    index: WeightIndex, names: Iterable[str], dtype: str, folder: Path
) -> dict[str, WeightRef]:
    """Puts a component's weights into the artifact folder.

    Where every tensor already has the wanted type, the checkpoint's own files are hard-linked (or
    copied, with a warning, where the file system cannot link). Otherwise the named tensors are
    converted one piece at a time into one file.

    Args:
        index: the component's tensors.
        names: the tensors that the graphs use.
        dtype: wanted floating point type; integer tensors stay as they are.
        folder: the component's folder inside the artifact folder; must exist.

    Returns:
        Where each named tensor lies now.

    Raises:
        CapacityError: not enough disk.
        CheckpointError: a value that the wanted type cannot hold, or a type that is not a float.
    """
    refs = {name: index[name] for name in names}
    if all(ref.dtype == dtype or ref.dtype not in _FLOATS for ref in refs.values()):
        targets = {path: _link(path, folder) for path in {ref.path for ref in refs.values()}}
        return {
            name: WeightRef(targets[ref.path], ref.offset, ref.nbytes, ref.dtype, ref.shape)
            for name, ref in refs.items()
        }
    path = folder / f"{index.component}.{dtype}.safetensors"
    _convert(refs, dtype, path, index.component)
    return {name: ref for name, ref in read_header(path).items() if name in refs}


def _link(source: Path, folder: Path) -> Path:
    target = folder / source.name
    real = source.resolve()
    try:
        os.link(real, target)
    except OSError as error:
        size = real.stat().st_size
        require_space(folder, size)
        _log.warning(
            "copying %s (%.2f GB): the file system does not link it (%s)",
            source.name,
            size / 1e9,
            error.strerror,
        )
        shutil.copyfile(real, target)
    return target


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


def _convert(refs: dict[str, WeightRef], dtype: str, path: Path, component: str) -> None:
    kinds = {
        name: (dtype if ref.dtype in _FLOATS else ref.dtype, ref.shape)
        for name, ref in refs.items()
    }
    header = safetensors_header(kinds)
    sizes = [ref.nbytes // ITEM_SIZE[ref.dtype] * ITEM_SIZE[kinds[n][0]] for n, ref in refs.items()]
    require_space(path.parent, len(header) + sum(sizes))
    with (
        path.open("wb") as file,
        tqdm(
            total=sum(sizes),
            unit="B",
            unit_scale=True,
            desc=f"{component} to {dtype}",
            disable=None,
        ) as bar,
    ):
        file.write(header)
        for (name, ref), size in zip(refs.items(), sizes, strict=True):
            _write_tensor(file, name, ref, kinds[name][0])
            bar.update(size)


def _write_tensor(file: BufferedWriter, name: str, ref: WeightRef, dtype: str) -> None:
    flat = map_weight(ref).reshape(-1)
    if ref.dtype not in _FLOATS:
        file.write(flat.tobytes())
        return
    step = _CHUNK // 4
    for start in range(0, flat.size, step):
        piece = flat[start : start + step]
        with np.errstate(over="ignore"):
            converted = piece.astype(NUMPY_DTYPES[dtype])
        if not np.isfinite(converted.astype(np.float32)).all():
            raise CheckpointError(
                f"{name}: values that {dtype} cannot hold (or not finite to begin with); export "
                "with another --dtype"
            )
        file.write(converted.tobytes())
