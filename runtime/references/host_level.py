"""Reference sets in pinned host memory, below those on a GPU.

A set that the device gives up is copied to the host, and comes back when it is asked for: the 2 GiB
of one 1024x1024 reference of klein 9B take about 50 ms over PCIe 5 x16 (derived), encoding it again
a third of a second or more.
"""

import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from klein_kv.errors import CapacityError
from klein_kv.runtime.backends.backend import Backend, Buffer
from klein_kv.runtime.references.reference_set import ReferenceSet

__all__ = ["DeviceBackend", "HostLevel"]

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


class HostLevel:
    """Copies of sets in host memory, least recently used out first.

    A set that went back to the device keeps its copy as long as nothing else needs the room, so
    giving it up another time copies nothing.
    """

    def __init__(self, budget: int, backend: DeviceBackend) -> None:
        self.budget = budget
        self._memory = backend.host_store(budget)
        self._copies: OrderedDict[str, tuple[Any, ReferenceSet]] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes of all copies; never above the budget."""
        return sum(copy.nbytes for copy, _ in self._copies.values())

    def __len__(self) -> int:
        return len(self._copies)

    def load(self, key: str) -> ReferenceSet | None:
        """The set of that digest, on its way to the device; None where it is not here."""
        if key not in self._copies:
            return None
        copy, without_kv = self._copies[key]
        self._copies.move_to_end(key, last=False)  # the first to go: the device has it
        return replace(without_kv, kv=self._memory.restore(copy))

    def store(self, key: str, references: ReferenceSet) -> None:
        """Copies a set to the host, if it finds room; done with its buffers on return."""
        if key in self._copies:
            self._copies.move_to_end(key)
            return
        size = self._memory.size(references.nbytes)
        if size > self.budget:
            return
        while self.nbytes + size > self.budget:
            self._copies.popitem(last=False)
        try:
            copy = self._memory.keep(references.kv)
        except CapacityError as error:
            _log.warning("a reference set is not kept in host memory: %s", error)
            return
        self._copies[key] = copy, replace(references, kv={})
