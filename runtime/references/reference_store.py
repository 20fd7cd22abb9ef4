"""Where reference sets are kept between requests: on the device, and below that in host memory."""

from dataclasses import dataclass

from klein_kv.errors import RequestError
from klein_kv.runtime.backends.backend import Backend
from klein_kv.runtime.references.byte_cache import ByteCache
from klein_kv.runtime.references.host_level import DeviceBackend, HostLevel
from klein_kv.runtime.references.reference_set import ReferenceSet

__all__ = ["ReferenceStore", "StoreStats"]


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What a store did and holds.

    Attributes:
        hits: sets found on the device.
        restored: sets that came back from host memory.
        misses: sets that had to be computed, or were loaded from a file.
        evictions: sets that the device gave up for others.
        entries: sets on the device.
        bytes: their bytes; never above the budget.
        host_entries: sets in host memory, those that the device has too included.
        host_bytes: their bytes there.
    """

    hits: int
    restored: int
    misses: int
    evictions: int
    entries: int
    bytes: int
    host_entries: int
    host_bytes: int


class ReferenceStore(ByteCache[ReferenceSet]):
    """Reference sets by digest, on the device, and those that it gave up in host memory.

    Budgets are bytes; 0 keeps none.

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
        self._host: HostLevel | None = None
        self._restored = 0
        if host_budget:
            if not isinstance(backend, DeviceBackend):
                raise RequestError(
                    f"host_cache_bytes is {host_budget}, which backend {backend.name} cannot use: "
                    "its keys and values are in host memory already, or it has no second stream "
                    "to copy them on; give the bytes to reference_cache_bytes"
                )
            self._host = HostLevel(host_budget, backend)

    @property
    def stats(self) -> StoreStats:
        """Counts since the store was made, and what it holds now."""
        host = self._host
        return StoreStats(
            hits=self.hits,
            restored=self._restored,
            misses=self.misses - self._restored,
            evictions=self.evictions,
            entries=len(self),
            bytes=self.nbytes,
            host_entries=0 if host is None else len(host),
            host_bytes=0 if host is None else host.nbytes,
        )

    def get(self, key: str) -> ReferenceSet | None:
        """A set, which may be on its way to the device; None where it has to be computed."""
        references = super().get(key)
        if references is None and self._host is not None:
            references = self._host.load(key)
            if references is not None:
                self._restored += 1
                self.put(key, references)
        return references

    def _give_up(self, key: str, value: ReferenceSet) -> None:
        if self._host is not None:
            self._host.store(key, value)
