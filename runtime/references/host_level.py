"""Reference sets in host memory, below a store in device memory.

A set that the store gives up is copied to the host, and comes back when it is asked for: klein 9B's
2 GiB per 1024x1024 reference take about 50 ms over PCIe 5 x16 (derived), encoding it again a third
of a second or more. What this level has no room for goes to the folder below it, if there is one.
"""

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from klein_kv.artifacts.signature import TensorSpec
from klein_kv.errors import CapacityError, RequestError
from klein_kv.runtime.backends.backend import Backend, Buffer
from klein_kv.runtime.references.byte_cache import ByteCache, CacheStats
from klein_kv.runtime.references.reference_file import Saveable
from klein_kv.runtime.references.reference_set import KVOrigin, ReferenceSet
from klein_kv.runtime.references.reference_store import ReferenceFolder

__all__ = ["DeviceBackend", "HostCopy", "HostLevel", "HostSet", "HostStore", "open_host_level"]

_log = logging.getLogger(__name__)


class HostCopy(Protocol):
    """Tensors that a device handed over, in host memory."""

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that it takes."""

    def array(self, name: str) -> NDArray[Any]:
        """One tensor."""


class HostStore(Protocol):
    """Host memory that a device copies to and from quickly."""

    def size(self, nbytes: int) -> int:
        """Bytes that a copy of so many bytes takes."""

    def keep(self, buffers: Mapping[str, Buffer]) -> HostCopy:
        """Copies buffers to the host; done with them on return.

        Raises:
            CapacityError: no room.
        """

    def restore(self, copy: Any) -> dict[str, Buffer]:
        """Starts copying to the device; the buffers may be used at once, in `Backend.run` too."""


@runtime_checkable
class DeviceBackend(Backend, Protocol):
    """A backend whose buffers are not in host memory."""

    def host_store(self, budget: int) -> HostStore:
        """Host memory for copies, at most `budget` bytes."""


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class HostSet:
    """A reference set whose keys and values are in host memory.

    Attributes:
        copy: keys and values.
        like: the set without them.
    """

    copy: HostCopy = field(repr=False)
    like: ReferenceSet

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""
        return self.copy.nbytes

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """See `ReferenceSet`."""
        return self.like.tensors

    @property
    def origin(self) -> KVOrigin:
        """See `ReferenceSet`."""
        return self.like.origin

    @property
    def images(self) -> str:
        """See `ReferenceSet`."""
        return self.like.images

    @property
    def first_size(self) -> tuple[int, int]:
        """See `ReferenceSet`."""
        return self.like.first_size

    def array(self, name: str) -> NDArray[Any]:
        """One tensor."""
        return self.copy.array(name)


class HostLevel:
    """A `SecondLevel` in host memory, least recently used out first.

    Sets that were lent to the device keep their copy as long as nothing else needs the room.

    Args:
        budget: bytes of host memory.
        backend: whose device the sets come from and go to.
        folder: where sets go that this level gives up.
    """

    def __init__(
        self, budget: int, backend: DeviceBackend, folder: ReferenceFolder | None = None
    ) -> None:
        self.folder = folder
        self._lent: set[str] = set()
        below = None if folder is None else _Files(folder, self._lent)
        self._sets: ByteCache[HostSet] = ByteCache(budget, below)
        self._memory = backend.host_store(budget)
        self._lock = threading.Lock()

    @property
    def stats(self) -> CacheStats:
        """What this level did and holds; only hits, evictions and what it holds mean something."""
        return self._sets.stats

    def load(self, key: str) -> ReferenceSet | None:
        """The set of that digest, on its way to the device; None where it is not here either."""
        held = self._sets.find(key)
        if held is None:
            return None if self.folder is None else self.folder.load(key)
        restored = replace(held.like, kv=self._memory.restore(held.copy))
        self._lent.add(key)
        self._sets.demote(key)
        return restored

    def store(self, key: str, value: ReferenceSet) -> None:
        """Copies a set to the host, or else to the folder; done with its buffers on return."""
        with self._lock:
            self._lent.discard(key)
            if self._sets.touch(key):
                return
            try:
                self._keep(key, value)
            except CapacityError as error:
                _log.warning("reference set not kept in host memory: %s", error)
                self._give_up(key, value)

    def _keep(self, key: str, value: ReferenceSet) -> None:
        size, stats = self._memory.size(value.nbytes), self._sets.stats
        if size > stats.budget:
            self._give_up(key, value)
            return
        self._sets.free(stats.bytes + size - stats.budget)  # first: never more than the budget
        copy = self._memory.keep(value.kv)
        self._sets.put(key, HostSet(copy, replace(value, kv={})))

    def _give_up(self, key: str, value: Saveable) -> None:
        if self.folder is not None:
            self.folder.store(key, value)


class _Files:
    """The folder as the level below: it takes sets, and gives them to the device directly."""

    def __init__(self, folder: ReferenceFolder, lent: set[str]) -> None:
        self._folder = folder
        self._lent = lent

    def load(self, _key: str) -> HostSet | None:
        return None

    def store(self, key: str, value: HostSet) -> None:
        if key in self._lent:  # the device has it, and will hand it down again
            self._lent.discard(key)
        else:
            self._folder.store(key, value)


def open_host_level(
    budget: int, backend: Backend, folder: ReferenceFolder | None
) -> HostLevel | None:
    """The level in host memory, if one is wanted.

    Args:
        budget: bytes; 0 for none.
        backend: of the store above.
        folder: the level below.

    Raises:
        RequestError: a budget below 0, or the backend has nothing to do with host memory.
    """
    if budget < 0:
        raise RequestError(f"host_cache_bytes is {budget}, expected 0 or more")
    if budget == 0:
        return None
    if not isinstance(backend, DeviceBackend):
        raise RequestError(
            f"host_cache_bytes is {budget}, which backend {backend.name} cannot use: its keys and "
            "values are in host memory already, or it has no second stream to copy them on; give "
            "the bytes to reference_cache_bytes"
        )
    return HostLevel(budget, backend, folder)
