"""Memory at addresses that never change, though what lies behind them does.

A captured CUDA graph replays only where every address is the one that it was captured with. CUDA's
virtual memory gives that without a copy: an address range is reserved once, and physical memory is
mapped into it. Engines share one such range as scratch, which grows in place. Keys and values have
another, their place: each reference set has physical memory of its own, and the set that a request
needs is mapped into the place. (vLLM's sleep mode and torch_memory_saver rely on the same: graphs
that were captured replay after other memory was mapped at their addresses.)
"""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from klein_kv.artifacts.signature import TensorSpec
from klein_kv.errors import BackendError
from klein_kv.runtime.backends.trt.cuda import Event, aligned
from klein_kv.runtime.backends.trt.memory import CudaMemory, DeviceBuffer

__all__ = ["KvBlock", "KvMemory", "Place", "Scratch", "VirtualMemory", "place_kv"]


class VirtualMemory:
    """Address ranges of one device, and physical memory.

    Raises:
        BackendError: the driver offers no virtual memory for this GPU.
    """

    def __init__(self, memory: CudaMemory) -> None:
        self._memory = memory
        driver = memory.cuda.driver
        attribute = driver.CUdevice_attribute
        asked = attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
        if not memory.call("cuDeviceGetAttribute", asked, memory.device):
            raise BackendError(
                f"CUDA device {memory.device} offers no virtual memory management, which engines "
                "are run with; update the driver, or use backend onnxruntime or torch"
            )
        location = driver.CUmemLocation()
        location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        location.id = memory.device
        self._properties = driver.CUmemAllocationProp()
        self._properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.location = location
        self._access = driver.CUmemAccessDesc()
        self._access.location = location
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        flag = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        granularity = memory.call("cuMemGetAllocationGranularity", self._properties, flag)
        self._granularity = int(granularity)

    def rounded(self, nbytes: int) -> int:
        """Bytes of physical memory that so many take."""
        return aligned(nbytes, self._granularity)

    def reserve(self, nbytes: int) -> int:
        """An address range with nothing behind it, a multiple of the granularity long."""
        return int(self._memory.call("cuMemAddressReserve", nbytes, 0, 0, 0))

    def reserve_most(self) -> tuple[int, int]:
        """Addresses for all memory of the device, and how many."""
        nbytes = self.rounded(int(self._memory.call("cudaMemGetInfo")[1]))
        return self.reserve(nbytes), nbytes

    def create(self, nbytes: int) -> Any:
        """Physical memory; CapacityError: the device has not so much."""
        return self._memory.call_for_memory("cuMemCreate", nbytes, self._properties, 0)

    def map(self, pointer: int, nbytes: int, handle: Any) -> None:
        """Puts physical memory behind addresses; it may be mapped elsewhere too.

        "cuMemUnmap" takes it away again, once no work that uses it is under way.
        """
        self._memory.call("cuMemMap", pointer, nbytes, 0, handle, 0)
        try:
            self._memory.call("cuMemSetAccess", pointer, nbytes, [self._access], 1)
        except BaseException:
            self._memory.call("cuMemUnmap", pointer, nbytes)
            raise


class Scratch:
    """Memory that engines use while they run, one after the other; it grows where it is."""

    def __init__(self, memory: CudaMemory, virtual: VirtualMemory) -> None:
        self._memory, self._virtual = memory, virtual
        self.pointer, self._reserved = virtual.reserve_most()  # an address for good
        self.nbytes = 0  # behind it
        memory.reclaim.append(self.shrink)
        self._pieces: list[tuple[int, Any]] = []  # bytes and handle, in the order of addresses

    def require(self, nbytes: int) -> None:
        """Has at least so many bytes there; CapacityError: the device has not so much."""
        wanted = self._virtual.rounded(nbytes)
        while self.nbytes < wanted:
            missing = wanted - self.nbytes
            handle = self._virtual.create(missing)
            with contextlib.ExitStack() as undo:
                undo.callback(self._memory.call, "cuMemRelease", handle)
                if self.nbytes + missing < wanted:  # it was shrunk to find room for that
                    continue
                self._virtual.map(self.pointer + self.nbytes, missing, handle)
                undo.pop_all()
            self._pieces.append((missing, handle))
            self.nbytes += missing

    def shrink(self) -> None:
        """Frees all of it; waits for the stream."""
        if self._pieces:
            self._memory.synchronize()
        while self._pieces:
            nbytes, handle = self._pieces.pop()
            self.nbytes -= nbytes
            self._memory.call("cuMemUnmap", self.pointer + self.nbytes, nbytes)
            self._memory.call("cuMemRelease", handle)

    def close(self) -> None:
        """Frees it and its addresses."""
        self.shrink()
        self._memory.call("cuMemAddressFree", self.pointer, self._reserved)


@dataclass(eq=False, slots=True)
class _Physical:
    """Memory of one set, mapped at an address of its own as long as it exists."""

    handle: Any
    nbytes: int
    pointer: int
    busy: Event | None = None  # what another stream still does with it


@dataclass(eq=False, slots=True)
class KvBlock:
    """Keys and values of one set; idle again when the last buffer in it is gone."""

    idle: list[_Physical]
    physical: _Physical

    @property
    def pointer(self) -> int:
        """Address of its own: what copies to and from the host use."""
        return self.physical.pointer

    def buffers(self, places: Mapping[str, "Place"]) -> dict[str, DeviceBuffer]:
        """Tensors that lie in it."""
        return {
            name: DeviceBuffer(self.pointer + place.start, place.shape, place.dtype, self)
            for name, place in places.items()
        }

    def __del__(self) -> None:
        self.idle.append(self.physical)


class Place(NamedTuple):
    """Where in a block one of a set's tensors lies."""

    start: int
    shape: tuple[int, ...]
    dtype: str


def place_kv(tensors: Iterable[TensorSpec]) -> tuple[dict[str, Place], int]:
    """The layout of a set's keys and values, of concrete shapes, and its size in bytes."""
    places, end = {}, 0
    for spec in tensors:
        places[spec.name] = Place(end, spec.concrete({}), spec.dtype)
        end += aligned(spec.nbytes({}))
    return places, end


class KvMemory:
    """Physical memory of reference sets, and the place where engines find one of them."""

    def __init__(self, memory: CudaMemory, virtual: VirtualMemory) -> None:
        self._memory, self._virtual = memory, virtual
        self.place, self._reserved = virtual.reserve_most()  # an address for good
        self._held: _Physical | None = None
        self._idle: list[_Physical] = []
        self._all: list[_Physical] = []
        memory.reclaim.append(self.trim)

    @property
    def idle(self) -> int:
        """Bytes of memory that no set uses."""
        return sum(physical.nbytes for physical in self._idle)

    def take(self, nbytes: int) -> KvBlock:
        """Memory for a set; CapacityError: the device has not so much."""
        nbytes = self._virtual.rounded(nbytes)
        fitting = [physical for physical in self._idle if physical.nbytes == nbytes]
        if fitting:
            chosen = min(fitting, key=lambda physical: physical is not self._held)
            self._idle.remove(chosen)
            return KvBlock(self._idle, chosen)
        with contextlib.ExitStack() as undo:
            handle = self._virtual.create(nbytes)
            undo.callback(self._memory.call, "cuMemRelease", handle)
            pointer = self._virtual.reserve(nbytes)
            undo.callback(self._memory.call, "cuMemAddressFree", pointer, nbytes)
            self._virtual.map(pointer, nbytes, handle)
            undo.pop_all()
        physical = _Physical(handle, nbytes, pointer)
        self._all.append(physical)
        return KvBlock(self._idle, physical)

    def hold(self, block: KvBlock) -> None:
        """Has a set in the place; waits for the stream if another one is there.

        What another stream still does with the set is not waited for: see `settle`.
        """
        physical = block.physical
        if self._held is physical:
            return
        self._leave()
        self._virtual.map(self.place, physical.nbytes, physical.handle)
        self._held = physical

    def settle(self, block: KvBlock) -> None:
        """Puts the main stream behind what another one does with a set."""
        if block.physical.busy is not None:
            block.physical.busy.before(self._memory.stream)
            block.physical.busy = None

    def trim(self) -> None:
        """Frees memory that no set uses."""
        if self._idle:
            self._memory.synchronize()
        while self._idle:
            self._free(self._idle.pop())

    def close(self) -> None:
        """Frees everything; sets must not be used afterwards."""
        self._leave()
        for physical in list(self._all):
            self._free(physical)
        self._idle.clear()
        self._memory.call("cuMemAddressFree", self.place, self._reserved)

    def _free(self, physical: _Physical) -> None:
        self._all.remove(physical)
        if physical.busy is not None:
            physical.busy.synchronize()
        if physical is self._held:
            self._leave()
        self._memory.call("cuMemUnmap", physical.pointer, physical.nbytes)
        self._memory.call("cuMemAddressFree", physical.pointer, physical.nbytes)
        self._memory.call("cuMemRelease", physical.handle)

    def _leave(self) -> None:
        if self._held is not None:
            self._memory.synchronize()
            self._memory.call("cuMemUnmap", self.place, self._held.nbytes)
            self._held = None
