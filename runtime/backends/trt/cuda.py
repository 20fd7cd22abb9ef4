"""CUDA's bindings, and calls that raise what went wrong."""

from dataclasses import dataclass
from typing import Any

from klein_kv.errors import BackendError, CapacityError

__all__ = ["ALIGNMENT", "Cuda", "aligned", "load_cuda"]

ALIGNMENT = 256
"""Bytes: TensorRT takes no address that is not a multiple of it."""

_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation and CUDA_ERROR_OUT_OF_MEMORY


def aligned(nbytes: int, to: int = ALIGNMENT) -> int:
    """Bytes rounded up to a multiple; at least one multiple."""
    return -(-max(1, nbytes) // to) * to


@dataclass(frozen=True, slots=True)
class Cuda:
    """The two interfaces of CUDA that are used.

    Attributes:
        runtime: `cuda.bindings.runtime`.
        driver: `cuda.bindings.driver`, for what the runtime lacks: virtual memory.
    """

    runtime: Any
    driver: Any

    def call(self, name: str, *args: Any) -> Any:
        """Calls a function of either interface, by its name, and unpacks its result.

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


def load_cuda(extra: str = "rtx") -> Cuda:
    """Imports the bindings.

    Args:
        extra: of this package, that brings them; for the message.

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
