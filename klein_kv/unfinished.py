"""What is being written: named after its process, locked, and known when that is gone.

Files and folders get their own name only when they are whole. What a killed process leaves is
removed by the next one that writes to the same place.
"""

import contextlib
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import psutil

__all__ = ["held", "partial_path", "remove_leftovers", "written_aside"]

_log = logging.getLogger(__name__)
_NAME = re.compile(r"\..+\.partial-(\d+)(-[0-9a-f]{8})?")


def partial_path(parent: Path, name: str) -> Path:
    """A name that nothing else has, for a file or folder that is to become `name`."""
    return parent / f".{name}.partial-{os.getpid()}-{secrets.token_hex(4)}"


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name once it is whole: a failure leaves whatever was there before."""
    remove_leftovers(path.parent)
    partial = partial_path(path.parent, "klein")
    try:
        with partial.open("xb") as file, held(partial):
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):  # gone if all went well
            partial.unlink()


def remove_leftovers(parent: Path) -> None:
    """Removes from a folder what processes that are gone were writing, with a line in the log."""
    try:
        paths = list(parent.iterdir())
    except OSError:  # who writes there next will say why
        return
    for path in paths:
        match = _NAME.fullmatch(path.name)
        if match is None or _is_alive(int(match[1]), path):
            continue
        with held(path) as free:
            if not free:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()
        if not path.exists():
            _log.info("removed %s, which a process that is gone left there", path)


def _is_alive(pid: int, path: Path) -> bool:
    """Whether the process runs that made this; one that is younger has its number by chance."""
    try:
        return bool(psutil.Process(pid).create_time() <= path.stat().st_mtime + 1)
    except psutil.NoSuchProcess:
        return False
    except (psutil.Error, OSError):  # nothing is known of it
        return True


@contextlib.contextmanager
def held(path: Path) -> Iterator[bool]:
    """Locks a file or folder, so that another container sees that it is in use.

    False if somebody else has it already, or it is not there.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no processes of other containers to ask
        yield True
        return
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # gone, or another user's
        yield False
        return
    try:
        free = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError:
            _log.debug("%s is on a file system without locks", path)
        yield free
    finally:
        os.close(handle)
