"""What is kept for a while: images behind a URL, uploads, results to be asked for."""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from klein_kv.runtime.serving.errors import ServiceError

__all__ = ["Kept"]

V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class _Entry(Generic[V]):
    value: V
    owner: str
    nbytes: int
    end: float


class Kept(Generic[V]):
    """Values by key until their time is over, or until room is needed: the oldest go first.

    Args:
        most_bytes: of all values.
        most: values.
        share: of both limits, what one owner may have: what comes then displaces the owner's own.
        clock: seconds.

    Used on the event loop alone.
    """

    def __init__(
        self,
        most_bytes: int,
        most: int = 10_000,
        share: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = (most_bytes, most)
        self._own_limits = (int(most_bytes * share), max(1, int(most * share)))
        self._clock = clock
        self._entries: OrderedDict[str, _Entry[V]] = OrderedDict()
        self._bytes: dict[str, int] = {}
        self._counts: dict[str, int] = {}

    @property
    def nbytes(self) -> int:
        """Of all values."""
        return sum(self._bytes.values())

    def __len__(self) -> int:
        return len(self._entries)

    def fits(self, nbytes: int) -> bool:
        """Whether so much is not too much for one owner."""
        return nbytes <= self._own_limits[0]

    def put(self, key: str, value: V, *, owner: str, nbytes: int, ttl_s: float) -> None:
        """Keeps a value under a key that nothing is kept under.

        Raises:
            ServiceError: it alone is more than the owner may have.
        """
        if not self.fits(nbytes):
            raise ServiceError(
                "payload_too_large", "the images are larger than what is kept on this server"
            )
        now = self._clock()
        for old in [old for old, entry in self._entries.items() if entry.end <= now]:
            self.drop(old)
        while self._too_much(self._bytes.get(owner, 0), self._counts.get(owner, 0), nbytes, True):
            self.drop(next(old for old, entry in self._entries.items() if entry.owner == owner))
        while self._too_much(self.nbytes, len(self), nbytes, False):
            self.drop(next(iter(self._entries)))
        self._entries[key] = _Entry(value, owner, nbytes, now + ttl_s)
        self._bytes[owner] = self._bytes.get(owner, 0) + nbytes
        self._counts[owner] = self._counts.get(owner, 0) + 1

    def get(self, key: str) -> V | None:
        """The value, while it is there."""
        entry = self._entries.get(key)
        return entry.value if entry is not None and entry.end > self._clock() else None

    def drop(self, key: str) -> None:
        """Forgets a value that is there."""
        entry = self._entries.pop(key)
        self._bytes[entry.owner] -= entry.nbytes
        self._counts[entry.owner] -= 1
        if not self._counts[entry.owner]:
            del self._bytes[entry.owner], self._counts[entry.owner]

    def _too_much(self, nbytes: int, count: int, more: int, own: bool) -> bool:
        most_bytes, most = self._own_limits if own else self._limits
        return nbytes + more > most_bytes or count >= most
