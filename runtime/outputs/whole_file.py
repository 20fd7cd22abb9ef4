"""Files that are written whole or not at all."""

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from klein_kv.errors import CapacityError, RequestError
from klein_kv.unfinished import written_aside

__all__ = ["whole_file"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def whole_file(path: Path, nbytes: int) -> Iterator[BinaryIO]:
    """A file that is written aside and renamed: a failure leaves whatever was there before.

    Raises:
        CapacityError: the disk is full, or a quota is used up; about `nbytes` are needed.
        RequestError: the folder is missing or not writable.
    """
    try:
        with written_aside(path) as file:
            yield file
    except OSError as error:
        if error.errno in _FULL:
            raise CapacityError(
                f"{path} cannot be written: {error.strerror}; about {nbytes / 1e6:.1f} MB are "
                f"needed, {shutil.disk_usage(path.parent).free / 1e6:.1f} MB are free; make room, "
                "or choose another folder"
            ) from error
        raise RequestError(
            f"{path} cannot be written: {error.strerror or error}; expected a file name in a "
            "folder that exists and may be written"
        ) from error
