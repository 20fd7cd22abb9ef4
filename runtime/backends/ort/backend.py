"""Backend "onnxruntime": the graphs on a CPU, or on a CUDA GPU ("onnxruntime-cuda").

Weights are given to every session by address, so the transformer graphs share one copy. On a CPU
they are mapped from the safetensors files, and the operating system may drop them and read them
again. Prepacking is off for that reason; with it each session would make its own copy and be no
faster (measured with onnxruntime 1.31 at 1,536 rows: 1.08 s against 1.03 to 1.18 s). On a GPU they
are uploaded once.
"""

import functools
import importlib
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.signature import GraphSet
from klein_kv.artifacts.weights import (
    NUMPY_DTYPES,
    WeightRef,
    graph_weights,
    map_weight,
    split_part,
)
from klein_kv.errors import ArtifactError, BackendError
from klein_kv.runtime.backends.backend import Buffer, GraphMemory, WeightChanges, keep_changes
from klein_kv.runtime.backends.ort.device import (
    CPU,
    OrtDevice,
    check_assignment,
    free_memory,
    give_back_memory,
    open_device,
    open_session,
)
from klein_kv.runtime.backends.trt.cuda import Cuda, aligned
from klein_kv.runtime.planning import memory

__all__ = ["OrtBackend"]

_log = logging.getLogger(__name__)
_SESSION_OPTIONS = {
    "disable_prepacking": "1",
    "intra_op.allow_spinning": "0",
    "record_ep_graph_assignment_info": "1",
}

_ELEMENTS = {
    NUMPY_DTYPES["float32"]: 1,
    NUMPY_DTYPES["uint8"]: 2,
    NUMPY_DTYPES["int64"]: 7,
    NUMPY_DTYPES["float16"]: 10,
    NUMPY_DTYPES["bfloat16"]: 16,
    NUMPY_DTYPES["float8_e4m3fn"]: 17,
}
"""ONNX's numbers of types."""

_DTYPES = {number: dtype for dtype, number in _ELEMENTS.items()}
_BITS = {NUMPY_DTYPES["bfloat16"]: np.uint16, NUMPY_DTYPES["float8_e4m3fn"]: np.uint8}
"""What ONNX Runtime takes for types that numpy has not of its own."""


class _View(NamedTuple):
    """Part of a buffer, from element `start` on, under another shape."""

    buffer: Any
    shape: tuple[int, ...]
    start: int


class OrtBackend:
    """Runs an artifact folder, whose manifest has been checked, with ONNX Runtime.

    Every run returns when its work is done. Buffers are `OrtValue`s, and go to other libraries of
    the same device without a copy through DLPack. Threads are those of an operator: None lets ONNX
    Runtime choose, one per physical core. Libraries that are None are imported.

    Raises:
        BackendError: onnxruntime is not installed, has no provider for the device, or the device
            does not compute the artifacts' type.
    """

    def __init__(
        self,
        artifacts: Path,
        manifest: Manifest,
        threads: int | None = None,
        graphs: GraphSet | None = None,
        device: OrtDevice = CPU,
        onnxruntime: Any = None,
        cuda: Cuda | None = None,
    ) -> None:
        self._ort = onnxruntime or _import_onnxruntime(device)
        if manifest.dtype not in device.dtypes:
            raise BackendError(
                f"{artifacts} is {manifest.dtype}, which ONNX Runtime does not compute on a "
                f"{device.kind.upper()}; export the checkpoint again with --dtype fp32"
            )
        self.name = device.backend
        self._device = device
        self._cuda = cuda
        open_device(self._ort, device)
        self._artifacts = artifacts
        self._graphs = graphs or manifest.graphs
        self._files = manifest.held_graphs(self._graphs)
        self._table = functools.cache(functools.partial(graph_weights, artifacts))  # by file
        self._config = manifest.config
        self._threads = threads
        self._sessions: dict[str, Any] = {}
        self._weights: weakref.WeakValueDictionary[WeightRef, Any] = weakref.WeakValueDictionary()
        self._bound: dict[str, list[Any]] = {}  # by graph, the weights that its session reads
        self._changes: dict[str, Callable[[], Any]] = {}
        self._loading = threading.Lock()

    def prepare(
        self,
        graph: str,
        shapes: Mapping[str, tuple[int, ...]],
        kv: Mapping[str, Buffer] | None = None,
        *,
        eager: bool = False,
    ) -> None:
        self._session(graph)

    def run(self, graph: str, inputs: Mapping[str, Buffer]) -> dict[str, Buffer]:
        session, device = self._session(graph), self._device
        binding = session.io_binding()
        for name, buffer in inputs.items():
            if not isinstance(buffer, _View):
                binding.bind_ortvalue_input(name, buffer)
                continue
            element = buffer.buffer.element_type()
            pointer = buffer.buffer.data_ptr() + buffer.start * _DTYPES[element].itemsize
            binding.bind_input(name, device.kind, device.index, element, buffer.shape, pointer)
        names = [output.name for output in session.get_outputs()]
        for name in names:
            binding.bind_output(name, device.kind, device.index)
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            raise BackendError(f"{graph} failed in ONNX Runtime: {error}") from error
        return dict(zip(names, binding.get_outputs(), strict=True))

    def upload(self, array: NDArray[Any]) -> Buffer:
        element = _ELEMENTS.get(array.dtype)
        if element is None:
            expected = ", ".join(dtype.name for dtype in _ELEMENTS)
            raise BackendError(f"cannot upload {array.dtype}, expected one of {expected}")
        # Memory of its own: `OrtValue.numpy()` keeps that alive as long as any view of it, but not
        # an array that was lent to `ortvalue_from_numpy` (onnxruntime 1.31).
        buffer = self._ort.OrtValue.ortvalue_from_shape_and_type(
            array.shape, element, self._device.kind, self._device.index
        )
        buffer.update_inplace(_bits(np.ascontiguousarray(array)))
        return buffer

    def download(self, buffer: Buffer) -> NDArray[Any]:
        if isinstance(buffer, _View):
            whole = self.download(buffer.buffer).reshape(-1)
            return whole[buffer.start :][: math.prod(buffer.shape)].reshape(buffer.shape)
        dtype = _DTYPES[buffer.element_type()]
        if dtype == NUMPY_DTYPES["bfloat16"]:  # `OrtValue.numpy()` does not know it
            bits = np.empty(buffer.shape(), np.uint16)
            make = self._ort.OrtValue.ortvalue_from_numpy_with_onnx_type
            make(bits, _ELEMENTS[dtype]).update_inplace(buffer)
            return bits.view(dtype)
        array: NDArray[Any] = buffer.numpy()
        return array.view(dtype)  # float8 comes as bytes

    def upload_kv(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Buffer]:
        return {name: self.upload(array) for name, array in arrays.items()}

    def view(self, buffer: Buffer, shape: tuple[int, ...], start: int = 0) -> Buffer:
        whole = buffer if isinstance(buffer, _View) else _View(buffer, buffer.shape(), 0)
        held = math.prod(whole.shape)
        if start < 0 or start + math.prod(shape) > held:
            raise BackendError(f"cannot view {held} elements from {start} as {shape}")
        return _View(whole.buffer, shape, whole.start + start)

    def assemble(self, shape: tuple[int, ...], parts: Iterable[Buffer]) -> Buffer:
        # ONNX Runtime copies whole tensors alone: on a GPU they pass through the host.
        flat = np.concatenate([self.download(part).reshape(-1) for part in parts])
        return self.upload(flat.reshape(shape))

    def release(self, graph: str) -> None:
        before = len(self._weights)
        self._sessions.pop(graph, None)
        self._bound.pop(graph, None)
        if len(self._weights) < before and not self._device.is_host:
            give_back_memory(self._ort, self._device)

    def replace_weights(self, changes: WeightChanges) -> None:
        # A session may have folded a weight into others when it was made: it is made anew, on the
        # memory of the weights that stay.
        with self._loading:
            keep_changes(self._changes, changes)
            affected = set()
            for graph in self._files:  # of one that failed to load, weights may be there still
                for name, ref in self._table(self._files[graph]).items():
                    if split_part(name)[0] in changes:
                        self._weights.pop(ref, None)
                        affected.add(graph)
            affected &= self._sessions.keys()
            stay = list(self._weights.values())
            for graph in affected:
                del self._sessions[graph], self._bound[graph]
            for graph in sorted(affected):
                self._load(graph)
            del stay

    def available_memory(self) -> int:
        if self._device.is_host:
            return memory.available_memory()
        give_back_memory(self._ort, self._device)  # else what is kept to reuse would not count
        return free_memory(self._device, self._cuda)

    def graph_memory(self, graph: str) -> GraphMemory:
        if graph not in self._files:
            raise ArtifactError(
                f"there is no graph {graph!r}, expected one of {', '.join(self._files)}"
            )
        weights: dict[Hashable, int] = {}
        if not self._device.is_host:  # there they are mapped files
            refs = self._table(self._files[graph]).values()
            weights = {ref: aligned(ref.nbytes) for ref in refs}
        return GraphMemory(weights, keeps_scratch=self._device.is_host)

    def scratch_bytes(self, graph: str, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        return None

    def mark(self) -> float:
        return time.perf_counter()  # runs have returned when their work is done

    def elapsed(self, start: Any, end: Any) -> float:
        return float(end - start)

    def close(self) -> None:
        for graph in list(self._sessions):
            self.release(graph)

    def _session(self, graph: str) -> Any:
        # A weight that a second thread placed anew would free what the first one's session reads.
        with self._loading:
            return self._sessions.get(graph) or self._load(graph)

    def _load(self, graph: str) -> Any:
        device, file = self._device, self._files[graph]
        options = self._ort.SessionOptions()
        for key, value in _SESSION_OPTIONS.items():
            options.add_session_config_entry(f"session.{key}", value)
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        bound = []
        for name, ref in self._table(file).items():
            weight = self._weights.get(ref) or self._place(name, ref)
            self._weights[ref] = weight
            bound.append(weight)
            options.add_initializer(name, weight)
        path = self._artifacts / file
        try:
            session = open_session(self._ort, device, os.fspath(path), options)
        except Exception as error:
            raise ArtifactError(
                f"{path} cannot be loaded by ONNX Runtime: {error}; export again"
            ) from error
        check_assignment(session, device, file)
        self._check(graph, session)
        self._sessions[graph], self._bound[graph] = session, bound
        _log.info("loaded %s", path)
        return session

    def _place(self, name: str, ref: WeightRef) -> Any:
        """A weight where the device reads it, as an `OrtValue` that sessions accept."""
        tensor, rows = split_part(name)
        change = self._changes.get(tensor)
        array = map_weight(ref) if change is None else np.ascontiguousarray(change()[rows])
        if not self._device.is_host:
            # Sessions take no memory that ONNX Runtime owns; through DLPack it is somebody's.
            return self._ort.OrtValue.from_dlpack(self.upload(array))
        make = self._ort.OrtValue.ortvalue_from_numpy_with_onnx_type
        return make(_bits(array), _ELEMENTS[array.dtype])

    def _check(self, graph: str, session: Any) -> None:
        signature = self._graphs.signature(graph, self._config)
        expected = [spec.name for spec in (*signature.inputs, *signature.outputs)]
        names = [value.name for value in (*session.get_inputs(), *session.get_outputs())]
        if sorted(names) != sorted(expected):
            raise ArtifactError(
                f"{self._files[graph]}: tensors are {sorted(names)[:4]}..., expected "
                f"{sorted(expected)[:4]}...; it was not exported by this version, export again"
            )


def _bits(array: NDArray[Any]) -> NDArray[Any]:
    return array.view(_BITS.get(array.dtype, array.dtype))


def _import_onnxruntime(device: OrtDevice) -> Any:
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise BackendError(
            "backend onnxruntime is not installed; install it with pip install "
            f"'klein-kv[{device.kind}]'"
        ) from error
