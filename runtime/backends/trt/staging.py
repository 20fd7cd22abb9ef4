"""Pinned host memory that everything passes on its way to the device.

Small uploads take the next free bytes and do not wait; all of it is free again once the stream has
been waited for, which every download does. Weights use the same memory: several threads read their
file into pieces of it, and each piece is copied while the next are read.
"""

import ctypes
import itertools
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klein_kv.artifacts.weights import WeightRef
from klein_kv.errors import ArtifactError
from klein_kv.machine import usable_cpus
from klein_kv.runtime.backends.trt.cuda import Cuda, Event, aligned

__all__ = ["Staging"]

_PIECE = 8 << 20  # what one thread reads before it is copied
_MOST_READERS = 8


class Staging:
    """Pinned host memory of one device, on whose stream all copies are put."""

    def __init__(self, cuda: Cuda, device: int, stream: Any, nbytes: int) -> None:
        self._cuda, self._device, self._stream = cuda, device, stream
        self._nbytes = nbytes
        self._used = 0
        self._pointer = int(cuda.call("cudaHostAlloc", nbytes, 0))

    def upload(self, target: int, array: NDArray[Any]) -> None:
        """Copies a host array to a device address; waits only if it finds no room.

        The array may be changed on return.
        """
        source = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        for start, address, nbytes in self._parts(source.nbytes):
            _host_bytes(address, nbytes)[:] = source[start : start + nbytes]
            self._cuda.copy(target + start, address, nbytes, "HostToDevice", self._stream)

    def download(self, source: int, array: NDArray[Any]) -> None:
        """Copies from a device address to a host array; waits for the stream."""
        target = array.reshape(-1).view(np.uint8)
        for start, address, nbytes in self._parts(target.nbytes):
            self._cuda.copy(address, source + start, nbytes, "DeviceToHost", self._stream)
            self.wait()
            target[start : start + nbytes] = _host_bytes(address, nbytes)

    def wait(self) -> None:
        """Waits for the stream: everything is free again."""
        self._cuda.call("cudaStreamSynchronize", self._stream)
        self._used = 0

    def upload_weights(self, targets: Mapping[WeightRef, int]) -> None:
        """Copies weights from their files to device addresses; waits until they are there.

        Raises:
            ArtifactError: a file cannot be read, or is too short.
        """
        self.wait()
        readers = max(2, min(_MOST_READERS, usable_cpus()))
        size = min(_PIECE, self._nbytes // (2 * readers))
        in_order = sorted(targets, key=lambda ref: (ref.path, ref.offset))
        pieces = ((ref, start) for ref in in_order for start in range(0, ref.nbytes, size))
        lock, stopped = threading.Lock(), threading.Event()

        def following() -> tuple[WeightRef, int] | None:
            with lock:
                return None if stopped.is_set() else next(pieces, None)

        def work(reader: int) -> None:
            self._cuda.call("cudaSetDevice", self._device)
            copied: list[Event | None] = [None, None]  # of the last piece in either slot
            try:
                for turn in itertools.count():
                    piece = following()
                    if piece is None:
                        return
                    ref, start = piece
                    if last := copied[turn % 2]:
                        last.synchronize()
                    slot = self._pointer + (2 * reader + turn % 2) * size
                    nbytes = min(size, ref.nbytes - start)
                    _read(ref, start, _host_bytes(slot, nbytes))
                    target = targets[ref] + start
                    self._cuda.copy(target, slot, nbytes, "HostToDevice", self._stream)
                    copied[turn % 2] = Event(self._cuda, self._stream)
            except BaseException:
                stopped.set()
                raise

        try:
            with ThreadPoolExecutor(readers, "klein-kv weights") as pool:
                list(pool.map(work, range(readers)))
        finally:
            self.wait()

    def close(self) -> None:
        """Unpins the memory."""
        self.wait()
        self._cuda.call("cudaFreeHost", self._pointer)

    def _parts(self, total: int) -> Iterator[tuple[int, int, int]]:
        """Start, address and bytes of free memory for each part of so many bytes."""
        for start in range(0, total, self._nbytes):
            nbytes = min(total - start, self._nbytes)
            if self._used + nbytes > self._nbytes:
                self.wait()
            address = self._pointer + self._used
            self._used += aligned(nbytes)
            yield start, address, nbytes


def _host_bytes(address: int, nbytes: int) -> NDArray[np.uint8]:
    """Host memory at an address as an array; nothing is copied."""
    raw = (ctypes.c_ubyte * nbytes).from_address(address)
    return np.frombuffer(memoryview(raw), np.uint8)


def _read(ref: WeightRef, start: int, into: NDArray[np.uint8]) -> None:
    """Reads a weight's bytes from `start` on.

    Raises:
        ArtifactError: the file cannot be read, or ends before.
    """
    end = ref.offset + start + into.nbytes
    try:
        with ref.path.open("rb", buffering=0) as file:
            file.seek(ref.offset + start)
            while (at := file.tell()) < end:
                if not file.readinto(into[into.nbytes - (end - at) :].data):
                    raise ArtifactError(
                        f"{ref.path} ends at byte {at}, expected {end} or more; export again"
                    )
    except OSError as error:
        raise ArtifactError(
            f"{ref.path} cannot be read ({error.strerror}); export again"
        ) from error
