"""What is kept for a while: uploaded references, images behind a URL, results to be asked for."""

import math
import time
from collections import OrderedDict
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
    """Values by key until their time is over, or room is needed: least recently used go first.

    Args:
        most_bytes: of all values.
        most: values.
        share: of both limits, what one owner may have: what comes then displaces the owner's own.

    Used on the event loop alone.
    """

    def __init__(self, most_bytes: int, most: int = 10_000, share: float = 1.0) -> None:
        self._limits = (most_bytes, most)
        self._own_limits = (int(most_bytes * share), max(1, int(most * share)))
        self._entries: OrderedDict[str, _Entry[V]] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Of all values."""
        return sum(entry.nbytes for entry in self._entries.values())

    def fits(self, nbytes: int) -> bool:
        """Whether so much is not too much for one owner."""
        return nbytes <= self._own_limits[0]

    def put(
        self,
        key: str,
        value: V,
        nbytes: int,
        *,
        owner: str = "",
        ttl_s: float = math.inf,
        param: str | None = None,
    ) -> None:
        """Keeps a value; refuses one, the field `param`, that is more than the owner may have."""
        if not self.fits(nbytes):
            text = "the images are larger than what is kept on this server"
            raise ServiceError("payload_too_large", text, param)
        self._entries.pop(key, None)
        now = time.monotonic()
        for old in [old for old, entry in self._entries.items() if entry.end <= now]:
            self.drop(old)
        own = [old for old, entry in self._entries.items() if entry.owner == owner]
        self._make_room(own, nbytes, *self._own_limits)
        self._make_room(list(self._entries), nbytes, *self._limits)
        self._entries[key] = _Entry(value, owner, nbytes, now + ttl_s)

    def get(self, key: str) -> V | None:
        """The value, while it is there."""
        entry = self._entries.get(key)
        if entry is None or entry.end <= time.monotonic():
            return None
        self._entries.move_to_end(key)
        return entry.value

    def drop(self, key: str) -> None:
        """Forgets a value that is there."""
        del self._entries[key]

    def _make_room(self, keys: list[str], more: int, most_bytes: int, most: int) -> None:
        """Drops the first of these, until one of `more` bytes goes beside the rest."""
        count, nbytes = len(keys), sum(self._entries[key].nbytes for key in keys)
        for key in keys:
            if nbytes + more <= most_bytes and count < most:
                return
            count, nbytes = count - 1, nbytes - self._entries[key].nbytes
            self.drop(key)
