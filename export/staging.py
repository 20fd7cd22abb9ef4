"""Folders that appear whole or not at all: written aside, then renamed or moved from."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from klein_kv.errors import CapacityError, RequestError
from klein_kv.unfinished import held, partial_path, remove_leftovers

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
    """A hidden folder in `parent`, gone afterwards, and with it what killed runs left.

    `name` is of what is written; the `CapacityError` for whatever the operating system raises names
    `target`.
    """
    partial = partial_path(parent, name)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(parent)
        partial.mkdir()
        with held(partial):
            yield partial
    except OSError as error:
        raise CapacityError(
            f"cannot write {target}: {error.strerror or error}; choose a folder that is writable "
            "and has room"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
