"""A cache with a budget in bytes, least recently used out first, that many threads may ask at once.

Values are computed outside the lock, once: who asks for a key that another thread is computing
waits for it. A value that was evicted but is still in use somewhere is found again instead of being
made a second time.
"""

import contextlib
import functools
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from klein_kv.errors import CapacityError, RequestError

_log = logging.getLogger(__name__)

__all__ = ["ByteCache", "CacheStats", "Claim", "SecondLevel"]


class HasBytes(Protocol):
    """A value that knows its size."""

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""


V = TypeVar("V", bound=HasBytes)


class SecondLevel(Protocol[V]):
    """Where evicted values go, and come back from. Never raises for want of space."""

    def load(self, key: str) -> V | None:
        """The value, or None where this level does not have it."""

    def store(self, key: str, value: V) -> None:
        """Keeps a value that the first level gave up, if it can."""


@dataclass(frozen=True, slots=True)
class CacheStats:
    """What a cache did and holds.

    Attributes:
        hits: values found in memory.
        restored: values that came back from the second level.
        misses: values that had to be computed.
        evictions: values given up for others.
        entries: values held.
        bytes: bytes held; never above the budget.
        pinned_bytes: bytes of those that may not be evicted.
        budget: the limit.
    """

    hits: int
    restored: int
    misses: int
    evictions: int
    entries: int
    bytes: int
    pinned_bytes: int
    budget: int


@dataclass(slots=True)
class _Counts:
    hits: int = 0
    restored: int = 0
    misses: int = 0
    evictions: int = 0


@dataclass(slots=True)
class _State(Generic[V]):
    """All that the lock guards."""

    entries: OrderedDict[str, V] = field(default_factory=OrderedDict)  # oldest use first
    alive: weakref.WeakValueDictionary[str, V] = field(default_factory=weakref.WeakValueDictionary)
    pinned: set[str] = field(default_factory=set)
    computing: set[str] = field(default_factory=set)
    bytes: int = 0
    counts: _Counts = field(default_factory=_Counts)


class Claim(Generic[V]):
    """What `ByteCache.claim` gives: a value, or the duty to compute it.

    Attributes:
        value: the value; None until it is published.
    """

    def __init__(self, hand_over: Callable[[V], None]) -> None:
        self.value: V | None = None
        self._hand_over = hand_over  # must not refer to the claim: no circle may hold gigabytes

    def publish(self, value: V) -> V:
        """Hands the computed value over, to the cache and to everyone who waits."""
        self.value = value
        self._hand_over(value)
        return value


class ByteCache(Generic[V]):
    """Values by key, at most `budget` bytes of them.

    Args:
        budget: bytes; 0 turns the cache off: every claim is then a computation.
        second: a larger, slower level below this one.
        what: a value, for the log: "a reference set".
    """

    def __init__(
        self, budget: int, second: SecondLevel[V] | None = None, what: str = "a value"
    ) -> None:
        if not isinstance(budget, int | float) or not budget >= 0:
            raise RequestError(f"the cache's budget is {budget!r} bytes, expected 0 or more")
        self.budget = budget
        self.second = second
        self.what = what
        self._state: _State[V] = _State()
        self._changed = threading.Condition()

    @property
    def stats(self) -> CacheStats:
        """Counts since the cache was made, and what it holds now."""
        with self._changed:
            state = self._state
            return CacheStats(
                hits=state.counts.hits,
                restored=state.counts.restored,
                misses=state.counts.misses,
                evictions=state.counts.evictions,
                entries=len(state.entries),
                bytes=state.bytes,
                pinned_bytes=self._pinned_bytes(),
                budget=self.budget,
            )

    def __contains__(self, key: object) -> bool:
        """Whether the value is in memory; counts as no use."""
        with self._changed:
            return key in self._state.entries or key in self._state.alive

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[Claim[V]]:
        """Finds a value, or lets the caller compute it while others wait for the result.

        A claim without a value must be published inside the `with`; if that is left without, the
        next one who waits computes. Afterwards the claim holds nothing: whoever still has it must
        not keep gigabytes alive.
        """
        if self.budget == 0:
            claim = Claim[V](lambda _value: None)
            try:
                yield claim
            finally:
                claim.value = None
            return
        claim = Claim(functools.partial(self._publish, key))
        claim.value, evicted = self._find_or_reserve(key)
        reserved = claim.value is None
        try:
            self._write_out(evicted)
            if claim.value is None and self.second is not None:
                restored = self.second.load(key)
                if restored is not None:
                    self._count("restored")
                    claim.publish(restored)
            missing = claim.value is None
            yield claim
            if missing and claim.value is not None:
                self._count("misses")
        finally:
            claim.value = None
            if reserved:
                with self._changed:
                    self._state.computing.discard(key)
                    self._changed.notify_all()

    def find(self, key: str) -> V | None:
        """A value from this level or the second; None where it would have to be computed."""
        with self.claim(key) as claim:
            return claim.value

    def touch(self, key: str) -> bool:
        """Whether this level holds the value, which then counts as used now."""
        with self._changed:
            if key not in self._state.entries:
                return False
            self._state.entries.move_to_end(key)
            return True

    def demote(self, key: str) -> None:
        """Makes a value the next one to be given up."""
        with self._changed:
            if key in self._state.entries:
                self._state.entries.move_to_end(key, last=False)

    def put(self, key: str, value: V) -> None:
        """Keeps a value that was made without a claim; the one that is there already, if any."""
        if self.budget:
            self._publish(key, value)

    def pin(self, key: str) -> None:
        """Keeps a value, which must be in memory, until `unpin`.

        Raises:
            RequestError: no such value.
            CapacityError: it does not fit into the budget beside what is pinned already.
        """
        with self._changed:
            value = self._state.entries.get(key) or self._state.alive.get(key)
            if value is None:
                raise RequestError(f"nothing to pin under {key:.16}...: it is not in the cache")
            room = self.budget - self._pinned_bytes()
            if key not in self._state.pinned and value.nbytes > room:
                raise CapacityError(
                    f"{value.nbytes / 1e6:.1f} MB cannot be pinned, {room / 1e6:.1f} MB of the "
                    f"budget of {self.budget / 1e6:.1f} MB are not; unpin others or raise the "
                    "budget"
                )
            evicted = self._admit(key, value)
            self._state.pinned.add(key)
        self._write_out(evicted)

    def unpin(self, key: str) -> None:
        """Lets a pinned value be evicted again."""
        with self._changed:
            self._state.pinned.discard(key)

    def free(self, nbytes: int, keep: str | None = None) -> int:
        """Evicts until that many bytes are gone, or all that may be; returns how many went.

        Args:
            nbytes: bytes wanted.
            keep: a key that must stay.
        """
        with self._changed:
            before = self._state.bytes
            evicted = self._evict(max(before - nbytes, 0), keep)
            freed = before - self._state.bytes
        self._write_out(evicted)
        return freed

    def clear(self) -> None:
        """Drops everything, pinned or not, without writing it out."""
        with self._changed:
            self._state.entries.clear()
            self._state.pinned.clear()
            self._state.bytes = 0

    def _find_or_reserve(self, key: str) -> tuple[V | None, list[tuple[str, V]]]:
        state = self._state
        with self._changed:
            while True:
                value = state.entries.get(key)
                if value is None:
                    value = state.alive.get(key)
                if value is not None:
                    state.counts.hits += 1
                    return value, self._admit(key, value)
                if key not in state.computing:
                    state.computing.add(key)
                    return None, []
                self._changed.wait()

    def _publish(self, key: str, value: V) -> None:
        with self._changed:
            evicted = self._admit(key, value)
            self._state.computing.discard(key)
            self._changed.notify_all()
        self._write_out(evicted)

    def _admit(self, key: str, value: V) -> list[tuple[str, V]]:
        """Makes a value the latest used one; returns what had to go, the value itself perhaps."""
        state = self._state
        state.alive[key] = value
        if key in state.entries:
            state.entries.move_to_end(key)
            return []
        room = self.budget - self._pinned_bytes()
        if value.nbytes > room:
            _log.info(
                "%s of %.2f GB is not kept: the budget is %.2f GB%s",
                self.what,
                value.nbytes / 1e9,
                self.budget / 1e9,
                "" if room == self.budget else f", of which {room / 1e9:.2f} are not pinned",
            )
            return [(key, value)]
        evicted = self._evict(self.budget - value.nbytes)
        state.entries[key] = value
        state.bytes += value.nbytes
        return evicted

    def _evict(self, limit: int, keep: str | None = None) -> list[tuple[str, V]]:
        """Takes out the longest unused values until `limit` bytes are left."""
        state, evicted = self._state, []
        for key in list(state.entries):
            if state.bytes <= limit:
                break
            if key not in state.pinned and key != keep:
                value = state.entries.pop(key)
                state.bytes -= value.nbytes
                state.counts.evictions += 1
                evicted.append((key, value))
        return evicted

    def _write_out(self, evicted: list[tuple[str, V]]) -> None:
        if self.second is not None:
            for key, value in evicted:
                self.second.store(key, value)

    def _pinned_bytes(self) -> int:
        return sum(self._state.entries[key].nbytes for key in self._state.pinned)

    def _count(self, name: str) -> None:
        with self._changed:
            setattr(self._state.counts, name, getattr(self._state.counts, name) + 1)
