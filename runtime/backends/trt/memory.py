"""Device memory: a stream, buffers that go back to a free list, copies that wait for nothing."""

import contextlib
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from klein_kv.artifacts.config import ITEM_SIZE
from klein_kv.artifacts.weights import NUMPY_DTYPES
from klein_kv.errors import BackendError, CapacityError
from klein_kv.runtime.backends.trt.cuda import Cuda, aligned
from klein_kv.runtime.backends.trt.staging import Staging

__all__ = ["DTYPE_NAMES", "STAGING_BYTES", "CudaMemory", "DeviceBuffer"]

STAGING_BYTES = 128 << 20
"""Pinned host memory of a backend, that everything goes through."""

DTYPE_NAMES = {dtype: name for name, dtype in NUMPY_DTYPES.items()}


@dataclass(eq=False, slots=True, weakref_slot=True)
class DeviceBuffer:
    """A tensor in device memory; its memory returns to the pool when the last view is gone."""

    pointer: int
    shape: tuple[int, ...]
    dtype: str
    block: object  # the memory that it lies in, which it keeps
    volatile: bool = False  # its content changes when the engine that owns it runs again

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]

    def view(self, shape: tuple[int, ...], start: int = 0) -> "DeviceBuffer":
        """Elements from `start` on, under a shape."""
        if start < 0 or start + math.prod(shape) > math.prod(self.shape):
            raise BackendError(f"cannot view {self.shape} from element {start} as {shape}")
        pointer = self.pointer + start * ITEM_SIZE[self.dtype]
        return DeviceBuffer(pointer, shape, self.dtype, self.block, self.volatile)


@dataclass(eq=False, slots=True)
class _Block:
    """Memory that the pool lent; back on its free list when it is collected, by any thread."""

    idle: list[int]
    pointer: int

    def __del__(self) -> None:
        self.idle.append(self.pointer)


class CudaMemory:
    """Memory and the main stream of one device.

    `with memory: ...` lets one thread at a time in, with the device as its current one; it may be
    nested, and raises BackendError once the memory is closed.

    Work on the main stream is in order, so a block that is given back may be lent again at once:
    what uses it next comes later on the stream. Nothing here waits for the device but `download`,
    `synchronize`, freeing memory, and an upload that the staging memory has no room left for.

    `reclaim` has what frees memory, called in turn where the device has none left.
    """

    def __init__(self, cuda: Cuda, device: int = 0, staging_bytes: int = STAGING_BYTES) -> None:
        self.cuda = cuda
        self.call = cuda.call
        self.device = device
        self.reclaim: list[Callable[[], None]] = [self.trim]
        self._closed = False
        self._lock = threading.RLock()
        self._before: list[int] = []  # current devices of the thread that is in
        self._idle: dict[int, list[int]] = defaultdict(list)
        self._taken: set[int] = set()  # every block, idle or not
        with self:
            self.stream = self.call("cudaStreamCreateWithFlags", cuda.runtime.cudaStreamNonBlocking)
            self.staging = Staging(cuda, device, self.stream, staging_bytes)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            undo.enter_context(self._lock)
            if self._closed:
                raise BackendError("the tensorrt backend is closed; open the artifacts again")
            before: int = self.call("cudaGetDevice")
            if before != self.device:
                self.call("cudaSetDevice", self.device)
            self._before.append(before)
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        before = self._before.pop()
        try:
            if before != self.device:
                self.call("cudaSetDevice", before)
        finally:
            self._lock.release()

    @property
    def compute_capability(self) -> int:
        """Compute capability of the GPU without the dot, e.g. 120."""
        names = self.cuda.runtime.cudaDeviceAttr
        parts = names.cudaDevAttrComputeCapabilityMajor, names.cudaDevAttrComputeCapabilityMinor
        major, minor = (self.call("cudaDeviceGetAttribute", x, self.device) for x in parts)
        return 10 * int(major) + int(minor)

    @property
    def free(self) -> int:
        """Bytes that the device has free."""
        return int(self.call("cudaMemGetInfo")[0])

    @property
    def idle(self) -> int:
        """Bytes in blocks that nobody uses."""
        return sum(nbytes * len(blocks) for nbytes, blocks in self._idle.items())

    def allocate(
        self, shape: tuple[int, ...], dtype: str, *, volatile: bool = False
    ) -> DeviceBuffer:
        """Uninitialised memory for a tensor; empty tensors get a valid address too."""
        nbytes = aligned(math.prod(shape) * ITEM_SIZE[dtype])
        idle = self._idle[nbytes]
        try:
            pointer = idle.pop()
        except IndexError:
            pointer = int(self.call_for_memory("cudaMalloc", nbytes))
            self._taken.add(pointer)
        return DeviceBuffer(pointer, shape, dtype, _Block(idle, pointer), volatile)

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

    def trim(self) -> None:
        """Frees blocks that nobody uses."""
        if self.idle:
            self.synchronize()
        for blocks in self._idle.values():
            while blocks:
                pointer = blocks.pop()
                self._taken.discard(pointer)
                self.call("cudaFree", pointer)

    def upload(self, array: NDArray[Any]) -> DeviceBuffer:
        """Copies a host array; done with the array on return, and without waiting."""
        if array.dtype not in DTYPE_NAMES:
            raise BackendError(f"cannot upload {array.dtype}, expected one of {list(NUMPY_DTYPES)}")
        buffer = self.allocate(array.shape, DTYPE_NAMES[array.dtype])
        self.staging.upload(buffer.pointer, array)
        return buffer

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
            self.copy(whole.pointer + at, part.pointer, part.nbytes)
            at += part.nbytes
        if whole is None or at != whole.nbytes:
            raise BackendError(f"{at} bytes of parts do not make {shape}")
        return whole

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Enqueues a copy from one device address to another."""
        if nbytes:
            self.cuda.copy(target, source, nbytes, "DeviceToDevice", self.stream)

    def synchronize(self) -> None:
        """Waits for all work on the stream."""
        self.staging.wait()

    def close(self) -> None:
        """Frees everything; buffers must not be used afterwards."""
        if self._closed:
            return
        with self:
            self._closed = True
            self.synchronize()
            for pointer in self._taken:
                self.call("cudaFree", pointer)
            self.staging.close()
            self.call("cudaStreamDestroy", self.stream)
