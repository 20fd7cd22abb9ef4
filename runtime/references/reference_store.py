"""Where reference sets are kept between requests: in memory, and below that in a folder.

The first level is a `ByteCache` of `ReferenceSet` by digest. Sets that it gives up go to a
`ReferenceFolder`, if there is one, and come back by mapping their file. Below device memory a
`host_level.HostLevel` may stand between the two.
"""

import contextlib
import logging
import os
import re
import threading
import time
from pathlib import Path

from klein_kv.artifacts.config import TransformerConfig
from klein_kv.errors import KleinKVError, RequestError
from klein_kv.runtime.references.byte_cache import ByteCache
from klein_kv.runtime.references.reference_file import (
    Saveable,
    load_references,
    reference_file_bytes,
    save_references,
)
from klein_kv.runtime.references.reference_set import KVOrigin, ReferenceSet
from klein_kv.runtime.session import Session

__all__ = ["ReferenceFolder", "ReferenceStore"]

_log = logging.getLogger(__name__)
_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
_STALE_SECONDS = 3600

ReferenceStore = ByteCache[ReferenceSet]
"""Reference sets by digest."""


class ReferenceFolder:
    """Reference sets as files named by their digest; the longest unused ones go first.

    Several processes may share a folder. Files of other weights are never read: their digests
    differ, and what a file says of itself is checked too.

    Args:
        folder: made if need be. Nothing but this cache's own files is touched in it.
        budget: bytes of all files together.
        session: where loaded sets go.
        origin: what sets must have been made with.
        net: the network they must fit.

    Raises:
        RequestError: the folder cannot be made, or a budget below 0.
    """

    def __init__(
        self,
        folder: Path,
        budget: int,
        session: Session,
        origin: KVOrigin,
        net: TransformerConfig,
    ) -> None:
        if budget < 0:
            raise RequestError(f"the folder's budget is {budget} bytes, expected 0 or more")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(
                f"reference cache folder {folder} cannot be made: {error.strerror}"
            ) from error
        self.folder = folder
        self.budget = budget
        self._session, self._origin, self._net = session, origin, net
        self._lock = threading.Lock()
        for partial in folder.glob(".*.part"):  # of a process that was killed
            with contextlib.suppress(OSError):
                if time.time() - partial.stat().st_mtime > _STALE_SECONDS:
                    partial.unlink()

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size, _ in self._files())

    def load(self, key: str) -> ReferenceSet | None:
        """The set of that digest; None where there is no file, or none that can be used."""
        path = self._path(key)
        if not path.exists():
            return None
        try:
            found = load_references(path, self._session, self._origin, self._net)
        except KleinKVError as error:
            _log.warning("dropping a cached reference set: %s", error)
            self._remove(path)
            return None
        if found.digest != key:
            _log.warning("dropping %s: it holds another reference set, %s", path, found.digest)
            self._remove(path)
            return None
        self._touch(path)
        return found

    def store(self, key: str, value: Saveable) -> None:
        """Writes a set, unless it is there already or larger than the budget."""
        path = self._path(key)
        with self._lock:
            if path.exists():
                self._touch(path)
                return
            size = reference_file_bytes(value)
            if size > self.budget:
                return
            self._make_room(size)
            try:
                save_references(value, path)
            except KleinKVError as error:
                _log.warning("reference set not kept: %s", error)

    def _make_room(self, size: int) -> None:
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        for _, old, path in files:
            if total + size <= self.budget:
                return
            self._remove(path)
            total -= old

    def _files(self) -> list[tuple[float, int, Path]]:
        """Time of last use, size and path of each file."""
        found = []
        with contextlib.suppress(OSError):  # of a folder that was removed meanwhile
            for path in self.folder.iterdir():
                if _NAME.fullmatch(path.name):
                    with contextlib.suppress(OSError):  # another process may remove it meanwhile
                        stat = path.stat()
                        found.append((stat.st_mtime, stat.st_size, path))
        return found

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _touch(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            os.utime(path)

    def _remove(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            path.unlink()
