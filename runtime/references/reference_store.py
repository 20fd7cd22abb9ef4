"""Where reference sets are kept between requests: on the device, and below that in host memory.

A set that a GPU gives up is copied to pinned host memory, and comes back when it is asked for: the
2 GiB of one 1024x1024 reference of klein 9B take about 50 ms over PCIe 5 x16 (derived), encoding it
again a third of a second or more.
"""

import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from klein_kv.errors import CapacityError, RequestError
from klein_kv.runtime.backends.backend import Backend, Buffer
from klein_kv.runtime.references.byte_cache import ByteCache
from klein_kv.runtime.references.reference_set import ReferenceSet

__all__ = ["ReferenceStore", "StoreStats"]

_log = logging.getLogger(__name__)


class HostStore(Protocol):
    """Host memory that a device copies to and from quickly."""

    def size(self, nbytes: int) -> int:
        """Bytes that a copy of so many bytes takes."""

    def keep(self, buffers: Mapping[str, Buffer]) -> Any:
        """Copies buffers to the host, done with them on return; the copy has `nbytes`.

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


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What a store did and holds."""

    hits: int  # sets found on the device
    restored: int  # sets that came back from host memory
    misses: int  # sets that had to be computed, or were loaded from a file
    evictions: int  # sets that the device gave up for others
    entries: int  # sets on the device
    bytes: int  # of these; never above the budget
    host_entries: int  # sets in host memory, those that the device has too included
    host_bytes: int  # of these; never above their budget


class ReferenceStore(ByteCache[ReferenceSet]):
    """Reference sets by digest, on the device, and those that it gave up in host memory.

    Budgets are bytes; 0 keeps none. A set that went back to the device keeps its copy as long as
    nothing else needs the room, so giving it up another time copies nothing.

    Raises:
        RequestError: a budget below 0; host memory without any on the device, or for a backend
            that has no use for it.
        CapacityError: the system does not pin so much host memory.
    """

    def __init__(self, budget: int, host_budget: int, backend: Backend) -> None:
        if host_budget < 0:
            raise RequestError(f"host_cache_bytes is {host_budget}, expected 0 or more")
        if host_budget and not budget:
            raise RequestError(
                "host_cache_bytes is given and reference_cache_bytes is 0, which turns reuse off; "
                "give it a budget"
            )
        super().__init__(budget, "a reference set")
        self._restored = 0
        self._host: HostStore | None = None
        self._host_budget = host_budget
        # Copies, and their sets without keys and values; least recently used first.
        self._copies: OrderedDict[str, tuple[Any, ReferenceSet]] = OrderedDict()
        if host_budget:
            if not isinstance(backend, DeviceBackend):
                raise RequestError(
                    f"host_cache_bytes is {host_budget}, which backend {backend.name} cannot use: "
                    "its keys and values are in host memory already, or it has no second stream "
                    "to copy them on; give the bytes to reference_cache_bytes"
                )
            self._host = backend.host_store(host_budget)

    @property
    def stats(self) -> StoreStats:
        """Counts since the store was made, and what it holds now."""
        return StoreStats(
            hits=self.hits,
            restored=self._restored,
            misses=self.misses - self._restored,
            evictions=self.evictions,
            entries=len(self),
            bytes=self.nbytes,
            host_entries=len(self._copies),
            host_bytes=self._host_bytes(),
        )

    def get(self, key: str) -> ReferenceSet | None:
        """A set, which may be on its way to the device; None where it has to be computed."""
        references = super().get(key)
        if references is None and self._host is not None and key in self._copies:
            copy, without_kv = self._copies[key]
            self._copies.move_to_end(key, last=False)  # the first to go: the device has it
            references = replace(without_kv, kv=self._host.restore(copy))
            self._restored += 1
            self.put(key, references)
        return references

    def _host_bytes(self) -> int:
        return sum(copy.nbytes for copy, _ in self._copies.values())

    def _give_up(self, key: str, value: ReferenceSet) -> None:
        """Copies a set to the host, if it finds room; done with its buffers on return."""
        if self._host is None:
            return
        if key in self._copies:
            self._copies.move_to_end(key)
            return
        size = self._host.size(value.nbytes)
        if size > self._host_budget:
            return
        while self._host_bytes() + size > self._host_budget:
            self._copies.popitem(last=False)
        try:
            copy = self._host.keep(value.kv)
        except CapacityError as error:
            _log.warning("a reference set is not kept in host memory: %s", error)
            return
        self._copies[key] = copy, replace(value, kv={})
