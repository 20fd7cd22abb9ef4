"""Copies of reference sets in pinned host memory, made and restored beside the graphs' work.

All of it is pinned when it is opened: pinning takes longer than copying. A copy is spread over as
many pages as it needs. Copies run on one stream of their own, in order, so a page may be used again
as soon as it is given back. The graphs' stream waits for a restored set when it first uses it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from klein_kv.errors import CapacityError, RequestError
from klein_kv.runtime.backends.trt.cuda import Event
from klein_kv.runtime.backends.trt.memory import CudaMemory, DeviceBuffer
from klein_kv.runtime.backends.trt.virtual import KvBlock, KvMemory, Place

__all__ = ["PinnedCopy", "PinnedStore"]

_PAGE_BYTES = 16 << 20


@dataclass(eq=False, slots=True)
class PinnedCopy:
    """A set's tensors in pages; these are idle again when the copy is collected."""

    idle: list[int]
    pages: list[int]  # addresses
    nbytes: int  # of all pages
    places: Mapping[str, Place]  # of the tensors, counted over all pages
    set_bytes: int

    def __del__(self) -> None:
        self.idle.extend(self.pages)  # without a lock: collections may happen anywhere


class PinnedStore:
    """Pages of pinned memory on the way to and from one device.

    All whole pages of the budget are pinned at once; it raises RequestError for less than a page,
    and CapacityError if the system pins no such amount.
    """

    def __init__(
        self, memory: CudaMemory, kv: KvMemory, budget: int, page_bytes: int = _PAGE_BYTES
    ) -> None:
        if budget < page_bytes:
            raise RequestError(
                f"the budget of pinned host memory is {budget} bytes, expected {page_bytes} or more"
            )
        self._page_bytes = page_bytes
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
        self._stream = memory.call(
            "cudaStreamCreateWithFlags", memory.cuda.runtime.cudaStreamNonBlocking
        )

    def size(self, nbytes: int) -> int:
        """Bytes that a copy of so many bytes takes: whole pages."""
        return -(-nbytes // self._page_bytes) * self._page_bytes

    def keep(self, buffers: Mapping[str, DeviceBuffer]) -> PinnedCopy:
        """Starts copying a set's keys and values to the host; they may be given back at once.

        Raises:
            CapacityError: not so many pages are left.
        """
        with self._memory:
            block = next(iter(buffers.values())).block
            assert isinstance(block, KvBlock)  # noqa: S101 - sets are made by the backend
            places = {
                name: Place(buffer.pointer - block.pointer, buffer.shape, buffer.dtype)
                for name, buffer in buffers.items()
            }
            set_bytes = max(places[name].start + buffer.nbytes for name, buffer in buffers.items())
            copy = self._take(places, set_bytes)
            self._copy(copy, block, "DeviceToHost")
            return copy

    def restore(self, copy: PinnedCopy) -> dict[str, DeviceBuffer]:
        """Starts copying back to the device; the graphs' stream waits when it uses the set."""
        with self._memory:
            block = self._kv.take(copy.set_bytes)
            self._copy(copy, block, "HostToDevice")
            return block.buffers(copy.places)

    def close(self) -> None:
        """Waits for all copies and unpins everything; no copy may be used afterwards."""
        self._memory.call("cudaStreamSynchronize", self._stream)
        self._memory.call("cudaStreamDestroy", self._stream)
        self._memory.call("cudaFreeHost", self._pointer)

    def _copy(self, copy: PinnedCopy, block: KvBlock, kind: str) -> None:
        """Copies page by page, once what used the device's memory before is done."""
        cuda = self._memory.cuda
        Event(cuda, self._memory.stream).before(self._stream)
        for i, page in enumerate(copy.pages):
            offset = i * self._page_bytes
            ends = block.pointer + offset, page
            target, source = ends if kind == "HostToDevice" else reversed(ends)
            nbytes = min(self._page_bytes, copy.set_bytes - offset)
            cuda.copy(target, source, nbytes, kind, self._stream)
        block.physical.busy = Event(cuda, self._stream)

    def _take(self, places: Mapping[str, Place], set_bytes: int) -> PinnedCopy:
        nbytes = self.size(set_bytes)
        count = nbytes // self._page_bytes
        if len(self._idle) < count:
            raise CapacityError(
                f"{count} pages of pinned host memory are needed, {len(self._idle)} of "
                f"{self._count} are free; give host_cache_bytes a larger budget"
            )
        pages = [self._idle.pop() for _ in range(count)]
        return PinnedCopy(self._idle, pages, nbytes, places, set_bytes)
