"""Memory at addresses that never change, though what lies behind them does.

A captured CUDA graph replays only where every address is the one that it was captured with. CUDA's
virtual memory gives that without a copy: an address range is reserved once, and physical memory is
mapped into it. Engines share one such range as scratch, which grows in place. Keys and values have
another, their place: each reference set has physical memory of its own, and the set that a request
needs is mapped into the place. (vLLM's sleep mode and torch_memory_saver rely on the same: graphs
that were captured replay after other memory was mapped at their addresses.)

Not run on a GPU by this project's tests, which drive it with a stand-in for CUDA that maps pages of
host memory the same way.
"""

from dataclasses import dataclass
from typing import Any

from klein_kv.errors import BackendError
from klein_kv.runtime.backends.trt.cuda import aligned
from klein_kv.runtime.backends.trt.memory import CudaMemory, Event

__all__ = ["KvBlock", "KvMemory", "Scratch", "VirtualMemory"]


class VirtualMemory:
    """Address ranges of one device, and physical memory.

    Args:
        memory: of the device, which is the current one.

    Raises:
        BackendError: the driver offers no virtual memory for this GPU.
    """

    def __init__(self, memory: CudaMemory) -> None:
        self._memory = memory
        driver = memory.cuda.driver
        attribute = driver.CUdevice_attribute
        supported = memory.call(
            "cuDeviceGetAttribute",
            attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
            memory.device,
        )
        if not supported:
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
        flags = driver.CUmemAllocationGranularity_flags
        self.granularity = int(
            memory.call(
                "cuMemGetAllocationGranularity",
                self._properties,
                flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED,
            )
        )

    def rounded(self, nbytes: int) -> int:
        """Bytes of physical memory that so many take."""
        return aligned(nbytes, self.granularity)

    def reserve(self, nbytes: int) -> int:
        """An address range with nothing behind it, a multiple of the granularity long."""
        return int(self._memory.call("cuMemAddressReserve", nbytes, 0, 0, 0))

    def give_up(self, pointer: int, nbytes: int) -> None:
        """Ends a reservation in which nothing is mapped."""
        self._memory.call("cuMemAddressFree", pointer, nbytes)

    def create(self, nbytes: int) -> Any:
        """Physical memory.

        Raises:
            CapacityError: the device has not so much.
        """
        return self._memory.call_for_memory("cuMemCreate", nbytes, self._properties, 0)

    def release(self, handle: Any) -> None:
        """Frees physical memory, once it is mapped nowhere."""
        self._memory.call("cuMemRelease", handle)

    def map(self, pointer: int, nbytes: int, handle: Any) -> None:
        """Puts physical memory behind addresses; it may be mapped elsewhere too."""
        self._memory.call("cuMemMap", pointer, nbytes, 0, handle, 0)
        try:
            self._memory.call("cuMemSetAccess", pointer, nbytes, [self._access], 1)
        except BaseException:
            self.unmap(pointer, nbytes)
            raise

    def unmap(self, pointer: int, nbytes: int) -> None:
        """Takes what lies behind addresses away; no work that uses them may be under way."""
        self._memory.call("cuMemUnmap", pointer, nbytes)


class Scratch:
    """Memory that engines use while they run, one after the other; it grows where it is.

    Args:
        memory: of the device.
        virtual: its address ranges.

    Attributes:
        pointer: address, for good.
        nbytes: bytes behind it.
    """

    def __init__(self, memory: CudaMemory, virtual: VirtualMemory) -> None:
        self._memory, self._virtual = memory, virtual
        self._reserved = virtual.rounded(memory.total)
        self.pointer = virtual.reserve(self._reserved)
        self.nbytes = 0
        memory.reclaim.append(self.shrink)
        self._pieces: list[tuple[int, Any]] = []  # bytes and handle, in the order of addresses

    def require(self, nbytes: int) -> None:
        """Has at least so many bytes there.

        Raises:
            CapacityError: the device has not so much.
        """
        wanted = self._virtual.rounded(nbytes)
        if self.nbytes >= wanted:
            return
        missing = wanted - self.nbytes
        handle = self._virtual.create(missing)
        if self.nbytes + missing < wanted:  # it was shrunk to find room for that
            self._virtual.release(handle)
            missing = wanted
            handle = self._virtual.create(missing)
        try:
            self._virtual.map(self.pointer + self.nbytes, missing, handle)
        except BaseException:
            self._virtual.release(handle)
            raise
        self._pieces.append((missing, handle))
        self.nbytes += missing

    def shrink(self) -> None:
        """Frees all of it; waits for the stream."""
        if not self._pieces:
            return
        self._memory.synchronize()
        while self._pieces:
            nbytes, handle = self._pieces.pop()
            self.nbytes -= nbytes
            self._virtual.unmap(self.pointer + self.nbytes, nbytes)
            self._virtual.release(handle)

    def close(self) -> None:
        """Frees it and its addresses."""
        self.shrink()
        self._virtual.give_up(self.pointer, self._reserved)


@dataclass(eq=False, slots=True)
class _Physical:
    """Memory of one set, mapped at an address of its own as long as it exists."""

    handle: Any
    nbytes: int
    pointer: int
    busy: Event | None = None


class KvBlock:
    """Keys and values of one set; given back when the last buffer in it is gone."""

    __slots__ = ("_owner", "physical")

    def __init__(self, owner: "KvMemory", physical: _Physical) -> None:
        self._owner = owner
        self.physical = physical

    @property
    def pointer(self) -> int:
        """Address of its own: what copies to and from the host use."""
        return self.physical.pointer

    @property
    def busy(self) -> Event | None:
        """What another stream still does with it; the main one must wait for that."""
        return self.physical.busy

    @busy.setter
    def busy(self, event: Event) -> None:
        self.physical.busy = event

    def __del__(self) -> None:
        self._owner.take_back(self.physical)


class KvMemory:
    """Physical memory of reference sets, and the place where engines find one of them.

    Args:
        memory: of the device.
        virtual: its address ranges.

    Attributes:
        place: address, for good.
    """

    def __init__(self, memory: CudaMemory, virtual: VirtualMemory) -> None:
        self._memory, self._virtual = memory, virtual
        self._reserved = virtual.rounded(memory.total)
        self.place = virtual.reserve(self._reserved)
        self._held: _Physical | None = None
        self._idle: list[_Physical] = []
        self._all: list[_Physical] = []
        self._closed = False
        memory.reclaim.append(self.trim)

    @property
    def idle(self) -> int:
        """Bytes of memory that no set uses."""
        return sum(physical.nbytes for physical in self._idle)

    def take(self, nbytes: int) -> KvBlock:
        """Memory for a set.

        Raises:
            CapacityError: the device has not so much.
        """
        nbytes = self._virtual.rounded(nbytes)
        fitting = [physical for physical in self._idle if physical.nbytes == nbytes]
        if fitting:
            chosen = self._held if self._held in fitting else fitting[0]
            assert chosen is not None  # noqa: S101 - one of those that fit
            self._idle.remove(chosen)
            return KvBlock(self, chosen)
        handle = self._virtual.create(nbytes)
        try:
            pointer = self._virtual.reserve(nbytes)
            try:
                self._virtual.map(pointer, nbytes, handle)
            except BaseException:
                self._virtual.give_up(pointer, nbytes)
                raise
        except BaseException:
            self._virtual.release(handle)
            raise
        physical = _Physical(handle, nbytes, pointer)
        self._all.append(physical)
        return KvBlock(self, physical)

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
        if block.busy is not None:
            block.busy.before(self._memory.stream)
            block.physical.busy = None

    def take_back(self, physical: _Physical) -> None:
        """Keeps memory for another set; may be called from any thread."""
        if not self._closed:
            self._idle.append(physical)

    def trim(self) -> None:
        """Frees memory that no set uses."""
        if self._idle:
            self._memory.synchronize()
        while self._idle:
            self._free(self._idle.pop())

    def _free(self, physical: _Physical) -> None:
        self._all.remove(physical)
        if physical.busy is not None:
            physical.busy.synchronize()
        if physical is self._held:
            self._leave()
        self._virtual.unmap(physical.pointer, physical.nbytes)
        self._virtual.give_up(physical.pointer, physical.nbytes)
        self._virtual.release(physical.handle)

    def close(self) -> None:
        """Frees everything; sets must not be used afterwards."""
        self._closed = True
        self._leave()
        for physical in list(self._all):
            self._free(physical)
        self._idle.clear()
        self._virtual.give_up(self.place, self._reserved)

    def _leave(self) -> None:
        if self._held is not None:
            self._memory.synchronize()
            self._virtual.unmap(self.place, self._held.nbytes)
            self._held = None
