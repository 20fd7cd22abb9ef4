"""Folders that appear whole or not at all: written aside, then renamed or moved from."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

from klein_kv.errors import CapacityError, RequestError

__all__ = ["new_folder", "partial_folder"]


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that becomes `target` on success and is removed otherwise.

    Raises:
        RequestError: `target` is there and is no empty folder.
        CapacityError: whatever the operating system raised.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RequestError(
            f"{target} already exists and is not an empty folder; remove it or choose another name"
        )
    target = target.absolute()  # so that "." has a parent and a name
    with partial_folder(target.parent, target.name, target) as partial:
        yield partial
        if target.exists():  # Windows renames onto no folder, not even an empty one
            target.rmdir()
        partial.rename(target)


@contextlib.contextmanager
def partial_folder(parent: Path, name: str, target: Path) -> Iterator[Path]:
    """`.NAME.partial-PID` in `parent`, gone afterwards, and with it what killed runs left.

    Args:
        parent: made if it is not there.
        name: of what is written.
        target: what messages name.

    Raises:
        CapacityError: whatever the operating system raised.
    """
    prefix = f".{name}.partial-"
    partial = parent / f"{prefix}{os.getpid()}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for old in parent.iterdir():
            pid = old.name.removeprefix(prefix)
            if old == partial or (
                old.name.startswith(prefix) and pid.isdigit() and not psutil.pid_exists(int(pid))
            ):
                shutil.rmtree(old, ignore_errors=True)
        partial.mkdir()
        yield partial
    except OSError as error:
        raise CapacityError(
            f"cannot write {target}: {error.strerror or error}; choose a folder that is writable "
            "and has room"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
