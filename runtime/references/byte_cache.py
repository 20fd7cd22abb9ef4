"""A cache with a budget in bytes, least recently used out first.

A value that was given up but is still in use somewhere is found again instead of being made a
second time. One thread at a time changes it: the pipeline's lock sees to that.
"""

import logging
import weakref
from collections import OrderedDict
from typing import Generic, Protocol, TypeVar

from klein_kv.errors import RequestError

__all__ = ["ByteCache"]

_log = logging.getLogger(__name__)


class HasBytes(Protocol):
    """A value that knows its size."""

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""


V = TypeVar("V", bound=HasBytes)


class ByteCache(Generic[V]):
    """Values by key, at most `budget` bytes of them.

    Counts hits, misses (values that were made and offered) and evictions. A budget of 0 keeps
    nothing, one below is a `RequestError`; `what` is a value, for the log: "a reference set".
    """

    def __init__(self, budget: int, what: str) -> None:
        if not isinstance(budget, int | float) or not budget >= 0:
            raise RequestError(f"the budget of {what} is {budget!r} bytes, expected 0 or more")
        self.budget = budget
        self.hits = self.misses = self.evictions = 0
        self._what = what
        self._entries: OrderedDict[str, V] = OrderedDict()  # oldest use first
        self._alive: weakref.WeakValueDictionary[str, V] = weakref.WeakValueDictionary()

    @property
    def nbytes(self) -> int:
        """Bytes of all values; never above the budget."""
        return sum(value.nbytes for value in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        """Whether the value is at hand; counts as no use."""
        return bool(self.budget) and (key in self._entries or key in self._alive)

    def get(self, key: str) -> V | None:
        """The value; None where it has to be made."""
        if key not in self:
            return None
        value = self._entries[key] if key in self._entries else self._alive[key]
        self.hits += 1
        self._admit(key, value)
        return value

    def put(self, key: str, value: V) -> None:
        """Keeps a value that was made, if the budget holds it."""
        self.misses += 1
        if self.budget:
            self._admit(key, value)

    def free(self, nbytes: int, keep: str | None = None) -> int:
        """Gives up values but `keep` until so many bytes, or all, are gone; returns how many."""
        before = self.nbytes
        self._shrink(before - nbytes, keep)
        return before - self.nbytes

    def clear(self) -> None:
        """Drops everything, without giving it to anybody."""
        self._entries.clear()

    def _admit(self, key: str, value: V) -> None:
        self._alive[key] = value
        if key in self._entries:
            self._entries.move_to_end(key)
        elif value.nbytes > self.budget:
            _log.info(
                "%s of %.2f GB is not kept: the budget is %.2f GB",
                self._what,
                value.nbytes / 1e9,
                self.budget / 1e9,
            )
            self._give_up(key, value)
        else:
            self._shrink(self.budget - value.nbytes)
            self._entries[key] = value

    def _shrink(self, limit: int, keep: str | None = None) -> None:
        for key in [key for key in self._entries if key != keep]:
            if self.nbytes <= limit:
                return
            self.evictions += 1
            self._give_up(key, self._entries.pop(key))

    def _give_up(self, key: str, value: V) -> None:
        """Called with each value that makes room for others, or finds none itself."""
