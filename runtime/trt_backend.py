"""Backend "tensorrt": engines of `tensorrt_rtx` or `tensorrt`, driven through cuda-python.

Weights are uploaded once and bound to every engine by address; outputs of one engine are inputs of
the next without a copy. Nothing here synchronises except an upload or a download.

Not run on a GPU by this project's tests: they drive it with stand-ins for CUDA and TensorRT, and
check that every name used exists in the installed bindings.
"""

import contextlib
import logging
import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from klein_kv.engines.engine_record import EngineRecord
from klein_kv.engines.trt_module import BuildLog, load_module, make_logger, module_version
from klein_kv.errors import BackendError, BuildError
from klein_kv.manifest import Manifest, graph_weights
from klein_kv.runtime.backend import Buffer, GraphMemory
from klein_kv.runtime.cuda_memory import (
    CudaMemory,
    DeviceBuffer,
    Event,
    allocated_bytes,
    load_cudart,
)
from klein_kv.runtime.engine_set import EngineFolder, open_engines
from klein_kv.runtime.pinned_store import PinnedStore
from klein_kv.signature import GraphSet
from klein_kv.weights import WeightRef

__all__ = ["TrtBackend"]

_log = logging.getLogger(__name__)


class TrtBackend:
    """Runs the engines of one folder on one GPU.

    Args:
        artifacts: the artifact folder, its manifest checked.
        manifest: that manifest.
        engines: folder of the engines; None takes the only one below `artifacts/engines` whose
            engines hand keys and values on as `graphs` says.
        device: ordinal of the GPU.
        cudart: CUDA runtime bindings; None loads cuda-python.
        trt: TensorRT module; None loads the one that the engines were built with.
        graphs: which graphs of the folder; None takes the manifest's.

    Raises:
        ArtifactError: the engines are not what their manifest says; nothing is deserialised then.
        BuildError: they were built by another TensorRT, or for another GPU.
        BackendError: no GPU, or a library is missing.
    """

    name = "tensorrt"

    def __init__(
        self,
        artifacts: Path,
        manifest: Manifest,
        *,
        engines: Path | None = None,
        device: int = 0,
        cudart: Any = None,
        trt: Any = None,
        graphs: GraphSet | None = None,
    ) -> None:
        graphs = graphs or manifest.graphs
        self._files = graphs.files
        found = open_engines(artifacts, manifest, graphs, engines)
        self._trt = trt or load_module(found.folders[0].manifest.module)
        name, version = self._trt.__name__, module_version(self._trt)
        found.folders[-1].manifest.check_module(name, version)  # before a GPU is asked for
        self._artifacts = artifacts
        self._memory = CudaMemory(cudart or load_cudart(), device)
        self._engines = found.for_device(name, version, self._memory.compute_capability)
        self._said = BuildLog()
        try:
            self._runtime = self._trt.Runtime(make_logger(self._trt, self._said))
        except (RuntimeError, TypeError) as error:
            raise BackendError(f"{name} cannot start: {self._said.reason} ({error})") from error
        self._weights: dict[WeightRef, DeviceBuffer] = {}
        self._loaded: dict[str, _Engine] = {}
        self._host_stores: list[PinnedStore] = []

    def run(self, graph: str, inputs: Mapping[str, Buffer]) -> dict[str, Buffer]:
        shapes = {name: buffer.shape for name, buffer in inputs.items()}
        folder, engine = self._engines.choose(graph, shapes), self._loaded.get(graph)
        if engine is None or engine.folder != folder.path:
            engine = self._load(graph, folder)
        return engine.run(inputs)

    def upload(self, array: NDArray[Any]) -> Buffer:
        return self._memory.upload(array)

    def download(self, buffer: Buffer) -> NDArray[Any]:
        return self._memory.download(buffer)

    def view(self, buffer: Buffer, shape: tuple[int, ...]) -> Buffer:
        view: Buffer = buffer.view(shape)
        return view

    def release(self, graph: str) -> None:
        if graph not in self._loaded:
            return
        self._memory.synchronize()  # it may still be running
        engine = self._loaded.pop(graph)
        engine.save_cache()
        del engine
        self._drop_unbound()
        self._memory.trim()

    def _drop_unbound(self) -> None:
        """Gives up weights that no loaded engine binds."""
        bound = [engine.weight_refs for engine in self._loaded.values()]
        kept = {ref for refs in bound for ref in refs.values()}
        for ref in [ref for ref in self._weights if ref not in kept]:
            del self._weights[ref]

    def host_store(self, budget: int) -> PinnedStore:
        """Pinned host memory for copies of buffers, at most `budget` bytes."""
        store = PinnedStore(self._memory, budget)
        self._host_stores.append(store)
        return store

    def available_memory(self) -> int:
        return self._memory.available

    def graph_memory(self, graph: str) -> GraphMemory:
        loaded = self._loaded.get(graph)
        records = [loaded.record] if loaded is not None else self._engines.records(graph)
        record = max(records, key=lambda x: x.scratch_bytes)
        weights: dict[Hashable, int] = {
            ref: allocated_bytes(ref.nbytes) for ref in record.weight_refs(self._artifacts).values()
        }
        if not weights:  # inside the engine
            held = graph_weights(self._artifacts, self._files[graph])
            weights = {(graph, name): ref.nbytes for name, ref in held.items()}
        return GraphMemory(weights, record.scratch_bytes)

    def mark(self) -> Event:
        return self._memory.mark()

    def elapsed(self, start: Event, end: Event) -> float:
        return self._memory.elapsed(start, end)

    def close(self) -> None:
        """Saves the kernels compiled so far and frees all device memory and pinned memory."""
        for store in self._host_stores:
            store.close()
        for graph in list(self._loaded):
            self.release(graph)
        self._memory.close()

    def _load(self, graph: str, folder: EngineFolder) -> "_Engine":
        """Loads an engine; one of the same graph for other shapes goes, its weights stay bound."""
        record = folder.manifest.record(graph)
        blob = folder.manifest.read_engine(folder.path, graph)
        refs = record.weight_refs(self._artifacts)
        if (other := self._loaded.pop(graph, None)) is not None:
            self._memory.synchronize()  # it may still be running
            other.save_cache()
            del other
        self._weights |= self._memory.upload_weights(
            [ref for ref in refs.values() if ref not in self._weights]
        )
        cache = folder.path / f"{graph}.runtime.cache"
        weights = {name: self._weights[ref] for name, ref in refs.items()}
        # TensorRT takes memory of its own, for embedded weights too: it cannot use what lies idle.
        self._memory.trim()
        try:
            self._said.begin()
            engine = self._runtime.deserialize_cuda_engine(blob)
            if engine is None:
                raise BuildError(
                    f"{self._trt.__name__} refuses {graph} of {folder.path}: {self._said.reason}; "
                    "unless it says that memory is short, build the engines again with "
                    "`klein-kv build`"
                )
            self._loaded[graph] = _Engine(
                self._trt, engine, record, weights, self._memory, cache, self._said
            )
        finally:
            del weights
            if graph not in self._loaded:
                self._drop_unbound()
        self._loaded[graph].weight_refs = refs
        with contextlib.suppress(OSError):  # the folder may be read-only
            folder.mark_used()
        return self._loaded[graph]


class _Engine:
    """One deserialised engine with its execution context; weights stay bound."""

    def __init__(
        self,
        trt: Any,
        engine: Any,
        record: EngineRecord,
        weights: dict[str, DeviceBuffer],
        memory: CudaMemory,
        cache_file: Path,
        said: BuildLog,
    ) -> None:
        self.record = record
        self._said = said
        self.weight_refs: dict[str, WeightRef] = {}
        self._engine = engine
        self._weights = weights
        self._memory = memory
        self._cache_file = cache_file
        self._cache: Any = None
        self._context = self._create_context(trt)
        if self._context is None:
            raise self._refusal("TensorRT gives no execution context")
        self._bind_all(weights)

    def _create_context(self, trt: Any) -> Any:
        """A context with saved kernels, whole-graph capture and specialised kernels, if offered.

        It brings no scratch of its own, which every loaded engine would hold for good: `run` lends
        it some. TensorRT-RTX captures the whole execution as a CUDA graph itself and captures anew
        when shapes or addresses change; in a loop that repeats, `CudaMemory` gives the same
        addresses.
        """
        lent = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(trt, "CudaGraphStrategy"):
            return self._engine.create_execution_context(lent)
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(lent)
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        config.dynamic_shapes_kernel_specialization_strategy = (
            trt.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        self._cache = config.create_runtime_cache()
        if self._cache_file.exists() and not self._cache.deserialize(self._cache_file.read_bytes()):
            _log.info("%s is of another driver; kernels are compiled anew", self._cache_file)
        config.set_runtime_cache(self._cache)
        return self._engine.create_execution_context(config)

    @property
    def folder(self) -> Path:
        """Where the engine lies."""
        return self._cache_file.parent

    def save_cache(self) -> None:
        """Writes compiled kernels beside the engine, aside first."""
        if self._cache is None:
            return
        partial = self._cache_file.with_name(f".{self._cache_file.name}.partial-{os.getpid()}")
        try:
            partial.write_bytes(bytes(self._cache.serialize()))
            partial.replace(self._cache_file)
        except OSError as error:
            partial.unlink(missing_ok=True)
            _log.warning("cannot save %s: %s", self._cache_file, error.strerror)

    def _refusal(self, what: str) -> BackendError:
        """What TensorRT did not do, in its own words."""
        return BackendError(f"{self.record.graph}: {what}: {self._said.reason}")

    def _bind_all(self, buffers: Mapping[str, DeviceBuffer]) -> None:
        for name, buffer in buffers.items():
            if not self._context.set_tensor_address(name, buffer.pointer):
                raise self._refusal(f"TensorRT refuses an address for {name}")

    def run(self, inputs: Mapping[str, DeviceBuffer]) -> dict[str, DeviceBuffer]:
        """Enqueues one execution; outputs are valid in stream order."""
        context, stream = self._context, self._memory.stream
        self._said.begin()
        profile = self.record.profile_for({name: buffer.shape for name, buffer in inputs.items()})
        if profile != context.active_optimization_profile:
            if not context.set_optimization_profile_async(profile, stream):
                raise self._refusal(f"TensorRT refuses profile {profile}")
            self._bind_all(self._weights)
        for name, buffer in inputs.items():
            self._memory.settle(buffer)
            if not context.set_input_shape(name, buffer.shape):
                raise self._refusal(f"TensorRT refuses shape {buffer.shape} for {name}")
        outputs = {
            output.name: self._memory.allocate(
                tuple(context.get_tensor_shape(output.name)), output.dtype
            )
            for output in self.record.outputs
        }
        self._bind_all(inputs)
        self._bind_all(outputs)
        # Given back on return: what takes it next comes later on the stream.
        scratch = self._memory.allocate((self._engine.device_memory_size_v2,), "uint8")
        context.set_device_memory(scratch.pointer, scratch.nbytes)
        if not context.execute_async_v3(stream):
            raise self._refusal("TensorRT could not run the engine")
        return outputs
