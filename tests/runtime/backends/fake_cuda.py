# ruff: noqa: N802, N815 - the names are CUDA's
"""A stand-in for CUDA's runtime and driver, as strict as they are, on host memory.

Device memory is host memory, taken and freed by address; physical memory that is mapped at several
addresses is the same pages there. Streams that lag do nothing until somebody waits for them, and
then no more than is waited for; the others do everything at once. So work that is not put in order
comes out wrong in one way or the other. What CUDA refuses or what would end a process there is an
error here: addresses that are not allocated, streams of another device than the thread's current
one, memory that is unmapped while work on it is under way.
"""

import ctypes
import enum
import itertools
import mmap
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from klein_kv.runtime.backends.trt.cuda import Cuda

ALIGNMENT = 256  # of what cudaMalloc gives
_FIRST_STREAM = 7
WAITS = frozenset({"cudaStreamSynchronize", "cudaEventSynchronize", "cudaFree", "cudaMalloc"})
ALLOCATIONS = frozenset({"cudaMalloc", "cudaFree", "cuMemCreate", "cuMemMap", "cudaHostAlloc"})

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_PROT, _NONE = mmap.PROT_READ | mmap.PROT_WRITE, 0
_FIXED, _NORESERVE = 0x10, 0x4000


Uses = Sequence[tuple[int, int]]
"""Addresses and bytes that work touches."""


class Status(enum.IntEnum):
    """cudaError_t and CUresult, where they have the same numbers."""

    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInvalidResourceHandle = 400


OK = Status.cudaSuccess


@dataclass
class _Stream:
    device: int
    queue: "deque[tuple[Callable[[], None], Uses]]" = field(default_factory=deque)
    done: int = 0
    given: int = 0


@dataclass
class _Physical:
    """Memory that can be mapped at any number of addresses; -1 where there is none behind it."""

    descriptor: int
    nbytes: int
    device: int
    maps: set[int] = field(default_factory=set)
    released: bool = False


@dataclass
class _Range:
    """Addresses `start` to `start + nbytes`, and the device that they belong to."""

    nbytes: int
    device: int
    keeps: Any = None


class FakeCuda:
    """CUDA with as much "device memory" as it is told.

    Args:
        capacity: bytes of each device.
        lagging: streams that lag, counted from 0 in the order of their creation.
        devices: how many there are.
        granularity: of physical memory; 2 MiB on a GPU.
        backed: False has no memory behind addresses, and copies nothing: for sizes of a real model.

    """

    cudaError_t = Status
    cudaStreamNonBlocking = 1
    cudaDeviceAttr = SimpleNamespace(
        cudaDevAttrComputeCapabilityMajor=75, cudaDevAttrComputeCapabilityMinor=76
    )
    cudaMemcpyKind = SimpleNamespace(
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
    )
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED=102
    )
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_RECOMMENDED=1)
    CUmemLocation = SimpleNamespace
    CUmemAllocationProp = SimpleNamespace
    CUmemAccessDesc = SimpleNamespace

    def __init__(self, capacity=1 << 34, lagging=(), devices=1, granularity=4096, *, backed=True):
        self.capacity = capacity
        self.devices = devices
        self.granularity = granularity
        self.backed = backed
        self.lagging = {_FIRST_STREAM + i for i in lagging}
        self.streams: dict[int, _Stream] = {}
        self.recorded: dict[int, tuple[int, int]] = {}
        self.times: dict[int, float] = {}
        self.blocks: dict[int, _Range] = {}  # of `cudaMalloc`
        self.reserved: dict[int, _Range] = {}
        self.mapped: dict[int, tuple[_Range, _Physical]] = {}
        self.physical: list[_Physical] = []
        self.pinned: dict[int, Any] = {}
        self.calls: Counter[str] = Counter()
        self.copies: list[tuple[int, int]] = []  # kind and bytes
        self.touched: dict[int, set[int]] = {}  # devices that each thread's copies used
        self.own_seconds = 0.0  # spent in engines and copies
        self._here = threading.local()
        self._lock = threading.RLock()
        self._stream_handles, self._events = itertools.count(_FIRST_STREAM), itertools.count(1)
        self._next_address = 1 << 44

    @property
    def cuda(self) -> Cuda:
        """As the project takes it."""
        return Cuda(self, self)

    @property
    def used(self) -> int:
        """Bytes of all devices together."""
        return sum(self.used_of(device) for device in range(self.devices))

    @property
    def waits(self) -> int:
        """How often the host waited for a stream or an event, or did what makes it wait."""
        return sum(self.calls[name] for name in WAITS)

    @property
    def allocations(self) -> int:
        return sum(self.calls[name] for name in ALLOCATIONS)

    @property
    def left(self) -> tuple[int, int, int, int, int]:
        """Bytes of devices, and pinned blocks, address ranges, streams and events."""
        ends = (self.pinned, self.reserved, self.streams, self.recorded)
        return (self.used, *map(len, ends))  # type: ignore[return-value]

    def used_of(self, device: int) -> int:
        blocks = sum(x.nbytes for x in self.blocks.values() if x.device == device)
        return blocks + sum(x.nbytes for x in self.physical if x.device == device)

    def __getattribute__(self, name: str) -> Any:
        if name.startswith(("cuda", "cuMem", "cuDevice")):
            value = object.__getattribute__(self, name)
            if callable(value) and not isinstance(value, type):
                self.calls[name] += 1
            return value
        return object.__getattribute__(self, name)

    # Devices -----------------------------------------------------------------------------------

    @property
    def device(self) -> int:
        """The calling thread's current device."""
        return getattr(self._here, "device", 0)

    def cudaGetDevice(self) -> tuple[Status, int]:
        return OK, self.device

    def cudaSetDevice(self, device: int) -> tuple[Status]:
        self._here.device = device
        return (OK if 0 <= device < self.devices else Status.cudaErrorInvalidValue,)

    def cudaDeviceGetAttribute(self, attribute: int, device: int) -> tuple[Status, int]:
        return OK, {75: 12, 76: 0}[attribute]

    def cuDeviceGetAttribute(self, attribute: int, device: int) -> tuple[Status, int]:
        return OK, {102: 1}[attribute]

    def cudaMemGetInfo(self) -> tuple[Status, int, int]:
        return OK, self.capacity - self.used_of(self.device), self.capacity

    # Streams and events ------------------------------------------------------------------------

    def enqueue(self, stream: int, work: Callable[[], None], uses: Uses = ()) -> None:
        """Gives a stream work: what engines and copies do."""
        own = self.streams[stream]
        if own.device != self.device:
            raise AssertionError(f"a stream of device {own.device} used on device {self.device}")
        with self._lock:
            own.given += 1
            if stream in self.lagging or own.queue:
                own.queue.append((work, uses))
                if stream not in self.lagging:
                    self.catch_up(stream)
                return
        start = time.perf_counter()
        work()  # outside the lock: copies of several threads run at once
        with self._lock:
            own.done += 1
            self.own_seconds += time.perf_counter() - start

    def catch_up(self, stream: int, position: int | None = None) -> None:
        """Runs what a stream was given, up to a position counted from its creation."""
        with self._lock:
            own = self.streams[stream]
            while own.queue and (position is None or own.done < position):
                work, _ = own.queue.popleft()
                own.done += 1
                work()

    def _catch_up_all(self) -> None:
        for stream in self.streams:
            self.catch_up(stream)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Status, int]:
        handle = next(self._stream_handles)
        self.streams[handle] = _Stream(self.device)
        return OK, handle

    def cudaStreamDestroy(self, stream: int) -> tuple[Status]:
        self.catch_up(stream)
        del self.streams[stream]
        return (OK,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Status]:
        self.catch_up(stream)
        return (OK,)

    def cudaStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple[Status]:
        after = self.recorded[event]
        self.enqueue(stream, lambda: self.catch_up(*after))
        return (OK,)

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[Status, int]:
        event = next(self._events)
        self.recorded[event] = (next(iter(self.streams)), 0)
        return OK, event

    def cudaEventRecord(self, event: int, stream: int) -> tuple[Status]:
        self.enqueue(stream, lambda: self.times.update({event: time.perf_counter()}))
        self.recorded[event] = stream, self.streams[stream].given
        return (OK,)

    def cudaEventElapsedTime(self, start: int, end: int) -> tuple[Status, float]:
        return OK, 1e3 * (self.times[end] - self.times[start])

    def cudaEventSynchronize(self, event: int) -> tuple[Status]:
        stream, position = self.recorded[event]
        if stream in self.streams:  # else it ended with all its work done
            self.catch_up(stream, position)
        return (OK,)

    def cudaEventDestroy(self, event: int) -> tuple[Status]:
        del self.recorded[event]
        return (OK,)

    # Memory ------------------------------------------------------------------------------------

    def _address(self, nbytes: int) -> tuple[int, Any]:
        if not self.backed:
            address = self._next_address
            self._next_address += -(-nbytes // (1 << 21)) * (1 << 21)
            return address, None
        whole = np.empty(nbytes + ALIGNMENT, np.uint8)
        return whole.ctypes.data + -whole.ctypes.data % ALIGNMENT, whole

    def cudaMalloc(self, nbytes: int) -> tuple[Status, int]:
        if self.used_of(self.device) + nbytes > self.capacity:
            return Status.cudaErrorMemoryAllocation, 0
        address, keeps = self._address(nbytes)
        self.blocks[address] = _Range(nbytes, self.device, keeps)
        return OK, address

    def cudaFree(self, pointer: int) -> tuple[Status]:
        self._catch_up_all()  # as in CUDA: freeing waits for the device
        del self.blocks[pointer]
        return (OK,)

    def cudaHostAlloc(self, nbytes: int, flags: int) -> tuple[Status, int]:
        address, keeps = self._address(nbytes) if self.backed else (0, np.empty(nbytes, np.uint8))
        address = address or keeps.ctypes.data
        self.pinned[address] = keeps
        return OK, address

    def cudaFreeHost(self, pointer: int) -> tuple[Status]:
        self._catch_up_all()
        del self.pinned[pointer]
        return (OK,)

    def check_device_memory(self, address: int, nbytes: int, device: int) -> None:
        """Refuses addresses that do not lie in live memory of a device.

        Raises:
            AssertionError: as a fault in a kernel would.
        """
        for start, block in self.blocks.items():
            if start <= address and address + nbytes <= start + block.nbytes:
                if block.device != device:
                    raise AssertionError(f"device {device} was given memory of {block.device}")
                return
        end = address + nbytes
        for start, (mapping, _) in sorted(self.mapped.items()):
            if start <= address < start + mapping.nbytes:
                if mapping.device != device:
                    raise AssertionError(f"device {device} was given memory of {mapping.device}")
                address = min(end, start + mapping.nbytes)
        if address < end:
            raise AssertionError(f"{end - address} bytes that are not device memory were used")

    def cudaMemcpyAsync(self, target, source, nbytes, kind, stream):
        self.copies.append((kind, nbytes))
        device = self.streams[stream].device
        for address, kinds in ((target, (1, 3)), (source, (2, 3))):
            if kind in kinds:
                self.check_device_memory(address, nbytes, device)
        self.touched.setdefault(threading.get_ident(), set()).add(device)
        if self.backed:
            uses = ((target, nbytes), (source, nbytes))
            self.enqueue(stream, lambda: _libc.memcpy(target, source, nbytes), uses)
        return (OK,)

    # Virtual memory ----------------------------------------------------------------------------

    def cuMemGetAllocationGranularity(self, properties: Any, option: int) -> tuple[Status, int]:
        return OK, self.granularity

    def cuMemAddressReserve(self, nbytes, alignment, address, flags):
        if nbytes % self.granularity:
            return Status.cudaErrorInvalidValue, 0
        if self.backed:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
            start = _libc.mmap(None, nbytes, _NONE, flags, -1, 0)
        else:
            start, _ = self._address(nbytes)
        self.reserved[start] = _Range(nbytes, self.device)
        return OK, start

    def cuMemAddressFree(self, pointer: int, nbytes: int) -> tuple[Status]:
        reserved = self.reserved.pop(pointer)
        inside = [at for at in self.mapped if pointer <= at < pointer + reserved.nbytes]
        if inside or nbytes != reserved.nbytes:
            raise AssertionError("addresses given up that are still mapped")
        if self.backed:
            _libc.munmap(ctypes.c_void_p(pointer), ctypes.c_size_t(nbytes))
        return (OK,)

    def cuMemCreate(self, nbytes: int, properties: Any, flags: int) -> tuple[Status, Any]:
        device = properties.location.id
        if nbytes % self.granularity:
            return Status.cudaErrorInvalidValue, None
        if self.used_of(device) + nbytes > self.capacity:
            return Status.cudaErrorMemoryAllocation, None
        descriptor = -1
        if self.backed:
            descriptor = os.memfd_create("fake CUDA")
            os.truncate(descriptor, nbytes)
        physical = _Physical(descriptor, nbytes, device)
        self.physical.append(physical)
        return OK, physical

    def cuMemRelease(self, handle: _Physical) -> tuple[Status]:
        if handle.maps or handle.released:
            raise AssertionError("physical memory released that is mapped, or released twice")
        handle.released = True
        self.physical.remove(handle)
        if handle.descriptor >= 0:
            os.close(handle.descriptor)
        return (OK,)

    def cuMemMap(self, pointer, nbytes, offset, handle, flags):
        fits = any(
            start <= pointer and pointer + nbytes <= start + reserved.nbytes
            for start, reserved in self.reserved.items()
        )
        taken = any(
            start < pointer + nbytes and pointer < start + mapping.nbytes
            for start, (mapping, _) in self.mapped.items()
        )
        if not fits or taken or nbytes != handle.nbytes or offset or handle.released:
            return (Status.cudaErrorInvalidValue,)
        if self.backed:
            flags = mmap.MAP_SHARED | _FIXED
            _libc.mmap(pointer, nbytes, _PROT, flags, handle.descriptor, 0)
        self.mapped[pointer] = _Range(nbytes, handle.device), handle
        handle.maps.add(pointer)
        return (OK,)

    def cuMemSetAccess(self, pointer, nbytes, access, count):
        right = self.mapped[pointer][0].nbytes == nbytes and len(access) == count == 1
        right = right and access[0].location.id == self.mapped[pointer][0].device
        return (OK if right else Status.cudaErrorInvalidValue,)

    def cuMemUnmap(self, pointer: int, nbytes: int) -> tuple[Status]:
        for stream, own in self.streams.items():
            for _, uses in own.queue:
                if any(at < pointer + nbytes and pointer < at + size for at, size in uses):
                    raise AssertionError(f"memory unmapped that stream {stream} has yet to use")
        mapping, handle = self.mapped.pop(pointer)
        if mapping.nbytes != nbytes:
            raise AssertionError("another range unmapped than was mapped")
        if self.backed:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE | _FIXED
            _libc.mmap(pointer, nbytes, _NONE, flags, -1, 0)
        handle.maps.remove(pointer)
        return (OK,)
