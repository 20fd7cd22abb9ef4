"""Copies of reference sets in pinned host memory, made and restored beside the graphs' work.

All of it is pinned when it is opened: pinning takes longer than copying. A copy is spread over as
many pages as it needs. Copies run on one stream of their own, in order: a page may be used again as
soon as it is given back, and only who reads it on the host has to wait. The graphs' stream waits
for a restored set when it first uses it.

Not run on a GPU by this project's tests, which drive it with a stand-in for CUDA whose streams lag
behind each other on purpose.
"""

import threading
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klein_kv.artifacts.weights import NUMPY_DTYPES
from klein_kv.errors import CapacityError, RequestError
from klein_kv.runtime.backends.trt.memory import CudaMemory, DeviceBuffer, Event
from klein_kv.runtime.backends.trt.staging import host_bytes
from klein_kv.runtime.backends.trt.virtual import KvBlock, KvMemory

__all__ = ["PinnedCopy", "PinnedStore"]

_PAGE_BYTES = 16 << 20


class PinnedCopy:
    """A set's tensors in pages; these return to the store when the copy is collected.

    Attributes:
        places: by name, the byte that each tensor starts at, counted over all pages; shape; type.
        pages: addresses.
    """

    __slots__ = ("_filled", "_store", "pages", "places")

    def __init__(
        self,
        store: "PinnedStore",
        pages: list[int],
        places: Mapping[str, tuple[int, tuple[int, ...], str]],
        filled: Event,
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
        start, shape, dtype = self.places[name]
        array = np.empty(shape, NUMPY_DTYPES[dtype])
        target, page_bytes = array.reshape(-1).view(np.uint8), self._store.page_bytes
        self._filled.synchronize()
        done = 0
        while done < target.nbytes:
            page, at = divmod(start + done, page_bytes)
            nbytes = min(page_bytes - at, target.nbytes - done)
            target[done : done + nbytes] = host_bytes(self.pages[page] + at, nbytes)
            done += nbytes
        return array

    def __del__(self) -> None:
        self._store.take_back(self.pages)


class PinnedStore:
    """Pages of pinned memory on the way to and from one device.

    Args:
        memory: the device's, which is the current one.
        kv: its memory for sets.
        budget: bytes; all whole pages of it are pinned at once.
        page_bytes: bytes of a page.

    Raises:
        RequestError: less than a page.
        CapacityError: the system pins no such amount.
    """

    def __init__(
        self, memory: CudaMemory, kv: KvMemory, budget: int, page_bytes: int = _PAGE_BYTES
    ) -> None:
        if budget < page_bytes:
            raise RequestError(
                f"the budget of pinned host memory is {budget} bytes, expected {page_bytes} or more"
            )
        self.page_bytes = page_bytes
        self._memory, self._kv = memory, kv
        self._count = budget // page_bytes
        try:
            self._pointer = int(memory.call("cudaHostAlloc", self._count * page_bytes, 0))
        except CapacityError as error:
            raise CapacityError(
                f"the system does not pin {self._count * page_bytes / 1e9:.2f} GB of host memory; "
                "give host_cache_bytes a smaller budget"
            ) from error
        self._idle = [self._pointer + i * page_bytes for i in range(self._count)]
        self._lock = threading.Lock()
        self._stream = memory.call(
            "cudaStreamCreateWithFlags", memory.cuda.runtime.cudaStreamNonBlocking
        )
        self._closed = False

    def size(self, nbytes: int) -> int:
        """Bytes that a copy of so many bytes takes: whole pages."""
        return -(-nbytes // self.page_bytes) * self.page_bytes

    def keep(self, buffers: Mapping[str, DeviceBuffer]) -> PinnedCopy:
        """Starts copying a set's keys and values to the host; they may be given back at once.

        Raises:
            CapacityError: not so many pages are left.
        """
        with self._memory.entered():
            block = next(iter(buffers.values())).block
            assert isinstance(block, KvBlock)  # noqa: S101 - sets are made by the backend
            places = {n: (x.pointer - block.pointer, x.shape, x.dtype) for n, x in buffers.items()}
            nbytes = max(x.pointer - block.pointer + x.nbytes for x in buffers.values())
            pages = self._take(self.size(nbytes) // self.page_bytes)
            try:
                Event(self._memory, self._memory.stream).before(self._stream)
                for address, offset, part in self._runs(pages, nbytes):
                    source = block.pointer + offset
                    self._memory.copy(address, source, part, "DeviceToHost", self._stream)
                filled = Event(self._memory, self._stream)
            except BaseException:
                self.take_back(pages)
                raise
            block.busy = filled
            return PinnedCopy(self, pages, places, filled)

    def restore(self, copy: PinnedCopy) -> dict[str, DeviceBuffer]:
        """Starts copying back to the device; the graphs' stream waits when it uses the set."""
        with self._memory.entered():
            nbytes = max(
                start + np.prod(shape, dtype=int) * NUMPY_DTYPES[dtype].itemsize
                for start, shape, dtype in copy.places.values()
            )
            block = self._kv.take(int(nbytes))
            # What used the memory before may still be under way.
            Event(self._memory, self._memory.stream).before(self._stream)
            for address, offset, part in self._runs(copy.pages, int(nbytes)):
                target = block.pointer + offset
                self._memory.copy(target, address, part, "HostToDevice", self._stream)
            block.busy = Event(self._memory, self._stream)
            return {
                name: DeviceBuffer(block.pointer + start, shape, dtype, block)
                for name, (start, shape, dtype) in copy.places.items()
            }

    def take_back(self, pages: list[int]) -> None:
        """Lets pages be used for another copy."""
        self._idle.extend(pages)  # at once, and without the lock: collections may happen anywhere

    def close(self) -> None:
        """Waits for all copies and unpins everything; no copy may be used afterwards."""
        if self._closed:
            return
        self._closed = True
        self._memory.call("cudaStreamSynchronize", self._stream)
        self._memory.call("cudaStreamDestroy", self._stream)
        self._memory.call("cudaFreeHost", self._pointer)

    def _runs(self, pages: list[int], nbytes: int) -> Iterator[tuple[int, int, int]]:
        """Address, offset in the set, and bytes of each run of pages that follow each other."""
        ends = [i + 1 for i, (a, b) in enumerate(pairwise(pages)) if b != a + self.page_bytes]
        for first, last in pairwise([0, *ends, len(pages)]):
            offset = first * self.page_bytes
            yield pages[first], offset, min(last * self.page_bytes, nbytes) - offset

    def _take(self, count: int) -> list[int]:
        with self._lock:
            if len(self._idle) < count:
                raise CapacityError(
                    f"{count} pages of pinned host memory are needed, {len(self._idle)} of "
                    f"{self._count} are free; give host_cache_bytes a larger budget"
                )
            self._idle.sort(reverse=True)  # the lowest addresses first, for long runs
            return [self._idle.pop() for _ in range(count)]
