"""Device memory through cuda-python: a stream, buffers that go back to a free list, uploads.

Copies that need not wait for the graphs run on a stream of their own: `pinned_store`.

Not run on a GPU by this project's tests, which drive it with a stand-in for the CUDA runtime.
"""

import ctypes
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from klein_kv.config import ITEM_SIZE
from klein_kv.errors import BackendError, CapacityError
from klein_kv.weights import NUMPY_DTYPES, WeightRef, map_weight

__all__ = [
    "STAGING_BYTES",
    "CudaMemory",
    "DeviceBuffer",
    "Event",
    "allocated_bytes",
    "call_cuda",
    "load_cudart",
]

_ALIGNMENT = 256
STAGING_BYTES = 64 << 20
"""Size of each of the two pinned host buffers that weights are uploaded through."""
_TIMING, _NO_TIMING = 0, 2  # cudaEventDefault, cudaEventDisableTiming


def allocated_bytes(nbytes: int) -> int:
    """Bytes of the block that a tensor of `nbytes` bytes gets."""
    return -(-max(1, nbytes) // _ALIGNMENT) * _ALIGNMENT


def load_cudart(extra: str = "rtx") -> Any:
    """Imports the CUDA runtime's bindings.

    Args:
        extra: of this package, that brings them; for the message.

    Raises:
        BackendError: cuda-python is not installed, or there is no usable GPU.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise BackendError(
            f"cuda-python is not installed; install it with pip install 'klein-kv[{extra}]'"
        ) from error
    status, count = runtime.cudaGetDeviceCount()
    if int(status) != 0 or not count:
        raise BackendError(
            f"no usable NVIDIA GPU: CUDA says {status.name}; engines need one, install or update "
            "the driver (artifacts exported with --dtype fp32 run on a CPU)"
        )
    return runtime


def call_cuda(cudart: Any, name: str, *args: Any) -> Any:
    """Calls a function of the CUDA runtime and unpacks its result.

    Raises:
        CapacityError: out of device memory.
        BackendError: any other failure.
    """
    status, *values = getattr(cudart, name)(*args)
    if int(status) != 0:
        if status == cudart.cudaError_t.cudaErrorMemoryAllocation:
            raise CapacityError(
                f"out of GPU memory in {name}; use fewer references, a smaller output, or a "
                "smaller precision"
            )
        raise BackendError(f"{name} failed: {status.name}")
    return values[0] if len(values) == 1 else values or None


class DeviceBuffer:
    """A tensor in device memory; its memory returns to the pool when the last view is gone.

    Attributes:
        pointer: device address.
        shape: elements per axis.
        dtype: "float32", "bfloat16", ...
    """

    __slots__ = ("_block", "dtype", "pointer", "shape")

    def __init__(
        self, pointer: int, shape: tuple[int, ...], dtype: str, block: "_Block | None"
    ) -> None:
        self.pointer = pointer
        self.shape = shape
        self.dtype = dtype
        self._block = block

    @property
    def busy(self) -> "Event | None":
        """What another stream still does with the memory; the main one waits for it (`settle`)."""
        return None if self._block is None else self._block.busy

    @busy.setter
    def busy(self, event: "Event") -> None:
        if self._block is not None:
            self._block.busy = event

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]

    def view(self, shape: tuple[int, ...]) -> "DeviceBuffer":
        """The same memory under another shape of as many elements."""
        if math.prod(shape) != math.prod(self.shape):
            raise BackendError(f"cannot view {self.shape} as {shape}: other number of elements")
        return DeviceBuffer(self.pointer, shape, self.dtype, self._block)


class Event:
    """A point on a stream that work on another one, or the host, can be made to wait for.

    Freed when it is collected.

    Args:
        memory: of the device.
        stream: behind whose work it is recorded now.
        timed: it keeps the time, for `CudaMemory.elapsed`.
    """

    __slots__ = ("_memory", "_seen", "handle")

    def __init__(self, memory: "CudaMemory", stream: Any, *, timed: bool = False) -> None:
        self._memory = memory
        self._seen: set[Any] = {stream}  # streams that come after it anyway
        self.handle = memory.call("cudaEventCreateWithFlags", _TIMING if timed else _NO_TIMING)
        memory.call("cudaEventRecord", self.handle, stream)

    def before(self, stream: Any) -> None:
        """Puts what a stream is given from now on behind it."""
        if stream not in self._seen:
            self._memory.call("cudaStreamWaitEvent", stream, self.handle, 0)
            self._seen.add(stream)

    def synchronize(self) -> None:
        """Lets the host wait."""
        self._memory.call("cudaEventSynchronize", self.handle)

    def __del__(self) -> None:
        if hasattr(self, "handle") and not self._memory.closed:
            self._memory.call("cudaEventDestroy", self.handle)


class _Block:
    """Memory that a pool lent; given back when it is collected."""

    __slots__ = ("busy", "nbytes", "pointer", "pool")

    def __init__(self, pointer: int, nbytes: int, pool: "CudaMemory") -> None:
        self.pointer = pointer
        self.nbytes = nbytes
        self.pool = pool
        self.busy: Event | None = None

    def __del__(self) -> None:
        self.pool.take_back(self.pointer, self.nbytes, self.busy)


class _Idle(NamedTuple):
    """Memory that nobody holds, and events that must pass before it is used again."""

    pointer: int
    events: tuple[Event, ...]


class CudaMemory:
    """Memory and the main stream of one device.

    Work on the main stream is in order, so a block that is given back may be lent again at once:
    what uses it next comes later on the stream. Other streams wait for what was to be done with it
    when it was given back. Blocks of a size are reused last in, first out; a loop
    that repeats gets the same addresses again, as captured CUDA graphs need.

    Args:
        cudart: `cuda.bindings.runtime`.
        device: ordinal of the GPU.

    Raises:
        BackendError: no such device.
    """

    def __init__(self, cudart: Any, device: int = 0) -> None:
        self.cudart = cudart
        self.device = device
        self._free: dict[int, list[_Idle]] = defaultdict(list)
        self._streams = 0  # beside the main one
        self.closed = False
        self.call("cudaSetDevice", device)
        self.stream = self.call("cudaStreamCreateWithFlags", cudart.cudaStreamNonBlocking)

    def call(self, name: str, *args: Any) -> Any:
        """See `call_cuda`."""
        return call_cuda(self.cudart, name, *args)

    @property
    def compute_capability(self) -> int:
        """Compute capability of the GPU without the dot, e.g. 120."""
        attributes = self.cudart.cudaDeviceAttr
        parts = [
            self.call("cudaDeviceGetAttribute", attribute, self.device)
            for attribute in (
                attributes.cudaDevAttrComputeCapabilityMajor,
                attributes.cudaDevAttrComputeCapabilityMinor,
            )
        ]
        return 10 * int(parts[0]) + int(parts[1])

    @property
    def available(self) -> int:
        """Bytes that can still be taken: what the device has free, and blocks that nobody uses."""
        free, _total = self.call("cudaMemGetInfo")
        return int(free) + sum(nbytes * len(found) for nbytes, found in self._free.items())

    def open_stream(self) -> Any:
        """Another stream; `close_stream` ends it."""
        # What was given back until now was given back without an event.
        self.synchronize()
        self._streams += 1
        return self.call("cudaStreamCreateWithFlags", self.cudart.cudaStreamNonBlocking)

    def close_stream(self, stream: Any) -> None:
        """Waits for a stream and ends it."""
        self.call("cudaStreamSynchronize", stream)
        self.call("cudaStreamDestroy", stream)
        self._streams -= 1

    def allocate(self, shape: tuple[int, ...], dtype: str, stream: Any = None) -> DeviceBuffer:
        """Uninitialised memory for a tensor; empty tensors get a valid address too.

        Args:
            shape: elements per axis.
            dtype: their type.
            stream: what uses it first; None for the main stream.
        """
        nbytes = allocated_bytes(math.prod(shape) * ITEM_SIZE[dtype])
        pointer = self._take(nbytes, self.stream if stream is None else stream)
        return DeviceBuffer(pointer, shape, dtype, _Block(pointer, nbytes, self))

    def settle(self, buffer: DeviceBuffer) -> None:
        """Puts the main stream behind what other streams do with a tensor."""
        if buffer.busy is not None:
            buffer.busy.before(self.stream)

    def _take(self, nbytes: int, stream: Any) -> int:
        try:
            idle = self._free[nbytes].pop()
        except IndexError:
            return self._allocate(nbytes)
        for event in idle.events:
            event.before(stream)
        return idle.pointer

    def _allocate(self, nbytes: int) -> int:
        try:
            return int(self.call("cudaMalloc", nbytes))
        except CapacityError:
            self.trim()
            return int(self.call("cudaMalloc", nbytes))

    def take_back(self, pointer: int, nbytes: int, busy: Event | None = None) -> None:
        """Puts a block on the free list."""
        if self.closed:
            return
        events = [] if busy is None else [busy]
        if self._streams:
            events.append(Event(self, self.stream))
        self._free[nbytes].append(_Idle(pointer, tuple(events)))

    def trim(self) -> None:
        """Frees all blocks that nobody uses."""
        self.synchronize()
        for blocks in self._free.values():
            while blocks:
                idle = blocks.pop()
                for event in idle.events:
                    event.synchronize()
                self.call("cudaFree", idle.pointer)

    def upload(self, array: NDArray[Any]) -> DeviceBuffer:
        """Copies a host array; done with the array on return."""
        names = {dtype: name for name, dtype in NUMPY_DTYPES.items()}
        if array.dtype not in names:
            raise BackendError(f"cannot upload {array.dtype}, expected one of {list(NUMPY_DTYPES)}")
        array = np.ascontiguousarray(array)
        buffer = self.allocate(array.shape, names[array.dtype])
        if array.nbytes:
            self.copy(buffer.pointer, array.ctypes.data, array.nbytes, "HostToDevice")
            self.synchronize()
        return buffer

    def download(self, buffer: DeviceBuffer) -> NDArray[Any]:
        """Waits for the stream and copies a tensor to the host."""
        array = np.empty(buffer.shape, NUMPY_DTYPES[buffer.dtype])
        self.settle(buffer)
        if array.nbytes:
            self.copy(array.ctypes.data, buffer.pointer, array.nbytes, "DeviceToHost")
        self.synchronize()
        return array

    def copy(self, target: int, source: int, nbytes: int, kind: str, stream: Any = None) -> None:
        """Enqueues a copy.

        Args:
            target: address.
            source: address.
            nbytes: how much.
            kind: "HostToDevice" or "DeviceToHost".
            stream: where; None for the main stream.
        """
        direction = getattr(self.cudart.cudaMemcpyKind, f"cudaMemcpy{kind}")
        stream = self.stream if stream is None else stream
        self.call("cudaMemcpyAsync", target, source, nbytes, direction, stream)

    def synchronize(self) -> None:
        """Waits for all work on the stream."""
        self.call("cudaStreamSynchronize", self.stream)

    def mark(self) -> Event:
        """Records an event behind all work that is queued now."""
        return Event(self, self.stream, timed=True)

    def elapsed(self, start: Event, end: Event) -> float:
        """Seconds of the stream between two marks; waits for the second."""
        end.synchronize()
        return float(self.call("cudaEventElapsedTime", start.handle, end.handle)) / 1e3

    def upload_weights(self, refs: Sequence[WeightRef]) -> dict[WeightRef, DeviceBuffer]:
        """Copies weights from their mapped files through two pinned buffers in turn.

        While one buffer is on its way to the device the other is filled from the file.

        Args:
            refs: byte ranges of files; each is uploaded once.

        Returns:
            A device buffer for each.
        """
        placed: dict[WeightRef, DeviceBuffer] = {}
        staging = [int(self.call("cudaHostAlloc", STAGING_BYTES, 0)) for _ in range(2)]
        events = [self.call("cudaEventCreateWithFlags", _NO_TIMING) for _ in staging]
        turn = 0
        try:
            for ref in sorted(set(refs), key=lambda ref: (ref.path, ref.offset)):
                placed[ref] = self.allocate(ref.shape, ref.dtype)
                source = map_weight(ref).reshape(-1).view(np.uint8)
                for start in range(0, ref.nbytes, STAGING_BYTES):
                    piece = source[start : start + STAGING_BYTES]
                    self.call("cudaEventSynchronize", events[turn])
                    ctypes.memmove(staging[turn], piece.ctypes.data, piece.nbytes)
                    target = placed[ref].pointer + start
                    self.copy(target, staging[turn], piece.nbytes, "HostToDevice")
                    self.call("cudaEventRecord", events[turn], self.stream)
                    turn = 1 - turn
            self.synchronize()
        finally:
            for pointer, event in zip(staging, events, strict=True):
                self.call("cudaFreeHost", pointer)
                self.call("cudaEventDestroy", event)
        return placed

    def close(self) -> None:
        """Frees everything; buffers must not be used afterwards."""
        if self.closed:
            return
        self.trim()
        self.closed = True
        self.call("cudaStreamDestroy", self.stream)
