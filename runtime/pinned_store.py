"""Copies of device tensors in pinned host memory, made and restored beside the graphs' work.

Pinning takes longer than copying, so memory is pinned in pages that stay until the end; a copy is
spread over as many as it needs. All copies run on one stream of their own, in order: a page may be
used again as soon as it is given back, and only who reads it on the host has to wait. The graphs'
stream waits for a restored tensor when it first uses it.

Not run on a GPU by this project's tests, which drive it with a stand-in for the CUDA runtime whose
streams lag behind each other on purpose.
"""

import ctypes
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from klein_kv.errors import CapacityError, RequestError
from klein_kv.runtime.cuda_memory import CudaMemory, DeviceBuffer, Event
from klein_kv.weights import NUMPY_DTYPES

__all__ = ["PinnedCopy", "PinnedStore"]

_PAGE_BYTES = 16 << 20


class _Place(NamedTuple):
    """A tensor in a copy: `nbytes` from byte `start`, counted over all pages."""

    start: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


class PinnedCopy:
    """Tensors in pages; these return to the store when the copy is collected.

    Attributes:
        places: where each tensor lies.
        pages: addresses.
    """

    __slots__ = ("_filled", "_store", "pages", "places")

    def __init__(
        self, store: "PinnedStore", pages: list[int], places: Mapping[str, _Place], filled: Event
    ) -> None:
        self.pages = pages
        self.places = places
        self._store = store
        self._filled = filled

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return len(self.pages) * self._store.page_bytes

    def array(self, name: str) -> NDArray[Any]:
        """One tensor, as memory of its own."""
        place = self.places[name]
        array = np.empty(place.shape, NUMPY_DTYPES[place.dtype])
        self._filled.synchronize()
        for address, offset, nbytes in self._store.pieces(self.pages, place):
            ctypes.memmove(array.ctypes.data + offset, address, nbytes)
        return array

    def __del__(self) -> None:
        self._store.take_back(self.pages)


class PinnedStore:
    """Pages of pinned memory on the way to and from one device.

    Args:
        memory: the device's.
        budget: bytes that are pinned at most.
        page_bytes: bytes that are pinned at once.

    Raises:
        RequestError: less than a page.
    """

    def __init__(self, memory: CudaMemory, budget: int, page_bytes: int = _PAGE_BYTES) -> None:
        if budget < page_bytes:
            raise RequestError(
                f"the budget of pinned host memory is {budget} bytes, expected {page_bytes} or more"
            )
        self.page_bytes = page_bytes
        self._memory = memory
        self._limit = budget // page_bytes
        self._pinned: list[int] = []
        self._idle: list[int] = []
        self._lock = threading.Lock()
        self._stream = memory.open_stream()
        self._closed = False

    @property
    def pinned_bytes(self) -> int:
        """Bytes that are pinned now."""
        return len(self._pinned) * self.page_bytes

    def size(self, nbytes: int) -> int:
        """Bytes that a copy of so many bytes takes: whole pages."""
        return self._pages_of(nbytes) * self.page_bytes

    def keep(self, buffers: Mapping[str, DeviceBuffer]) -> PinnedCopy:
        """Starts copying tensors to the host; their memory may be given back at once.

        Raises:
            CapacityError: not so many pages are left, or the system pins no more.
        """
        places, end = {}, 0
        for name, buffer in buffers.items():
            places[name] = _Place(end, buffer.nbytes, buffer.dtype, buffer.shape)
            end += buffer.nbytes
        pages = self._take(self._pages_of(end))
        try:
            Event(self._memory, self._memory.stream).before(self._stream)
            for name, buffer in buffers.items():
                for address, offset, nbytes in self.pieces(pages, places[name]):
                    source = buffer.pointer + offset
                    self._memory.copy(address, source, nbytes, "DeviceToHost", self._stream)
            filled = Event(self._memory, self._stream)
        except BaseException:
            self.take_back(pages)
            raise
        for buffer in buffers.values():
            buffer.busy = filled
        return PinnedCopy(self, pages, places, filled)

    def restore(self, copy: PinnedCopy) -> dict[str, DeviceBuffer]:
        """Starts copying back to the device; the graphs' stream waits when it uses the tensors."""
        buffers = {
            name: self._memory.allocate(place.shape, place.dtype, self._stream)
            for name, place in copy.places.items()
        }
        for name, buffer in buffers.items():
            for address, offset, nbytes in self.pieces(copy.pages, copy.places[name]):
                target = buffer.pointer + offset
                self._memory.copy(target, address, nbytes, "HostToDevice", self._stream)
        done = Event(self._memory, self._stream)
        for buffer in buffers.values():
            buffer.busy = done
        return buffers

    def pieces(self, pages: Sequence[int], place: _Place) -> Iterator[tuple[int, int, int]]:
        """Address, offset in the tensor, and bytes of each part of a tensor."""
        offset = 0
        while offset < place.nbytes:
            page, at = divmod(place.start + offset, self.page_bytes)
            nbytes = min(self.page_bytes - at, place.nbytes - offset)
            yield pages[page] + at, offset, nbytes
            offset += nbytes

    def take_back(self, pages: list[int]) -> None:
        """Lets pages be used for another copy."""
        self._idle.extend(pages)  # at once, and without the lock: collections may happen anywhere

    def close(self) -> None:
        """Waits for all copies and unpins everything; no copy may be used afterwards."""
        if self._closed:
            return
        self._closed = True
        self._memory.close_stream(self._stream)
        while self._pinned:
            self._memory.call("cudaFreeHost", self._pinned.pop())

    def _pages_of(self, nbytes: int) -> int:
        return -(-nbytes // self.page_bytes)

    def _take(self, count: int) -> list[int]:
        with self._lock:
            while len(self._idle) < count and len(self._pinned) < self._limit:
                page = int(self._memory.call("cudaHostAlloc", self.page_bytes, 0))
                self._pinned.append(page)
                self._idle.append(page)
            if len(self._idle) < count:
                raise CapacityError(
                    f"{count} pages of pinned host memory are needed, {len(self._idle)} of "
                    f"{self._limit} are free; give host_cache_bytes a larger budget"
                )
            return [self._idle.pop() for _ in range(count)]
