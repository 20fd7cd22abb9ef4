"""Where reference sets are kept between requests: on the device, and below that in host memory."""

from dataclasses import asdict, dataclass

from klein_kv.errors import RequestError
from klein_kv.runtime.backends.backend import Backend
from klein_kv.runtime.references.byte_cache import ByteCache
from klein_kv.runtime.references.host_level import open_host_level
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
        budget: the device's.
        host_entries: sets in host memory, those that the device has too included.
        host_bytes: their bytes there.
    """

    hits: int
    restored: int
    misses: int
    evictions: int
    entries: int
    bytes: int
    budget: int
    host_entries: int = 0
    host_bytes: int = 0


class ReferenceStore:
    """Reference sets by digest, least recently used out first.

    Args:
        budget: bytes on the device; 0 keeps none.
        host_budget: bytes of pinned host memory for sets that the device gives up; 0 for none.
        backend: of the device.

    Raises:
        RequestError: a budget below 0; host memory without any on the device, or for a backend
            that has no use for it.
        CapacityError: the system does not pin so much host memory.
    """

    def __init__(self, budget: int, host_budget: int, backend: Backend) -> None:
        if host_budget and not budget:
            raise RequestError(
                "host_cache_bytes is given and reference_cache_bytes is 0, which turns reuse off; "
                "give it a budget"
            )
        self._host = open_host_level(host_budget, backend)
        give_up = self._host.store if self._host is not None else lambda _key, _value: None
        self._device: ByteCache[ReferenceSet] = ByteCache(budget, "a reference set", give_up)
        self._restored = 0

    @property
    def budget(self) -> int:
        """Bytes on the device."""
        return self._device.budget

    @property
    def stats(self) -> StoreStats:
        """Counts since the store was made, and what it holds now."""
        counts = asdict(self._device.stats)
        counts["misses"] -= self._restored
        host = self._host
        held = (0, 0) if host is None else (len(host), host.bytes)
        return StoreStats(
            **counts, restored=self._restored, host_entries=held[0], host_bytes=held[1]
        )

    def on_device(self, digest: str) -> bool:
        """Whether a set is on the device."""
        return digest in self._device

    def __contains__(self, digest: object) -> bool:
        return digest in self._device or (self._host is not None and digest in self._host)

    def get(self, digest: str) -> ReferenceSet | None:
        """A set, which may be on its way to the device; None where it has to be computed."""
        references = self._device.get(digest)
        if references is None and self._host is not None:
            references = self._host.load(digest)
            if references is not None:
                self._restored += 1
                self._device.put(digest, references)
        return references

    def put(self, references: ReferenceSet) -> None:
        """Keeps a set that was computed."""
        self._device.put(references.digest, references)

    def free(self, nbytes: int, keep: str | None = None) -> int:
        """See `ByteCache.free`."""
        return self._device.free(nbytes, keep)

    def clear(self) -> None:
        """Drops all sets that are on the device."""
        self._device.clear()
