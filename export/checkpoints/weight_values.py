"""Whether a checkpoint's weights are numbers: no NaN, no infinity, no holes.

A file up to 256 MiB is read whole, as it is for its digest. Of a larger one, 16 blocks of 64 KiB of
every tensor are read, with the first and the last of each: enough for a layer that overflowed in
training, and for a download into a file of full size that never ended.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klein_kv.artifacts.digest import WHOLE_FILE_LIMIT
from klein_kv.artifacts.weights import NUMPY_DTYPES, WeightRef
from klein_kv.errors import CheckpointError
from klein_kv.export.checkpoints.stored_weights import StoredWeight, stored_parts

__all__ = ["check_values"]

_BLOCK = 64 << 10
_BLOCKS = 16
_TAIL = 4 << 10
_SPARSE = ("embed_tokens",)  # rows of tokens that no text has may well be zero


def check_values(
    weights: Mapping[str, StoredWeight], names: Iterable[str], allow_zeros: bool = False
) -> None:
    """Reads samples of the named tensors.

    A `CheckpointError` tells of the first that is not finite, and unless `allow_zeros` is set of
    zeros where no network has them: all of a matrix, 64 KiB of it, or the end of a file.
    """
    files: dict[Path, int] = {}
    for name in names:
        for ref in stored_parts(weights[name]):
            if ref.path not in files:
                files[ref.path] = ref.path.stat().st_size
                if not allow_zeros:
                    _check_tail(ref.path, files[ref.path])
            dense = not allow_zeros and len(ref.shape) > 1 and not any(x in name for x in _SPARSE)
            for block in _blocks(ref, whole=files[ref.path] <= WHOLE_FILE_LIMIT):
                if dense and not block.view(np.uint8).any():
                    raise CheckpointError(
                        f"{ref.path}: {name} of shape {ref.shape} holds zeros alone where numbers "
                        "are expected, as a download that did not end leaves them; download the "
                        "file again, or allow them (--allow-zeros)"
                    )
                if ref.dtype != "uint8" and not np.isfinite(block.astype(np.float32)).all():
                    raise CheckpointError(
                        f"{ref.path}: {name} of shape {ref.shape} holds numbers that are not "
                        "finite (NaN or infinity), expected finite ones: the weights were broken "
                        "when they were made (training, merging, or a cast to fp16); take another "
                        "file of this model"
                    )


def _check_tail(path: Path, size: int) -> None:
    with path.open("rb") as file:
        file.seek(max(0, size - _TAIL))
        if size > 2 * _TAIL and not any(file.read()):
            raise CheckpointError(
                f"{path} ends in zeros: room was made for its {size / 1e9:.2f} GB, but the "
                "download did not end; download it again, or allow them (--allow-zeros)"
            )


def _blocks(ref: WeightRef, *, whole: bool) -> Iterator[NDArray[Any]]:
    """Blocks of a tensor; read, not mapped: a page of a mapped file costs far more than a read."""
    dtype = NUMPY_DTYPES.get(ref.dtype, np.dtype(np.uint8))
    count = -(-ref.nbytes // _BLOCK)
    last = max(0, ref.nbytes - _BLOCK)
    with ref.path.open("rb", buffering=0) as file:
        for i in range(count if whole else min(count, _BLOCKS)):
            start = i * _BLOCK if whole else last * i // max(1, min(count, _BLOCKS) - 1)
            file.seek(ref.offset + start - start % dtype.itemsize)
            content = file.read(min(_BLOCK, ref.nbytes - start))
            yield np.frombuffer(content, dtype, len(content) // dtype.itemsize)
