"""Pinned host memory that everything passes on its way to the device.

Small uploads take the next free bytes and do not wait; all of it is free again once the stream has
been waited for, which every download does. Weights use the same memory: several threads read their
file into pieces of it, and each piece is copied while the next are read.
"""

import ctypes
import itertools
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from klein_kv.artifacts.weights import WeightRef
from klein_kv.errors import ArtifactError
from klein_kv.runtime.backends.trt.cuda import Cuda, aligned

__all__ = ["Staging", "host_bytes"]

_PIECE = 8 << 20  # what one thread reads before it is copied
_MOST_READERS = 8
_NO_TIMING = 2  # cudaEventDisableTiming


class _Copy(NamedTuple):
    """Bytes `start` to `start + nbytes` of a piece, and the device address that they belong at."""

    start: int
    nbytes: int
    target: int


@dataclass(slots=True)
class _Piece:
    """Consecutive bytes of a file, and where they go."""

    path: Path
    offset: int
    nbytes: int
    copies: list[_Copy]


class Staging:
    """Pinned host memory of one device.

    Args:
        cuda: the bindings.
        device: ordinal of the GPU.
        stream: that all copies are put on.
        nbytes: how much is pinned, for good.

    Raises:
        CapacityError: the system pins no more.
    """

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
        for start in range(0, source.nbytes, self._nbytes):
            part = source[start : start + self._nbytes]
            if self._used + part.nbytes > self._nbytes:
                self._wait()
            address = self._pointer + self._used
            host_bytes(address, part.nbytes)[:] = part
            self._copy(target + start, address, part.nbytes, "HostToDevice")
            self._used += aligned(part.nbytes)

    def download(self, source: int, array: NDArray[Any]) -> None:
        """Copies from a device address to a host array; waits for the stream."""
        target = array.reshape(-1).view(np.uint8)
        for start in range(0, target.nbytes, self._nbytes):
            part = target[start : start + self._nbytes]
            if self._used + part.nbytes > self._nbytes:
                self._wait()
            address = self._pointer + self._used
            self._copy(address, source + start, part.nbytes, "DeviceToHost")
            self._wait()
            part[:] = host_bytes(address, part.nbytes)

    def drained(self) -> None:
        """The stream was waited for: everything is free again."""
        self._used = 0

    def upload_weights(self, targets: Mapping[WeightRef, int]) -> None:
        """Copies weights from their files to device addresses; waits until they are there.

        Args:
            targets: byte ranges of files, and where each goes.

        Raises:
            ArtifactError: a file cannot be read, or is too short.
        """
        self._wait()
        readers = max(2, min(_MOST_READERS, len(os.sched_getaffinity(0))))
        size = min(_PIECE, self._nbytes // (2 * readers))
        pieces = iter(_pieces(targets, size))
        lock, stopped = threading.Lock(), threading.Event()

        def following() -> _Piece | None:
            with lock:
                return None if stopped.is_set() else next(pieces, None)

        def work(reader: int) -> None:
            slots = [self._pointer + (2 * reader + i) * size for i in range(2)]
            self._cuda.call("cudaSetDevice", self._device)
            try:
                with _Files() as files, _Events(self._cuda, 2) as events:
                    for turn in itertools.count():
                        piece = following()
                        if piece is None:
                            return
                        slot, event = slots[turn % 2], events[turn % 2]
                        if turn >= 2:
                            self._cuda.call("cudaEventSynchronize", event)
                        files.read(piece, host_bytes(slot, piece.nbytes))
                        for copy in piece.copies:
                            start = slot + copy.start
                            self._copy(copy.target, start, copy.nbytes, "HostToDevice")
                        self._cuda.call("cudaEventRecord", event, self._stream)
            except BaseException:
                stopped.set()
                raise

        with ThreadPoolExecutor(readers, "klein-kv weights") as pool:
            for done in [pool.submit(work, reader) for reader in range(readers)]:
                done.result()
        self._wait()

    def close(self) -> None:
        """Unpins the memory."""
        self._cuda.call("cudaStreamSynchronize", self._stream)
        self._cuda.call("cudaFreeHost", self._pointer)

    def _wait(self) -> None:
        self._cuda.call("cudaStreamSynchronize", self._stream)
        self._used = 0

    def _copy(self, target: int, source: int, nbytes: int, kind: str) -> None:
        direction = getattr(self._cuda.runtime.cudaMemcpyKind, f"cudaMemcpy{kind}")
        self._cuda.call("cudaMemcpyAsync", target, source, nbytes, direction, self._stream)


def host_bytes(address: int, nbytes: int) -> NDArray[np.uint8]:
    """Host memory at an address as an array; nothing is copied."""
    raw = (ctypes.c_ubyte * nbytes).from_address(address)
    return np.frombuffer(memoryview(raw), np.uint8)


def _pieces(targets: Mapping[WeightRef, int], size: int) -> Iterator[_Piece]:
    """Cuts byte ranges into pieces of at most `size` bytes that lie together in a file."""
    piece: _Piece | None = None
    for ref in sorted(targets, key=lambda ref: (ref.path, ref.offset)):
        done = 0
        while done < ref.nbytes:
            offset = ref.offset + done
            follows = (
                piece is not None
                and piece.path == ref.path
                and piece.offset + piece.nbytes == offset
                and piece.nbytes < size
            )
            if piece is None or not follows:
                if piece is not None:
                    yield piece
                piece = _Piece(ref.path, offset, 0, [])
            nbytes = min(ref.nbytes - done, size - piece.nbytes)
            piece.copies.append(_Copy(piece.nbytes, nbytes, targets[ref] + done))
            piece.nbytes += nbytes
            done += nbytes
    if piece is not None:
        yield piece


class _Files:
    """Files that one thread reads, each opened once."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def read(self, piece: _Piece, into: NDArray[np.uint8]) -> None:
        """Reads a piece.

        Raises:
            ArtifactError: the file cannot be read, or ends before.
        """
        try:
            if piece.path not in self._open:
                self._open[piece.path] = os.open(piece.path, os.O_RDONLY)
            done = 0
            while done < piece.nbytes:
                got = os.preadv(self._open[piece.path], [into[done:].data], piece.offset + done)
                if got == 0:
                    raise ArtifactError(
                        f"{piece.path} ends at byte {piece.offset + done}, expected "
                        f"{piece.offset + piece.nbytes} or more; export again"
                    )
                done += got
        except OSError as error:
            raise ArtifactError(
                f"{piece.path} cannot be read ({error.strerror}); export again"
            ) from error


class _Events:
    """Events of one thread."""

    def __init__(self, cuda: Cuda, count: int) -> None:
        self._cuda = cuda
        self._handles = [cuda.call("cudaEventCreateWithFlags", _NO_TIMING) for _ in range(count)]

    def __enter__(self) -> Sequence[Any]:
        return self._handles

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            self._cuda.call("cudaEventSynchronize", handle)
            self._cuda.call("cudaEventDestroy", handle)
