"""Device memory through cuda-python: one stream, buffers that go back to a free list, uploads.

Not run on a GPU by this project's tests, which drive it with a stand-in for the CUDA runtime.
"""

import ctypes
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klein_kv.config import ITEM_SIZE
from klein_kv.errors import BackendError, CapacityError
from klein_kv.weights import NUMPY_DTYPES, WeightRef, map_weight

__all__ = ["CudaMemory", "DeviceBuffer", "Event", "load_cudart"]

_ALIGNMENT = 256
_STAGING_BYTES = 64 << 20


def load_cudart() -> Any:
    """Imports the CUDA runtime's bindings.

    Raises:
        BackendError: cuda-python is not installed, or there is no usable GPU.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise BackendError(
            "cuda-python is not installed; install it with pip install 'klein-kv[rtx]'"
        ) from error
    status, count = runtime.cudaGetDeviceCount()
    if int(status) != 0 or not count:
        raise BackendError(
            f"no usable NVIDIA GPU: CUDA says {status.name}; engines need one, install or update "
            "the driver (artifacts exported with --dtype fp32 run on a CPU)"
        )
    return runtime


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
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]

    def view(self, shape: tuple[int, ...]) -> "DeviceBuffer":
        """The same memory under another shape of as many elements."""
        if math.prod(shape) != math.prod(self.shape):
            raise BackendError(f"cannot view {self.shape} as {shape}: other number of elements")
        return DeviceBuffer(self.pointer, shape, self.dtype, self._block)


class _Block:
    """Memory that a pool lent; given back when it is collected."""

    __slots__ = ("nbytes", "pointer", "pool")

    def __init__(self, pointer: int, nbytes: int, pool: "CudaMemory") -> None:
        self.pointer = pointer
        self.nbytes = nbytes
        self.pool = pool

    def __del__(self) -> None:
        self.pool.take_back(self.pointer, self.nbytes)


class Event:
    """A point in the work of a stream; freed when it is collected."""

    __slots__ = ("_memory", "handle")

    def __init__(self, memory: "CudaMemory") -> None:
        self._memory = memory
        self.handle = memory.call("cudaEventCreateWithFlags", 0)  # 0: one that keeps the time

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self._memory.call("cudaEventDestroy", self.handle)


class CudaMemory:
    """Memory and the one stream of one device.

    Work on the stream is in order, so a block that is given back may be lent again at once: what
    uses it next comes later on the stream. Blocks of a size are reused last in, first out; a loop
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
        self._free: dict[int, list[int]] = defaultdict(list)
        self._closed = False
        self.call("cudaSetDevice", device)
        self.stream = self.call("cudaStreamCreateWithFlags", cudart.cudaStreamNonBlocking)

    def call(self, name: str, *args: Any) -> Any:
        """Calls a function of the CUDA runtime and unpacks its result.

        Raises:
            CapacityError: out of device memory.
            BackendError: any other failure.
        """
        status, *values = getattr(self.cudart, name)(*args)
        if int(status) != 0:
            if status == self.cudart.cudaError_t.cudaErrorMemoryAllocation:
                raise CapacityError(
                    f"out of GPU memory in {name}; use fewer references, a smaller output, or a "
                    "smaller precision"
                )
            raise BackendError(f"{name} failed: {status.name}")
        return values[0] if len(values) == 1 else values or None

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

    def allocate(self, shape: tuple[int, ...], dtype: str) -> DeviceBuffer:
        """Uninitialised memory for a tensor; empty tensors get a valid address too."""
        wanted = max(1, math.prod(shape) * ITEM_SIZE[dtype])
        nbytes = -(-wanted // _ALIGNMENT) * _ALIGNMENT
        pointer = self._take(nbytes)
        return DeviceBuffer(pointer, shape, dtype, _Block(pointer, nbytes, self))

    def _take(self, nbytes: int) -> int:
        if self._free[nbytes]:
            return self._free[nbytes].pop()
        try:
            return int(self.call("cudaMalloc", nbytes))
        except CapacityError:
            self.trim()
            return int(self.call("cudaMalloc", nbytes))

    def take_back(self, pointer: int, nbytes: int) -> None:
        """Puts a block on the free list."""
        if not self._closed:
            self._free[nbytes].append(pointer)

    def trim(self) -> None:
        """Frees all blocks that nobody uses."""
        self.synchronize()
        for pointers in self._free.values():
            while pointers:
                self.call("cudaFree", pointers.pop())

    def upload(self, array: NDArray[Any]) -> DeviceBuffer:
        """Copies a host array; done with the array on return."""
        names = {dtype: name for name, dtype in NUMPY_DTYPES.items()}
        if array.dtype not in names:
            raise BackendError(f"cannot upload {array.dtype}, expected one of {list(NUMPY_DTYPES)}")
        array = np.ascontiguousarray(array)
        buffer = self.allocate(array.shape, names[array.dtype])
        if array.nbytes:
            self._copy(buffer.pointer, array.ctypes.data, array.nbytes, "HostToDevice")
            self.synchronize()
        return buffer

    def download(self, buffer: DeviceBuffer) -> NDArray[Any]:
        """Waits for the stream and copies a tensor to the host."""
        array = np.empty(buffer.shape, NUMPY_DTYPES[buffer.dtype])
        if array.nbytes:
            self._copy(array.ctypes.data, buffer.pointer, array.nbytes, "DeviceToHost")
        self.synchronize()
        return array

    def _copy(self, target: int, source: int, nbytes: int, kind: str) -> None:
        direction = getattr(self.cudart.cudaMemcpyKind, f"cudaMemcpy{kind}")
        self.call("cudaMemcpyAsync", target, source, nbytes, direction, self.stream)

    def synchronize(self) -> None:
        """Waits for all work on the stream."""
        self.call("cudaStreamSynchronize", self.stream)

    def mark(self) -> Event:
        """Records an event behind all work that is queued now."""
        event = Event(self)
        self.call("cudaEventRecord", event.handle, self.stream)
        return event

    def elapsed(self, start: Event, end: Event) -> float:
        """Seconds of the stream between two events; waits for the second."""
        self.call("cudaEventSynchronize", end.handle)
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
        staging = [int(self.call("cudaHostAlloc", _STAGING_BYTES, 0)) for _ in range(2)]
        events = [self.call("cudaEventCreateWithFlags", 0) for _ in staging]
        turn = 0
        try:
            for ref in sorted(set(refs), key=lambda ref: (ref.path, ref.offset)):
                placed[ref] = self.allocate(ref.shape, ref.dtype)
                source = map_weight(ref).reshape(-1).view(np.uint8)
                for start in range(0, ref.nbytes, _STAGING_BYTES):
                    piece = source[start : start + _STAGING_BYTES]
                    self.call("cudaEventSynchronize", events[turn])
                    ctypes.memmove(staging[turn], piece.ctypes.data, piece.nbytes)
                    target = placed[ref].pointer + start
                    self._copy(target, staging[turn], piece.nbytes, "HostToDevice")
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
        if self._closed:
            return
        self.trim()
        self._closed = True
        self.call("cudaStreamDestroy", self.stream)
