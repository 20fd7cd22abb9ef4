"""Weights of an artifact folder as torch tensors: mapped on a CPU, uploaded piece by piece to a GPU.

Each tensor exists once, whichever graphs use it, and for as long as one of them is loaded. Nothing
is ever whole in host memory besides: on a CPU tensors are pages of the file, which the operating
system may drop and read again; to a GPU they go through two pinned buffers in turn.
"""

import math
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from klein_kv.errors import ArtifactError, BackendError
from klein_kv.weights import WeightRef

__all__ = ["DeviceWeights", "host_tensor", "whole_weights"]

_STAGING_BYTES = 64 << 20
TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "uint8": torch.uint8,
}
"""Types of weights, by the names of `klein_kv.weights`."""


def whole_weights(table: Mapping[str, WeightRef]) -> dict[str, WeightRef]:
    """Joins the row ranges that graphs name apart: `x[0:8]` and `x[8:24]` make `x`.

    Args:
        table: initializers of all graphs of one component, by name.

    Returns:
        Whole tensors by the checkpoint's names.

    Raises:
        ArtifactError: rows are missing, or are not neighbours in the file.
    """
    whole: dict[str, WeightRef] = {}
    parts: dict[str, list[tuple[int, int, WeightRef]]] = {}
    for key, ref in table.items():
        name, _, span = key.partition("[")
        if not span:
            whole[name] = ref
            continue
        first, _, last = span.rstrip("]").partition(":")
        parts.setdefault(name, []).append((int(first), int(last), ref))
    for name, rows in parts.items():
        if name not in whole:
            whole[name] = _join(name, sorted(rows, key=lambda part: part[:2]))
    return whole


def _join(name: str, rows: list[tuple[int, int, WeightRef]]) -> WeightRef:
    start = rows[0][2]
    end, offset = 0, start.offset
    for first, last, ref in rows:
        if first != end or ref.offset != offset or ref.path != start.path:
            raise ArtifactError(
                f"{name}: rows {first} to {last} do not follow row {end} in {ref.path.name}; "
                "export again"
            )
        end, offset = last, offset + ref.nbytes
    shape = (end, *start.shape[1:])
    return WeightRef(start.path, start.offset, offset - start.offset, start.dtype, shape)


def host_tensor(ref: WeightRef, files: dict[Path, torch.Tensor]) -> torch.Tensor:
    """A tensor on pages of its file; nothing is read until it is used.

    Args:
        ref: where it lies.
        files: the files mapped so far, by path; added to.

    Raises:
        ArtifactError: the file cannot be mapped.
    """
    if ref.path not in files:
        try:
            size = ref.path.stat().st_size
            # A private mapping: writing to a tensor would not change the file.
            files[ref.path] = torch.from_file(
                str(ref.path), shared=False, size=size, dtype=torch.uint8
            )
        except (OSError, RuntimeError) as error:
            raise ArtifactError(f"{ref.path} cannot be mapped: {error}; export again") from error
    raw, dtype = files[ref.path][ref.offset : ref.offset + ref.nbytes], TORCH_DTYPES[ref.dtype]
    if ref.offset % dtype.itemsize:  # which a header of odd length makes
        raw = raw.clone()
    return raw.view(dtype).view(ref.shape)


class DeviceWeights:
    """Weights on one device, shared by all graphs that use them.

    Args:
        device: "cpu", or a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._placed: weakref.WeakValueDictionary[WeightRef, torch.Tensor] = (
            weakref.WeakValueDictionary()
        )

    def load(self, refs: Mapping[str, WeightRef]) -> dict[str, torch.Tensor]:
        """Tensors by name. They are freed when every dictionary that holds them is gone.

        Raises:
            ArtifactError: a file cannot be mapped.
            BackendError: a type that torch does not compute with.
        """
        for name, ref in refs.items():
            if ref.dtype not in TORCH_DTYPES:
                raise BackendError(
                    f"{name} is {ref.dtype}, the torch backend computes with "
                    f"{', '.join(TORCH_DTYPES)}; export again with --dtype bf16 or fp32"
                )
        held = {ref: self._placed[ref] for ref in refs.values() if ref in self._placed}
        fresh = self._place(ref for ref in refs.values() if ref not in held)
        self._placed.update(fresh)
        held |= fresh
        return {name: held[ref] for name, ref in refs.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are on the device now."""
        return sum(tensor.nbytes for tensor in self._placed.values())

    def _place(self, refs: Iterable[WeightRef]) -> dict[WeightRef, torch.Tensor]:
        ordered = sorted(set(refs), key=lambda ref: (str(ref.path), ref.offset))
        files: dict[Path, torch.Tensor] = {}
        if self.device.type == "cpu":
            return {ref: host_tensor(ref, files) for ref in ordered}
        staging = _Staging(self.device)
        placed = {ref: staging.copy(host_tensor(ref, files)) for ref in ordered}
        staging.finish()
        return placed


class _Staging:
    """Two pinned buffers: while one is on its way to the GPU the other is filled."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers = [
            torch.empty(_STAGING_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)
        ]
        self._events = [torch.cuda.Event() for _ in self._buffers]
        self._turn = 0

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same tensor on the GPU, once the stream gets there."""
        target = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        if tensor.numel() == 0:
            return target
        source, raw = (x.reshape(-1).view(torch.uint8) for x in (tensor, target))
        for start in range(0, math.prod(source.shape), _STAGING_BYTES):
            piece = source[start : start + _STAGING_BYTES]
            buffer, event = self._buffers[self._turn], self._events[self._turn]
            event.synchronize()  # returns at once before the first record
            buffer[: len(piece)].copy_(piece)
            raw[start : start + len(piece)].copy_(buffer[: len(piece)], non_blocking=True)
            event.record()
            self._turn = 1 - self._turn
        return target

    def finish(self) -> None:
        """Waits for all copies."""
        for event in self._events:
            event.synchronize()
