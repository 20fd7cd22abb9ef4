"""CUDA's bindings, and calls that raise what went wrong."""

import contextlib
from dataclasses import dataclass
from typing import Any

from klein_kv.errors import BackendError, CapacityError

__all__ = ["ALIGNMENT", "Cuda", "Event", "aligned", "load_cuda"]

ALIGNMENT = 256
"""Bytes: TensorRT takes no address that is not a multiple of it."""

_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation and CUDA_ERROR_OUT_OF_MEMORY
_TIMING, _NO_TIMING = 0, 2  # cudaEventDefault, cudaEventDisableTiming


def aligned(nbytes: int, to: int = ALIGNMENT) -> int:
    """Bytes rounded up to a multiple; at least one multiple."""
    return -(-max(1, nbytes) // to) * to


@dataclass(frozen=True, slots=True)
class Cuda:
    """`cuda.bindings.runtime`, and `driver` for what it lacks: virtual memory."""

    runtime: Any
    driver: Any

    def call(self, name: str, *args: Any) -> Any:
        """Calls a function of either, by its name, and unpacks its result.

        Raises:
            CapacityError: out of device memory.
            BackendError: any other failure.
        """
        library = self.runtime if name.startswith("cuda") else self.driver
        status, *values = getattr(library, name)(*args)
        if int(status) != 0:
            if int(status) == _OUT_OF_MEMORY:
                raise CapacityError(
                    f"out of GPU memory in {name}; use fewer references, a smaller output, or a "
                    "smaller precision"
                )
            raise BackendError(f"{name} failed: {status.name}")
        return values[0] if len(values) == 1 else values or None

    def copy(self, target: int, source: int, nbytes: int, kind: str, stream: Any) -> None:
        """Enqueues a copy; the kind is "HostToDevice", "DeviceToHost" or "DeviceToDevice"."""
        direction = getattr(self.runtime.cudaMemcpyKind, f"cudaMemcpy{kind}")
        self.call("cudaMemcpyAsync", target, source, nbytes, direction, stream)


class Event:
    """A point on a stream, recorded now, that another stream or the host can wait for."""

    __slots__ = ("_cuda", "handle")

    def __init__(self, cuda: Cuda, stream: Any, *, timed: bool = False) -> None:
        self._cuda = cuda
        self.handle = cuda.call("cudaEventCreateWithFlags", _TIMING if timed else _NO_TIMING)
        cuda.call("cudaEventRecord", self.handle, stream)

    def before(self, stream: Any) -> None:
        """Puts what a stream is given from now on behind it."""
        self._cuda.call("cudaStreamWaitEvent", stream, self.handle, 0)

    def synchronize(self) -> None:
        """Lets the host wait."""
        self._cuda.call("cudaEventSynchronize", self.handle)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # it was not created, or CUDA has ended
            self._cuda.call("cudaEventDestroy", self.handle)


def load_cuda(extra: str = "rtx") -> Cuda:
    """Imports the bindings, which an extra of this package brings.

    Raises:
        BackendError: cuda-python is not installed, or there is no usable GPU.
    """
    try:
        from cuda.bindings import driver, runtime
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
    return Cuda(runtime, driver)
