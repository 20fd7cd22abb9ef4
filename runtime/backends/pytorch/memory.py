"""Tensors on a device: arrays up and down, and weights that all graphs share.

Weights are never whole in host memory. On a CPU they are pages of their file, which the operating
system may drop and read again; to a GPU they go through two pinned buffers in turn.
"""

import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from klein_kv.artifacts.weights import NUMPY_DTYPES, WeightRef
from klein_kv.errors import ArtifactError, BackendError
from klein_kv.runtime.planning import memory

__all__ = [
    "TORCH_DTYPES",
    "DeviceWeights",
    "array_from_tensor",
    "find_device",
    "free_bytes",
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

_RAW = {"bfloat16": torch.uint16, "float8_e4m3fn": torch.uint8}
_NAMES = {NUMPY_DTYPES[name]: name for name in TORCH_DTYPES}
_STAGING_BYTES = 64 << 20


def find_device(name: str | None) -> torch.device:
    """The device of that name; None for the first GPU, or the CPU where there is none.

    Raises:
        BackendError: no such device.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device.index or 0
    if index >= count:
        raise BackendError(
            f"device is {name!r}, torch {torch.__version__} sees {count} CUDA GPUs; use device "
            "'cpu', or install a driver and a torch that is built for CUDA"
        )
    return torch.device("cuda", index)


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be taken on a device; what torch keeps to reuse counts."""
    if device.type == "cpu":
        return memory.available_memory()
    free, _total = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free) + int(kept)


def tensor_from_array(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """A tensor with memory of its own; a GPU's is there once its stream gets there.

    Raises:
        BackendError: a type that graphs do not take.
    """
    if array.dtype not in _NAMES:
        raise BackendError(
            f"cannot upload {array.dtype}, expected one of {', '.join(TORCH_DTYPES)}"
        )
    pinned = device.type != "cpu" and 0 < array.nbytes <= _STAGING_BYTES
    name = _NAMES[array.dtype]
    if name in _RAW:  # which neither library knows of the other
        host = torch.empty(array.shape, dtype=_RAW[name], pin_memory=pinned)
        host.numpy()[...] = array.view(f"u{array.itemsize}")
        host = host.view(TORCH_DTYPES[name])
    else:
        host = torch.empty(array.shape, dtype=TORCH_DTYPES[name], pin_memory=pinned)
        host.numpy()[...] = array
    if device.type == "cpu":
        return host
    if array.nbytes > _STAGING_BYTES:
        return _Staging(device).copy(host)
    # torch does not reuse a pinned buffer before the copy from it is done.
    return host.to(device, non_blocking=True)


def array_from_tensor(tensor: torch.Tensor) -> NDArray[Any]:
    """A tensor's content on the host; of one in host memory a view."""
    tensor = tensor.detach().cpu().contiguous()
    for name, raw in _RAW.items():
        if tensor.dtype == TORCH_DTYPES[name]:
            bits: NDArray[Any] = tensor.view(raw).numpy()
            return bits.view(NUMPY_DTYPES[name])
    array: NDArray[Any] = tensor.numpy()
    return array


class DeviceWeights:
    """Weights on one device, each there once, for as long as some graph holds it.

    Args:
        device: where.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._placed: weakref.WeakValueDictionary[WeightRef, torch.Tensor] = (
            weakref.WeakValueDictionary()
        )

    def load(self, refs: Mapping[str, WeightRef]) -> dict[str, torch.Tensor]:
        """Tensors by name; a tensor is freed when no dictionary holds it any more.

        Raises:
            ArtifactError: a file cannot be mapped.
            BackendError: a type that torch does not compute with.
        """
        for name, ref in refs.items():
            if ref.dtype not in TORCH_DTYPES or ref.dtype == "float8_e4m3fn":  # K/V alone are
                raise BackendError(
                    f"{name} is {ref.dtype}, with which the torch backend does not compute; export "
                    "with --dtype bf16 (GPU) or fp32 (CPU)"
                )
        held = {ref: self._placed[ref] for ref in refs.values() if ref in self._placed}
        fresh = self._place(ref for ref in refs.values() if ref not in held)
        self._placed.update(fresh)
        held |= fresh
        return {name: held[ref] for name, ref in refs.items()}

    def _place(self, refs: Iterable[WeightRef]) -> dict[WeightRef, torch.Tensor]:
        ordered = sorted(set(refs), key=lambda ref: (str(ref.path), ref.offset))
        files: dict[Path, torch.Tensor] = {}
        if self.device.type == "cpu":
            return {ref: _mapped(ref, files) for ref in ordered}
        staging = _Staging(self.device)
        return {ref: staging.copy(_mapped(ref, files)) for ref in ordered}


def _mapped(ref: WeightRef, files: dict[Path, torch.Tensor]) -> torch.Tensor:
    """A tensor on pages of its file; nothing is read until it is used.

    Args:
        ref: where it lies.
        files: the files mapped so far, by path; added to.
    """
    if ref.path not in files:
        try:
            size = ref.path.stat().st_size
            # Not shared: what is written to a tensor stays in memory.
            files[ref.path] = torch.from_file(
                str(ref.path), shared=False, size=size, dtype=torch.uint8
            )
        except (OSError, RuntimeError) as error:
            raise ArtifactError(f"{ref.path} cannot be mapped: {error}; export again") from error
    raw, dtype = files[ref.path][ref.offset : ref.offset + ref.nbytes], TORCH_DTYPES[ref.dtype]
    if ref.offset % dtype.itemsize:  # after a header of odd length
        raw = raw.clone()
    return raw.view(dtype).view(ref.shape)


class _Staging:
    """Two pinned buffers: while one is on its way to the GPU the other is filled."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers = [
            torch.empty(_STAGING_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)
        ]
        self._events = [
            torch.cuda.Event()  # type: ignore[no-untyped-call]
            for _ in self._buffers
        ]
        self._turn = 0

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same tensor on the GPU, once the stream gets there."""
        target = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        if not tensor.numel():
            return target
        source, raw = (x.reshape(-1).view(torch.uint8) for x in (tensor, target))
        for start in range(0, source.numel(), _STAGING_BYTES):
            piece = source[start : start + _STAGING_BYTES]
            buffer, event = self._buffers[self._turn], self._events[self._turn]
            event.synchronize()  # returns at once before the first record
            buffer[: len(piece)].copy_(piece)
            raw[start : start + len(piece)].copy_(buffer[: len(piece)], non_blocking=True)
            event.record(torch.cuda.current_stream(self.device))
            self._turn = 1 - self._turn
        return target
