"""Device memory: a stream, buffers that go back to a free list, and copies that wait for nothing.

Not run on a GPU by this project's tests, which drive it with a stand-in for CUDA.
"""

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klein_kv.artifacts.config import ITEM_SIZE
from klein_kv.artifacts.weights import NUMPY_DTYPES
from klein_kv.errors import BackendError, CapacityError
from klein_kv.runtime.backends.trt.cuda import Cuda, aligned
from klein_kv.runtime.backends.trt.staging import Staging

__all__ = ["STAGING_BYTES", "CudaMemory", "DeviceBuffer", "Event"]

STAGING_BYTES = 128 << 20
"""Pinned host memory of a backend, that everything goes through."""

_TIMING, _NO_TIMING = 0, 2  # cudaEventDefault, cudaEventDisableTiming
_NAMES = {dtype: name for name, dtype in NUMPY_DTYPES.items()}


class DeviceBuffer:
    """A tensor in device memory; its memory returns to the pool when the last view is gone.

    Attributes:
        pointer: device address.
        shape: elements per axis.
        dtype: "float32", "bfloat16", ...
        block: the memory that it lies in, which it keeps.
        volatile: what it holds changes when the engine that owns it runs again.
    """

    __slots__ = ("__weakref__", "block", "dtype", "pointer", "shape", "volatile")

    def __init__(
        self,
        pointer: int,
        shape: tuple[int, ...],
        dtype: str,
        block: object,
        *,
        volatile: bool = False,
    ) -> None:
        self.pointer = pointer
        self.shape = shape
        self.dtype = dtype
        self.block = block
        self.volatile = volatile

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]

    def view(self, shape: tuple[int, ...], start: int = 0) -> "DeviceBuffer":
        """Elements from `start` on, under a shape."""
        if start < 0 or start + math.prod(shape) > math.prod(self.shape):
            raise BackendError(f"cannot view {self.shape} from element {start} as {shape}")
        pointer = self.pointer + start * ITEM_SIZE[self.dtype]
        return DeviceBuffer(pointer, shape, self.dtype, self.block, volatile=self.volatile)


class Event:
    """A point on a stream that another one, or the host, can be made to wait for.

    Freed when it is collected.

    Args:
        memory: of the device.
        stream: behind whose work it is recorded now.
        timed: it keeps the time, for `CudaMemory.elapsed`.
    """

    __slots__ = ("_memory", "handle")

    def __init__(self, memory: "CudaMemory", stream: Any, *, timed: bool = False) -> None:
        self._memory = memory
        self.handle = memory.call("cudaEventCreateWithFlags", _TIMING if timed else _NO_TIMING)
        memory.call("cudaEventRecord", self.handle, stream)

    def before(self, stream: Any) -> None:
        """Puts what a stream is given from now on behind it."""
        self._memory.call("cudaStreamWaitEvent", stream, self.handle, 0)

    def synchronize(self) -> None:
        """Lets the host wait."""
        self._memory.call("cudaEventSynchronize", self.handle)

    def __del__(self) -> None:
        if hasattr(self, "handle") and not self._memory.closed:
            self._memory.call("cudaEventDestroy", self.handle)


class _Block:
    """Memory that the pool lent; given back when it is collected."""

    __slots__ = ("_memory", "nbytes", "pointer")

    def __init__(self, memory: "CudaMemory", pointer: int, nbytes: int) -> None:
        self._memory = memory
        self.pointer = pointer
        self.nbytes = nbytes

    def __del__(self) -> None:
        self._memory.take_back(self.pointer, self.nbytes)


class _Entered:
    """Holds the lock of a device's memory, and makes it the thread's current device.

    Entered at every call of the backend, nested ones included: no generator, for its time.
    """

    __slots__ = ("_before", "_lock", "_memory")

    def __init__(self, memory: "CudaMemory") -> None:
        self._memory = memory
        self._lock = threading.RLock()
        self._before: list[int] = []

    def __enter__(self) -> None:
        memory = self._memory
        self._lock.acquire()
        try:
            memory.check_open()
            before = memory.call("cudaGetDevice")
            if before != memory.device:
                memory.call("cudaSetDevice", memory.device)
        except BaseException:
            self._lock.release()
            raise
        self._before.append(before)

    def __exit__(self, *_: object) -> None:
        before = self._before.pop()
        try:
            if before != self._memory.device:
                self._memory.call("cudaSetDevice", before)
        finally:
            self._lock.release()


class CudaMemory:
    """Memory and the main stream of one device.

    Work on the main stream is in order, so a block that is given back may be lent again at once:
    what uses it next comes later on the stream. Nothing here waits for the device but `download`,
    `synchronize`, freeing memory, and an upload that the staging memory has no room left for.

    Args:
        cuda: the bindings.
        device: ordinal of the GPU.
        staging_bytes: pinned host memory that uploads and downloads go through.

    Attributes:
        stream: the main stream.
        staging: pinned host memory.
        reclaim: called in turn where the device has no memory left: what frees some.
        closed: nothing may be used any more.

    Raises:
        BackendError: no such device.
    """

    def __init__(self, cuda: Cuda, device: int = 0, staging_bytes: int = STAGING_BYTES) -> None:
        self.cuda = cuda
        self.device = device
        self.closed = False
        self.reclaim: list[Callable[[], None]] = [self.trim]
        self._idle: dict[int, list[int]] = defaultdict(list)
        self._taken: set[int] = set()  # every block, idle or not
        self._entered = _Entered(self)
        with self._entered:
            self.stream = self.call("cudaStreamCreateWithFlags", cuda.runtime.cudaStreamNonBlocking)
            self.staging = Staging(cuda, device, self.stream, staging_bytes)

    def call(self, name: str, *args: Any) -> Any:
        """See `Cuda.call`."""
        return self.cuda.call(name, *args)

    def entered(self) -> "_Entered":
        """One thread at a time, with the device as its own: `with memory.entered(): ...`.

        Raises:
            BackendError: closed.
        """
        return self._entered

    def check_open(self) -> None:
        """Refuses what is closed.

        Raises:
            BackendError: it is.
        """
        if self.closed:
            raise BackendError("the tensorrt backend is closed; open the artifacts again")

    @property
    def compute_capability(self) -> int:
        """Compute capability of the GPU without the dot, e.g. 120."""
        attributes = self.cuda.runtime.cudaDeviceAttr
        parts = [
            self.call("cudaDeviceGetAttribute", attribute, self.device)
            for attribute in (
                attributes.cudaDevAttrComputeCapabilityMajor,
                attributes.cudaDevAttrComputeCapabilityMinor,
            )
        ]
        return 10 * int(parts[0]) + int(parts[1])

    @property
    def free(self) -> int:
        """Bytes that the device has free."""
        return int(self.call("cudaMemGetInfo")[0])

    @property
    def total(self) -> int:
        """Bytes of the device."""
        return int(self.call("cudaMemGetInfo")[1])

    @property
    def idle(self) -> int:
        """Bytes in blocks that nobody uses."""
        return sum(nbytes * len(blocks) for nbytes, blocks in self._idle.items())

    def allocate(
        self, shape: tuple[int, ...], dtype: str, *, volatile: bool = False
    ) -> DeviceBuffer:
        """Uninitialised memory for a tensor; empty tensors get a valid address too."""
        nbytes = aligned(math.prod(shape) * ITEM_SIZE[dtype])
        try:
            pointer = self._idle[nbytes].pop()
        except IndexError:
            pointer = int(self.call_for_memory("cudaMalloc", nbytes))
            self._taken.add(pointer)
        block = _Block(self, pointer, nbytes)
        return DeviceBuffer(pointer, shape, dtype, block, volatile=volatile)

    def call_for_memory(self, name: str, *args: Any) -> Any:
        """Calls a function that takes device memory, again and again while some can be freed.

        Raises:
            CapacityError: out of device memory.
        """
        for free_some in self.reclaim:
            try:
                return self.call(name, *args)
            except CapacityError:
                free_some()
        return self.call(name, *args)

    def make_free(self, nbytes: int) -> None:
        """Gives idle memory back to the device until it has so much free, or nothing is idle."""
        for free_some in self.reclaim:
            if self.free >= nbytes:
                return
            free_some()

    def take_back(self, pointer: int, nbytes: int) -> None:
        """Puts a block on the free list; may be called from any thread."""
        if not self.closed:
            self._idle[nbytes].append(pointer)

    def trim(self) -> None:
        """Frees blocks that nobody uses."""
        if self.idle:
            self.synchronize()
        for blocks in self._idle.values():
            while blocks:
                self._free(blocks.pop())

    def _free(self, pointer: int) -> None:
        self._taken.discard(pointer)
        self.call("cudaFree", pointer)

    def upload(self, array: NDArray[Any]) -> DeviceBuffer:
        """Copies a host array; done with the array on return, and without waiting."""
        if array.dtype not in _NAMES:
            raise BackendError(f"cannot upload {array.dtype}, expected one of {list(NUMPY_DTYPES)}")
        buffer = self.allocate(array.shape, _NAMES[array.dtype])
        self.staging.upload(buffer.pointer, array)
        return buffer

    def write(self, buffer: DeviceBuffer, array: NDArray[Any]) -> None:
        """Copies a host array of the buffer's type and size into it, as `upload` does."""
        if _NAMES.get(array.dtype) != buffer.dtype or array.nbytes != buffer.nbytes:
            raise BackendError(
                f"cannot write {array.dtype} {array.shape} to {buffer.dtype} {buffer.shape}"
            )
        self.staging.upload(buffer.pointer, array)

    def download(self, buffer: DeviceBuffer) -> NDArray[Any]:
        """Waits for the stream and copies a tensor to the host."""
        array = np.empty(buffer.shape, NUMPY_DTYPES[buffer.dtype])
        self.staging.download(buffer.pointer, array)
        return array

    def assemble(self, shape: tuple[int, ...], parts: Iterable[DeviceBuffer]) -> DeviceBuffer:
        """See `Backend.assemble`."""
        whole: DeviceBuffer | None = None
        at = 0
        for part in parts:
            if whole is None:
                whole = self.allocate(shape, part.dtype)
            if part.dtype != whole.dtype or at + part.nbytes > whole.nbytes:
                raise BackendError(f"parts do not make {whole.dtype} {shape}")
            self.copy_on_device(whole.pointer + at, part.pointer, part.nbytes)
            at += part.nbytes
        if whole is None or at != whole.nbytes:
            raise BackendError(f"{at} bytes of parts do not make {shape}")
        return whole

    def copy_on_device(self, target: int, source: int, nbytes: int) -> None:
        """Enqueues a copy from one device address to another."""
        if nbytes:
            self.copy(target, source, nbytes, "DeviceToDevice")

    def copy(self, target: int, source: int, nbytes: int, kind: str, stream: Any = None) -> None:
        """Enqueues a copy.

        Args:
            target: address.
            source: address.
            nbytes: how much.
            kind: "HostToDevice", "DeviceToHost" or "DeviceToDevice".
            stream: where; None for the main stream.
        """
        direction = getattr(self.cuda.runtime.cudaMemcpyKind, f"cudaMemcpy{kind}")
        stream = self.stream if stream is None else stream
        self.call("cudaMemcpyAsync", target, source, nbytes, direction, stream)

    def synchronize(self) -> None:
        """Waits for all work on the stream."""
        self.call("cudaStreamSynchronize", self.stream)
        self.staging.drained()

    def mark(self) -> Event:
        """Records an event behind all work that is queued now."""
        return Event(self, self.stream, timed=True)

    def elapsed(self, start: Event, end: Event) -> float:
        """Seconds of the stream between two marks; waits for the second."""
        end.synchronize()
        return float(self.call("cudaEventElapsedTime", start.handle, end.handle)) / 1e3

    def close(self) -> None:
        """Frees everything; buffers must not be used afterwards."""
        if self.closed:
            return
        with self.entered():
            self.synchronize()
            self.closed = True
            for pointer in list(self._taken):
                self._free(pointer)
            self.staging.close()
            self.call("cudaStreamDestroy", self.stream)
