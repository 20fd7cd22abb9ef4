"""Backend "onnxruntime": the graphs on a CPU.

Weights are mapped from the safetensors files once and handed to every session by address, so the
three transformer graphs share one copy, which the operating system may drop and read again.
Prepacking is off for that reason; with it each session would make its own copy and be no faster
(measured with onnxruntime 1.31 at 1,536 rows: 1.08 s against 1.03 to 1.18 s).
"""

import functools
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klein_kv.errors import ArtifactError, BackendError
from klein_kv.manifest import Manifest, graph_weights
from klein_kv.runtime.backend import Buffer
from klein_kv.signature import GraphSet
from klein_kv.weights import WeightRef, map_weight

__all__ = ["OrtBackend"]

_log = logging.getLogger(__name__)
_STORAGE = {np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.int64), np.dtype(np.uint8)}


@functools.cache
def _share_arena(onnxruntime: Any) -> None:
    """One arena for all sessions of the process: what a finished graph leaves, the next one uses.

    Measured on an edit with four 512x512 references: 1.45 GB at the peak against 1.92 GB.
    """
    info = onnxruntime.OrtMemoryInfo(
        "Cpu",
        onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR,
        0,
        onnxruntime.OrtMemType.DEFAULT,
    )
    onnxruntime.create_and_register_allocator(info, None)


class OrtBackend:
    """Runs an artifact folder with ONNX Runtime's CPU provider.

    Args:
        artifacts: the folder, its manifest checked.
        manifest: the manifest.
        threads: threads per operator; None lets ONNX Runtime choose (one per physical core).
        graphs: which graphs of the folder; None takes the manifest's.

    Raises:
        BackendError: onnxruntime is not installed, or the artifacts are bfloat16.
    """

    name = "onnxruntime"

    def __init__(
        self,
        artifacts: Path,
        manifest: Manifest,
        threads: int | None = None,
        graphs: GraphSet | None = None,
    ) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise BackendError(
                "backend onnxruntime is not installed; install it with pip install 'klein-kv[cpu]'"
            ) from error
        if manifest.dtype == "bfloat16":
            raise BackendError(
                f"{artifacts} is bfloat16, which ONNX Runtime does not compute on a CPU; export "
                "the checkpoint again with --dtype fp32"
            )
        whole = isinstance(threads, int) and not isinstance(threads, bool)
        if threads is not None and (not whole or threads < 1):
            raise BackendError(f"threads is {threads!r}, expected a whole number of 1 or more")
        self._ort = onnxruntime
        _share_arena(onnxruntime)
        self._artifacts = artifacts
        self._graphs = graphs or manifest.graphs
        self._config = manifest.config
        self._threads = threads
        self._sessions: dict[str, Any] = {}
        self._weights: dict[WeightRef, Any] = {}

    def run(self, graph: str, inputs: Mapping[str, Buffer]) -> dict[str, Buffer]:
        session = self._sessions.get(graph) or self._load(graph)
        binding = session.io_binding()
        for name, buffer in inputs.items():
            binding.bind_ortvalue_input(name, buffer)
        names = [output.name for output in session.get_outputs()]
        for name in names:
            binding.bind_output(name, "cpu")
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            raise BackendError(f"{graph} failed in ONNX Runtime: {error}") from error
        return dict(zip(names, binding.get_outputs(), strict=True))

    def upload(self, array: NDArray[Any]) -> Buffer:
        if array.dtype not in _STORAGE:
            raise BackendError(f"cannot upload {array.dtype}, expected one of {_STORAGE}")
        # Memory of its own: `OrtValue.numpy()` keeps that alive as long as any view of it, but not
        # an array that was lent to `ortvalue_from_numpy` (onnxruntime 1.31).
        buffer = self._ort.OrtValue.ortvalue_from_shape_and_type(
            array.shape, array.dtype.type, "cpu"
        )
        buffer.update_inplace(np.ascontiguousarray(array))
        return buffer

    def download(self, buffer: Buffer) -> NDArray[Any]:
        array: NDArray[Any] = buffer.numpy()
        return array

    def view(self, buffer: Buffer, shape: tuple[int, ...]) -> Buffer:
        return self.upload(self.download(buffer).reshape(shape))

    def release(self, graph: str) -> None:
        self._sessions.pop(graph, None)

    def _load(self, graph: str) -> Any:
        options = self._ort.SessionOptions()
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        for name, ref in graph_weights(self._artifacts, self._graphs.files[graph]).items():
            if ref not in self._weights:
                self._weights[ref] = self._ort.OrtValue.ortvalue_from_numpy(map_weight(ref))
            options.add_initializer(name, self._weights[ref])
        path = self._artifacts / self._graphs.files[graph]
        try:
            session = self._ort.InferenceSession(
                os.fspath(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise ArtifactError(
                f"{path} cannot be loaded by ONNX Runtime: {error}; export again"
            ) from error
        self._check(graph, session)
        self._sessions[graph] = session
        _log.info("loaded %s", path)
        return session

    def _check(self, graph: str, session: Any) -> None:
        signature = self._graphs.signature(graph, self._config)
        expected = [spec.name for spec in (*signature.inputs, *signature.outputs)]
        found = [value.name for value in (*session.get_inputs(), *session.get_outputs())]
        if sorted(found) != sorted(expected):
            raise ArtifactError(
                f"{self._graphs.files[graph]}: tensors are {sorted(found)[:4]}..., expected "
                f"{sorted(expected)[:4]}...; it was not exported by this version, export again"
            )
