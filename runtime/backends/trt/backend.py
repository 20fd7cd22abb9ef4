"""Backend "tensorrt": engines of `tensorrt_rtx` or `tensorrt`, driven through cuda-python.

Weights are uploaded once and bound to every engine by address; outputs of one engine are inputs of
the next without leaving the device. Nothing waits for the device but a download, the loading of an
engine, and a change of the reference set.

Nothing in this folder was run on a GPU by this project's tests: they drive it with stand-ins for
CUDA and TensorRT, and check that every name used exists in the installed bindings.
"""

import contextlib
import functools
import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from klein_kv.artifacts.engines.engine_set import EngineFolder, open_engines
from klein_kv.artifacts.engines.trt_module import load_module, module_version
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.quantized_weights import BLOCK_SCALES
from klein_kv.artifacts.signature import GraphSet, TensorSpec
from klein_kv.artifacts.weights import WeightRef, graph_weights, split_part
from klein_kv.errors import BackendError, BuildError
from klein_kv.runtime.backends.backend import (
    Buffer,
    DeviceContent,
    GraphMemory,
    WeightChanges,
    keep_changes,
)
from klein_kv.runtime.backends.trt.cuda import Cuda, Event, aligned, load_cuda
from klein_kv.runtime.backends.trt.engine import (
    Engine,
    ShapeKey,
    key_inputs,
    make_recorder,
    reason,
)
from klein_kv.runtime.backends.trt.memory import DTYPE_NAMES, CudaMemory, DeviceBuffer
from klein_kv.runtime.backends.trt.pinned import PinnedStore
from klein_kv.runtime.backends.trt.virtual import (
    KvBlock,
    KvMemory,
    Scratch,
    VirtualMemory,
    place_kv,
)

__all__ = ["TrtBackend"]

_MOST_ENGINES = 4
"""Of one graph, for different shapes, that stay loaded: code alone where weights are shared."""

_LARGE = 1 << 30
"""Bytes of weights in an engine, from which on no two of a graph stay loaded."""

_Loaded = dict[str, OrderedDict[Path, Engine]]  # by graph and folder, least recently used first


class TrtBackend:
    """Runs the engines of one artifact folder, whose manifest has been checked, on one GPU.

    What is still open when the program ends is closed then, and its kernels are kept. Without a
    folder of engines it takes those below `artifacts/engines` that were built from the graphs for
    this GPU and this TensorRT; what else is None comes from the manifest or is imported.

    Raises:
        ArtifactError: the engines are not what their manifest says; nothing is deserialised then.
        BuildError: they were built by another TensorRT, or for another GPU.
        BackendError: no GPU, or a library is missing.
        CapacityError: not enough memory to open it.
    """

    name = "tensorrt"

    def __init__(
        self,
        artifacts: Path,
        manifest: Manifest,
        *,
        engines: Path | None = None,
        device: int = 0,
        cuda: Cuda | None = None,
        trt: Any = None,
        graphs: GraphSet | None = None,
    ) -> None:
        self._artifacts = artifacts
        self._config = manifest.config
        self._graphs = graphs or manifest.graphs
        built = open_engines(artifacts, manifest, self._graphs, engines)
        self._trt = trt or load_module(built.module)
        # Before a GPU is asked for.
        built = built.for_module(self._trt.__name__, module_version(self._trt))
        self._errors: list[str] = []
        self._loaded: _Loaded = {}
        self._chosen: dict[tuple[str, ShapeKey], Engine] = {}  # of loaded ones
        self._table = functools.cache(functools.partial(graph_weights, artifacts))  # by file
        self._weights: weakref.WeakValueDictionary[WeightRef, DeviceBuffer] = (
            weakref.WeakValueDictionary()  # of loaded ones, which hold them
        )
        self._changes: dict[str, Callable[[], Any]] = {}
        self._key_inputs = {
            graph: key_inputs(self._graphs.signature(graph, self._config))
            for graph in manifest.held_graphs(self._graphs)
        }
        self._memory = CudaMemory(cuda or load_cuda(), device)
        try:
            with self._memory:
                self._engines = built.for_sm(self._memory.compute_capability)
                virtual = VirtualMemory(self._memory)
                self._kv = KvMemory(self._memory, virtual)
                self._scratch = Scratch(self._memory, virtual)
                self._runtime = self._start()
        except BaseException:
            self._memory.close()
            raise
        # Neither of these holds the backend itself, which is closed when it is collected.
        self._memory.reclaim.append(functools.partial(_drop_old_shapes, self._loaded, self._memory))
        self._closers = [self._kv.close, self._scratch.close, self._memory.close]
        self._close = weakref.finalize(
            self, _close, self._memory, self._loaded, self._chosen, self._closers
        )

    def _start(self) -> Any:
        trt = self._trt
        try:
            # A logger in C++: one in Python would be called for each message.
            runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        except (RuntimeError, TypeError) as error:
            raise BackendError(
                f"{trt.__name__} cannot start ({error}); its own words are on standard error"
            ) from error
        runtime.error_recorder = make_recorder(trt, self._errors)
        return runtime

    def prepare(
        self,
        graph: str,
        shapes: Mapping[str, tuple[int, ...]],
        kv: Mapping[str, Buffer] | None = None,
        *,
        eager: bool = False,
    ) -> None:
        with self._memory:
            engine = self._find_engine(graph, shapes)
            engine.running = True
            try:
                engine.prepare(shapes, eager=eager)
            finally:
                engine.running = False
            if kv:
                self._kv.hold(next(iter(kv.values())).block)

    def run(self, graph: str, inputs: Mapping[str, Buffer]) -> dict[str, Buffer]:
        with self._memory:
            key = tuple([inputs[name].shape for name in self._key_inputs[graph]])
            engine = self._chosen.get((graph, key))  # without a search if it ran such before
            if engine is None:
                engine = self._find_engine(graph, {name: x.shape for name, x in inputs.items()})
                self._chosen[graph, key] = engine
            engine.running = True
            try:
                return engine.run(inputs, key)
            finally:
                engine.running = False

    def upload(self, array: NDArray[Any]) -> Buffer:
        with self._memory:
            return self._memory.upload(array)

    def upload_weight(self, ref: WeightRef) -> Buffer:
        with self._memory:
            buffer = self._memory.allocate(ref.shape, ref.dtype)
            self._memory.staging.upload_weights({ref: buffer.pointer})
            return buffer

    def upload_kv(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Buffer]:
        places, nbytes = place_kv(
            TensorSpec(name, DTYPE_NAMES[x.dtype], x.shape) for name, x in arrays.items()
        )
        with self._memory:
            block = self._kv.take(nbytes)
            self._kv.settle(block)  # another stream may still copy what was there before
            for name, array in arrays.items():
                self._memory.staging.upload(block.pointer + places[name].start, array)
            return dict(block.buffers(places))

    def download(self, buffer: Buffer) -> NDArray[Any]:
        with self._memory:
            if isinstance(buffer.block, KvBlock):
                self._kv.settle(buffer.block)
            return self._memory.download(buffer)

    def view(self, buffer: Buffer, shape: tuple[int, ...], start: int = 0) -> Buffer:
        return buffer.view(shape, start)

    def assemble(self, shape: tuple[int, ...], parts: Iterable[Buffer]) -> Buffer:
        with self._memory:
            return self._memory.assemble(shape, parts)

    def release(self, graph: str) -> None:
        engines = self._loaded.pop(graph, None)
        self._chosen.clear()
        if not engines:
            return
        with self._memory:
            self._memory.synchronize()  # they may still be running
            while engines:
                engines.popitem()[1].kernels.save()
            self._scratch.shrink()
            self._memory.trim()

    def host_store(self, budget: int) -> PinnedStore:
        """Pinned host memory for copies of keys and values, at most `budget` bytes."""
        with self._memory:
            store = PinnedStore(self._memory, self._kv, budget)
        self._closers.insert(0, store.close)
        return store

    def replace_weights(self, changes: WeightChanges) -> None:
        # At the same addresses: engines, contexts and captured graphs stay as they are.
        names: dict[WeightRef, str] = {}
        for graph, file in self._graphs.files.items():
            refs = self._table(file)
            touched = {ref: name for name, ref in refs.items() if split_part(name)[0] in changes}
            built = [folder.manifest.engines.get(graph) for folder in self._engines.folders]
            if touched and any(record is not None and not record.weights for record in built):
                raise BackendError(
                    f"the engine of {graph} has its weights inside, where adapters cannot reach "
                    "them; build the engines with weights as inputs, which is the default"
                )
            names |= touched
        with self._memory:
            keep_changes(self._changes, changes)
            self._write_weights(names, self._weights)

    def _write_weights(
        self, names: Mapping[WeightRef, str], buffers: Mapping[WeightRef, DeviceBuffer]
    ) -> None:
        """Gives these weights, where they have a buffer, the content that they should have now."""
        own: dict[WeightRef, int] = {}
        changed: dict[str, list[tuple[int, str, slice]]] = {}  # by tensor, what is made together
        for ref, name in names.items():
            tensor, rows = split_part(name)
            pointer = buffers[ref].pointer if ref in buffers else None
            if pointer is not None and tensor in self._changes:
                whole = tensor.removesuffix(BLOCK_SCALES)
                changed.setdefault(whole, []).append((pointer, tensor, rows))
            elif pointer is not None:
                own[ref] = pointer
        if own:
            self._memory.staging.upload_weights(own)

        on_device = [x for x in changed if isinstance(self._changes[x], DeviceContent)]
        for tensor in on_device:
            places = changed.pop(tensor)
            for rows, content in self._changes[tensor]():
                for pointer, _, place in places:
                    self._write(pointer, place, rows, content)
        if on_device:
            self._memory.trim()  # of what passed

        def make(whole: str) -> list[tuple[int, NDArray[Any]]]:
            return [(at, self._changes[name]()[rows]) for at, name, rows in changed[whole]]

        tensors, at_once = list(changed), os.cpu_count() or 1
        with ThreadPoolExecutor(at_once, "klein-kv weights") as pool:
            for start in range(0, len(tensors), at_once):
                for parts in pool.map(make, tensors[start : start + at_once]):
                    for pointer, array in parts:
                        self._memory.staging.upload(pointer, array)

    def _write(
        self, pointer: int, place: slice, rows: slice, content: NDArray[Any] | DeviceBuffer
    ) -> None:
        """Writes `rows` of a tensor to where its rows `place` lie, as far as they are the same."""
        first, at = rows.start or 0, place.start or 0
        last = first + content.shape[0]
        start, stop = max(first, at), last if place.stop is None else min(last, place.stop)
        if start >= stop:
            return
        row = content.nbytes // content.shape[0]
        target = pointer + (start - at) * row
        if isinstance(content, DeviceBuffer):
            source = content.pointer + (start - first) * row
            self._memory.copy(target, source, (stop - start) * row)
        else:
            self._memory.staging.upload(target, content[start - first : stop - first])

    def available_memory(self) -> int:
        with self._memory as memory:
            loaded = [engine for engines in self._loaded.values() for engine in engines.values()]
            buffers = sum(engine.buffer_bytes for engine in loaded)
            return memory.free + memory.idle + self._kv.idle + self._scratch.nbytes + buffers

    def graph_memory(self, graph: str) -> GraphMemory:
        refs = self._engines.records(graph)[0].weight_refs(self._artifacts).values()
        weights: dict[Hashable, int] = {ref: aligned(ref.nbytes) for ref in refs}
        if not weights:  # inside the engine
            held = self._table(self._graphs.file(graph))
            weights = {(graph, name): ref.nbytes for name, ref in held.items()}
        return GraphMemory(weights, fixed_buffers=True)

    def scratch_bytes(self, graph: str, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        folder = self._engines.choose(graph, shapes)
        engine = self._loaded.get(graph, OrderedDict()).get(folder.path)
        exact = None if engine is None else engine.scratch_bytes(shapes)
        return folder.manifest.record(graph).scratch_for(shapes) if exact is None else exact

    def mark(self) -> Event:
        with self._memory:
            return Event(self._memory.cuda, self._memory.stream, timed=True)

    def elapsed(self, start: Event, end: Event) -> float:
        end.synchronize()
        milliseconds = self._memory.call("cudaEventElapsedTime", start.handle, end.handle)
        return float(milliseconds) / 1e3

    def close(self) -> None:
        """Saves the kernels compiled so far and frees all device memory and pinned memory."""
        self._close()

    def _find_engine(self, graph: str, shapes: Mapping[str, tuple[int, ...]]) -> Engine:
        """The engine for a shape, loaded if need be."""
        folder = self._engines.choose(graph, shapes)
        loaded = self._loaded.setdefault(graph, OrderedDict())
        engine = loaded.get(folder.path)
        if engine is None:
            most = _MOST_ENGINES if self._embedded_bytes(graph, folder) < _LARGE else 1
            while len(loaded) >= most:
                self._memory.synchronize()  # it may still be running
                self._chosen.clear()
                loaded.popitem(last=False)[1].kernels.save()
            engine = loaded[folder.path] = self._load(graph, folder)
        loaded.move_to_end(folder.path)
        return engine

    def _load(self, graph: str, folder: EngineFolder) -> Engine:
        record = folder.manifest.record(graph)
        blob = folder.manifest.read_engine(folder.path, graph)
        weights = self._upload_weights(record.weight_refs(self._artifacts))
        # TensorRT takes memory of its own: it cannot use what is idle here.
        self._memory.make_free(len(blob) + self._embedded_bytes(graph, folder))
        self._errors.clear()
        engine = self._runtime.deserialize_cuda_engine(blob)
        if engine is None:
            raise BuildError(
                f"{self._trt.__name__} refuses {graph} of {folder.path}: {reason(self._errors)}; "
                "unless it says that memory is short, build the engines again with "
                "`klein-kv build`"
            )
        loaded = Engine(
            self._trt,
            engine,
            record,
            self._graphs.signature(graph, self._config),
            self._config.vae.multiple_of,
            weights,
            self._memory,
            self._scratch,
            self._kv,
            folder.path / f"{graph}.runtime.cache",
            self._errors,
        )
        with contextlib.suppress(OSError):  # the folder may be read-only
            folder.mark_used()
        return loaded

    def _embedded_bytes(self, graph: str, folder: EngineFolder) -> int:
        """Bytes of the weights that lie in an engine itself."""
        if folder.manifest.record(graph).weights:
            return 0
        held = self._table(self._graphs.file(graph))
        return sum(ref.nbytes for ref in held.values())

    def _upload_weights(self, refs: Mapping[str, WeightRef]) -> dict[str, DeviceBuffer]:
        """Weights on the device; those that are not there yet go into one piece of memory."""
        placed = {ref: held for ref in refs.values() if (held := self._weights.get(ref))}
        missing = set(refs.values()) - placed.keys()
        if missing:
            slab = self._memory.allocate((sum(aligned(ref.nbytes) for ref in missing),), "uint8")
            fresh, pointer = {}, slab.pointer
            for ref in sorted(missing, key=lambda ref: (ref.path, ref.offset)):
                fresh[ref] = DeviceBuffer(pointer, ref.shape, ref.dtype, slab.block)
                pointer += aligned(ref.nbytes)
            self._write_weights({ref: name for name, ref in refs.items() if ref in fresh}, fresh)
            self._weights.update(fresh)
            placed |= fresh
        return {name: placed[ref] for name, ref in refs.items()}


def _drop_old_shapes(loaded: _Loaded, memory: CudaMemory) -> None:
    """Frees all fixed buffers but those of the run that needs the memory."""
    for engines in loaded.values():
        for engine in engines.values():
            engine.drop_shapes(keep=int(engine.running))
    memory.trim()


def _close(
    memory: CudaMemory,
    loaded: _Loaded,
    chosen: dict[tuple[str, ShapeKey], Engine],
    closers: list[Callable[[], None]],
) -> None:
    with memory:
        memory.synchronize()
        for engines in loaded.values():
            for engine in engines.values():
                engine.kernels.save()
        loaded.clear()
        chosen.clear()
        for close in closers:
            close()
