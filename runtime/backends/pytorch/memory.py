"""Tensors on a device: from arrays and back, and from files.

Weights are never whole in host memory. On a CPU they are pages of their file, which the operating
system may drop and read again; to a GPU they go through two pinned buffers in turn.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from klein_kv.artifacts.weights import NUMPY_DTYPES, WeightRef
from klein_kv.errors import ArtifactError, BackendError

__all__ = [
    "TORCH_DTYPES",
    "Staging",
    "array_from_tensor",
    "find_device",
    "map_tensor",
    "tensor_from_array",
]

TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "float8_e4m3fn": torch.float8_e4m3fn,
}
"""Types that graphs take and give, by the project's names."""

_TORCH_FROM_NUMPY = {NUMPY_DTYPES[name]: dtype for name, dtype in TORCH_DTYPES.items()}
_NUMPY_FROM_TORCH = {dtype: NUMPY_DTYPES[name] for name, dtype in TORCH_DTYPES.items()}
_STAGING_BYTES = 64 << 20


def find_device(name: str | None) -> torch.device:
    """The device of that name; None for the first GPU, or the CPU where there is none.

    Raises:
        BackendError: no such device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device(name or ("cuda" if count else "cpu"))
    if device.type == "cpu":
        return torch.device("cpu")
    index = device.index or 0
    if index >= count:
        raise BackendError(
            f"device is {name!r}, torch {torch.__version__} sees {count} CUDA GPUs; use device "
            "'cpu', or install a driver and a torch that is built for CUDA"
        )
    return torch.device("cuda", index)


def tensor_from_array(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """A tensor with memory of its own; a GPU's is there once its stream gets there.

    Raises:
        BackendError: a type that graphs do not take.
    """
    dtype = _TORCH_FROM_NUMPY.get(array.dtype)
    if dtype is None:
        raise BackendError(
            f"cannot upload {array.dtype}, expected one of {', '.join(TORCH_DTYPES)}"
        )
    small = 0 < array.nbytes <= _STAGING_BYTES
    raw = torch.empty(array.nbytes, dtype=torch.uint8, pin_memory=small and device.type == "cuda")
    raw.numpy()[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    host = raw.view(dtype).view(array.shape)
    if device.type == "cuda" and not small:
        return Staging(device).copy(host)
    # torch does not reuse a pinned buffer before the copy from it is done.
    return host.to(device, non_blocking=True)


def array_from_tensor(tensor: torch.Tensor) -> NDArray[Any]:
    """A tensor's content on the host; of one in host memory a view."""
    host = tensor.detach().cpu().contiguous()
    raw: NDArray[Any] = host.view(-1).view(torch.uint8).numpy()
    return raw.view(_NUMPY_FROM_TORCH[host.dtype]).reshape(host.shape)


def map_tensor(ref: WeightRef) -> torch.Tensor:
    """A tensor on pages of its file; nothing is read until it is used."""
    dtype = TORCH_DTYPES.get(ref.dtype)
    if dtype is None:
        raise ArtifactError(
            f"{ref.path} holds {ref.dtype}, expected one of {', '.join(TORCH_DTYPES)}; export again"
        )
    try:
        # Copy on write: what is written to a tensor stays in memory.
        mapped = np.memmap(ref.path, np.uint8, "c", ref.offset, (ref.nbytes,))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{ref.path} cannot be mapped: {error}; export again") from error
    raw = torch.from_numpy(mapped)
    if ref.offset % dtype.itemsize:  # after a header of odd length
        raw = raw.clone()
    return raw.view(dtype).view(ref.shape)


class Staging:
    """Two pinned buffers: while one is on its way to the GPU the other is filled."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers = torch.empty(2, _STAGING_BYTES, dtype=torch.uint8, pin_memory=True)
        self._turn = 0

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same tensor on the GPU, once the stream gets there."""
        target = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        if not tensor.numel():  # its bytes cannot always be viewed
            return target
        source, raw = (x.reshape(-1).view(torch.uint8) for x in (tensor, target))
        for start in range(0, source.numel(), _STAGING_BYTES):
            piece = source[start : start + _STAGING_BYTES]
            buffer = self._buffers[self._turn, : len(piece)]
            buffer.copy_(piece)
            torch.cuda.current_stream(self.device).synchronize()  # the other one is free again
            raw[start : start + len(piece)].copy_(buffer, non_blocking=True)
            self._turn = 1 - self._turn
        return target
