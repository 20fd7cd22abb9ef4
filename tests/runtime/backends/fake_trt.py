"""A stand-in for TensorRT-RTX, as strict as it is, whose engines compute on host memory.

An engine file is JSON: a graph's name and its profiles. The engine is that graph of an artifact
folder, run by ONNX Runtime on whatever lies at the addresses that the executor bound. So the
executor's own work (allocation, uploads, bindings, shapes, what is handed on without a copy) is
executed for real, and a wrong address gives wrong numbers.

Each context keeps one captured graph, renewed when a shape or an address changes, as TensorRT-RTX
does; captures and replays are counted. Kernels are compiled per engine and shape, counted, and kept
in runtime caches.
"""

import contextlib
import ctypes
import enum
import functools
import json
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from klein_kv.artifacts.config import ITEM_SIZE
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.signature import GraphSet, Signature
from klein_kv.artifacts.weights import NUMPY_DTYPES, graph_weights
from klein_kv.runtime.backends.trt.cuda import ALIGNMENT
from tests.runtime.backends.fake_cuda import FakeCuda

SCRATCH = 20_000
"""Bytes that every engine needs while it runs, unless a test says otherwise."""

Shape = tuple[int, ...]

_BITS = {
    NUMPY_DTYPES["float8_e4m3fn"]: (np.uint8, onnx.TensorProto.FLOAT8E4M3FN),
    NUMPY_DTYPES["bfloat16"]: (np.uint16, onnx.TensorProto.BFLOAT16),
}


def array_at(address: int, shape: Shape, dtype: str) -> np.ndarray:
    """The tensor at an address, without a copy."""
    count = int(np.prod(shape, dtype=np.int64))
    raw = (ctypes.c_ubyte * (count * ITEM_SIZE[dtype])).from_address(address)
    return np.frombuffer(raw, NUMPY_DTYPES[dtype]).reshape(shape)


def ort_value(array: np.ndarray) -> Any:
    """The same memory as ONNX Runtime takes it."""
    if array.dtype not in _BITS:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)
    bits, element = _BITS[array.dtype]
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(bits), element)


def engine_blob(graph: str, profiles: Sequence[Mapping[str, Any]]) -> bytes:
    """What an engine file holds: for each profile the (min, opt, max) shapes of its inputs."""
    return json.dumps({"graph": graph, "profiles": list(profiles)}).encode()


class FakeContext:
    """`IExecutionContext` of one graph."""

    def __init__(self, engine: "FakeEngine", eager: bool, captures: bool, cache: Any) -> None:
        self.engine = engine
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, Shape] = {}
        self.scratch = 0, 0
        # Only the first context of an engine has a profile from the start.
        self.active_optimization_profile = -1 if engine.contexts else 0
        self._eager, self._captures, self._cache = eager, captures, cache
        self._captured: Any = None

    @property
    def trt(self) -> "FakeTrt":
        return self.engine.trt

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        if self.trt.refuses("set_optimization_profile_async"):
            return False
        if not 0 <= index < self.engine.num_optimization_profiles:
            return self.trt.error(f"there is no profile {index}")
        self.active_optimization_profile = index
        self.shapes.clear()
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        if memory % ALIGNMENT:
            raise AssertionError(f"device memory must be aligned to {ALIGNMENT} bytes")
        self.scratch = memory, size

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        if self.trt.refuses("set_tensor_address"):
            return False
        if name not in self.engine.names:
            return self.trt.error(f"there is no tensor {name}")
        if pointer % ALIGNMENT or not pointer:
            return self.trt.error(f"the address of {name} is not aligned to {ALIGNMENT} bytes")
        self.addresses[name] = pointer
        return True

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        if self.trt.refuses("set_input_shape"):
            return False
        if self.active_optimization_profile < 0:
            return self.trt.error("no optimization profile is set")
        limits = self.engine.profiles[self.active_optimization_profile].get(name)
        if limits is not None:
            low, _, high = limits
            fits = len(low) == len(shape) and all(
                a <= b <= c for a, b, c in zip(low, shape, high, strict=True)
            )
            if not fits:
                return self.trt.error(f"{name} {shape} is outside of the profile: {low} to {high}")
        self.shapes[name] = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        return [spec.name for spec in self.engine.signature.inputs if spec.name not in self.shapes]

    def get_tensor_shape(self, name: str) -> Shape:
        spec = self.engine.signature.output(name)
        if self.infer_shapes():
            return tuple(axis if isinstance(axis, int) else -1 for axis in spec.shape)
        return self.engine.signature.output_shapes(self.shapes, self.engine.unit)[name]

    def update_device_memory_size_for_shapes(self) -> int:
        if self.infer_shapes():
            raise AssertionError("scratch was asked for before all shapes are set")
        return self.trt.scratch(self.engine.graph, self.shapes)

    def is_stream_capturable(self, stream: int) -> bool:
        return self.trt.capturable

    def execute_async_v3(self, stream: int) -> bool:
        started = time.perf_counter()
        engine, trt = self.engine, self.trt
        if trt.refuses("execute_async_v3"):
            return False
        missing = [name for name in engine.names if name not in self.addresses]
        if missing or self.infer_shapes():
            raise AssertionError(f"no address or shape for {(missing or self.infer_shapes())[:3]}")
        if self.scratch[1] < self.update_device_memory_size_for_shapes():
            raise AssertionError("too little device memory for the shape")
        if trt.cuda.device != engine.device:
            raise AssertionError(f"run on device {trt.cuda.device}, loaded on {engine.device}")
        key = engine.graph, tuple(self.shapes[s.name] for s in engine.signature.inputs)
        compiled = self._compile(key)
        here = key, tuple(sorted(self.addresses.items())), self.scratch
        if self._captures and compiled:
            if self._captured == here:
                trt.replays[key] += 1
            else:
                trt.captures[key] += 1
                self._captured = here
        addresses, shapes, scratch = dict(self.addresses), dict(self.shapes), self.scratch
        uses = self._uses()
        for address, nbytes in uses:
            trt.cuda.check_device_memory(address, nbytes, engine.device)
        trt.runs.append(engine.graph)
        trt.cuda.own_seconds += time.perf_counter() - started
        if trt.cuda.backed:
            work = lambda: engine.execute(addresses, shapes, scratch)  # noqa: E731
            trt.cuda.enqueue(stream, work, uses)
        return True

    def _compile(self, key: Any) -> bool:
        """Has kernels for a shape: at once, or meanwhile, when it runs the next time."""
        text = repr(key)
        if text in self._cache.kernels:
            return True
        self.trt.compilations += 1
        self._cache.kernels.append(text)
        return self._eager

    def _uses(self) -> list[tuple[int, int]]:
        specs = {spec.name: spec.dtype for spec in self.engine.signature.inputs}
        shapes = dict(self.shapes)
        for spec in self.engine.signature.outputs:
            specs[spec.name], shapes[spec.name] = spec.dtype, self.get_tensor_shape(spec.name)
        uses = [
            (self.addresses[name], int(np.prod(shapes[name], dtype=np.int64)) * ITEM_SIZE[dtype])
            for name, dtype in specs.items()
        ]
        uses += [(self.addresses[name], ref.nbytes) for name, ref in self.engine.weights.items()]
        return [*uses, (self.scratch[0], self.update_device_memory_size_for_shapes())]


class FakeEngine:
    """`ICudaEngine` made from a graph; shared weights are inputs, as in a real one."""

    def __init__(self, trt: "FakeTrt", graph: str, profiles: list[dict[str, Any]]) -> None:
        self.trt = trt
        self.graph = graph
        self.profiles = profiles
        self.signature: Signature = trt.graphs.signature(graph, trt.manifest.config)
        self.unit = trt.manifest.config.vae.multiple_of
        self.device = trt.cuda.device
        weights = graph_weights(trt.artifacts, trt.graphs.file(graph))
        shared = trt.shared.get(graph, not graph.startswith("vae"))
        self.weights = weights if shared else {}
        self.names = [spec.name for spec in (*self.signature.inputs, *self.signature.outputs)]
        self.names += self.weights
        self.contexts: list[Any] = []  # weak: whoever made a context keeps it
        self._session: Any = None
        self._held = 0
        if not shared:
            status, self._held = trt.cuda.cudaMalloc(sum(ref.nbytes for ref in weights.values()))
            if status:
                raise AssertionError("an engine that does not fit was deserialised")

    def __del__(self) -> None:
        if self._held and self._held in self.trt.cuda.blocks:
            self.trt.cuda.cudaFree(self._held)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def create_runtime_config(self) -> "FakeConfig":
        return FakeConfig(self.trt)

    def create_execution_context(self, config: "FakeConfig") -> FakeContext | None:
        if self.trt.refuses("create_execution_context"):
            return None
        if config.strategy != FakeTrt.ExecutionContextAllocationStrategy.USER_MANAGED:
            raise AssertionError("a context with scratch of its own")
        kinds = FakeTrt.DynamicShapesKernelSpecializationStrategy
        context = FakeContext(
            self,
            config.dynamic_shapes_kernel_specialization_strategy == kinds.EAGER,
            config.cuda_graph_strategy == FakeTrt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE,
            config.cache,
        )
        self.contexts.append(weakref.proxy(context))
        return context

    def execute(self, addresses, shapes, scratch):
        if self._session is None:
            self._session = self._load(addresses)
        # Scratch that overlaps anything in use would give wrong numbers.
        ctypes.memset(scratch[0], 0xA5, self.trt.scratch(self.graph, shapes))
        binding = self._session.io_binding()
        for spec in self.signature.inputs:
            array = array_at(addresses[spec.name], shapes[spec.name], spec.dtype)
            binding.bind_ortvalue_input(spec.name, ort_value(array))
        made = self.signature.output_shapes(shapes, self.unit)
        for spec in self.signature.outputs:
            array = array_at(addresses[spec.name], made[spec.name], spec.dtype)
            binding.bind_ortvalue_output(spec.name, ort_value(array))
        self._session.run_with_iobinding(binding)
        self.trt.tamper(self.graph, addresses, shapes | made)

    def _load(self, addresses: dict[str, int]) -> Any:
        path = str(self.trt.artifacts / self.trt.graphs.file(self.graph))
        if not self.weights:
            return _session_of_file(path)
        options = _session_options()
        # Most engines run a few times: optimizing them takes longer than all their runs.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._values = {
            name: ort_value(array_at(addresses[name], ref.shape, ref.dtype))
            for name, ref in self.weights.items()
        }
        for name, value in self._values.items():
            options.add_initializer(name, value)
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _session_options() -> Any:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.intra_op_num_threads = 1
    options.enable_mem_reuse = False  # planning it is most of the time that loading takes
    return options


@functools.cache
def _session_of_file(path: str) -> Any:
    """A graph with weights of its own; the engines of all tests share it."""
    return onnxruntime.InferenceSession(
        path, _session_options(), providers=["CPUExecutionProvider"]
    )


class FakeCache:
    """`IRuntimeCache`: names of compiled kernels."""

    def __init__(self) -> None:
        self.kernels: list[str] = []

    def deserialize(self, blob: bytes) -> bool:
        with contextlib.suppress(ValueError):
            self.kernels = json.loads(bytes(blob).decode())
            return True
        return False

    def serialize(self) -> bytes:
        return json.dumps(self.kernels).encode()


class FakeConfig:
    """`IRuntimeConfig`."""

    def __init__(self, trt: "FakeTrt") -> None:
        self.strategy: Any = FakeTrt.ExecutionContextAllocationStrategy.STATIC
        self.cuda_graph_strategy: Any = FakeTrt.CudaGraphStrategy.DISABLED
        kinds = FakeTrt.DynamicShapesKernelSpecializationStrategy
        self.dynamic_shapes_kernel_specialization_strategy: Any = kinds.LAZY
        self.cache = FakeCache()

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> FakeCache:
        return FakeCache()

    def set_runtime_cache(self, cache: FakeCache) -> bool:
        self.cache = cache
        return True


_Severity = enum.IntEnum("_Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE", start=0)


class FakeTrt:
    """A TensorRT module.

    Args:
        artifacts: the folder of the graphs.
        cuda: whose device memory the engines run on.
        shared: graphs whose weights are inputs or not; else all but the VAE's.
        graphs: which graphs of the folder.
        scratch: bytes that a graph needs at shapes of its inputs.
        tamper: called after every execution with graph, addresses and shapes, to plant faults.
    """

    __name__ = "fake_trt"
    __version__ = "0.0.1"

    ExecutionContextAllocationStrategy = enum.Enum("Allocation", "STATIC USER_MANAGED")
    CudaGraphStrategy = enum.Enum("Graphs", "DISABLED WHOLE_GRAPH_CAPTURE")
    DynamicShapesKernelSpecializationStrategy = enum.Enum("Specialization", "LAZY EAGER NONE")
    ErrorCodeTRT = enum.Enum("ErrorCode", "UNSPECIFIED_ERROR")

    class IErrorRecorder:
        def __init__(self) -> None:
            pass

    class Logger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = _Severity

        def __init__(self, min_severity: _Severity = _Severity.WARNING) -> None:
            self.min_severity = min_severity

    def __init__(
        self,
        artifacts: Path,
        cuda: FakeCuda,
        shared: Mapping[str, bool] | None = None,
        graphs: GraphSet | None = None,
        scratch: Callable[[str, Mapping[str, Shape]], int] | None = None,
        tamper: Callable[..., None] = lambda *_: None,
    ) -> None:
        self.artifacts = artifacts
        self.cuda = cuda
        self.shared = shared or {}
        self.manifest = Manifest.load(artifacts, check_files=False)
        self.graphs = graphs or self.manifest.graphs
        self.scratch = scratch or (lambda _graph, _shapes: SCRATCH)
        self.tamper = tamper
        self.engines: Any = weakref.WeakValueDictionary()  # by graph
        self.loads: list[str] = []  # graphs in the order they were deserialised in
        self.runs: list[str] = []  # and run in
        self.captures: Counter[Any] = Counter()  # CUDA graphs, by (graph, shapes of its inputs)
        self.replays: Counter[Any] = Counter()
        self.compilations = 0  # of kernels; none for what a runtime cache held
        self.capturable = True
        self.refused: dict[str, list[str]] = {}  # calls, and what TensorRT says then
        self.recorder: Any = None

    def Runtime(self, logger: Any) -> "FakeRuntime":  # noqa: N802 - TensorRT's name
        return FakeRuntime(self, logger)

    def refuses(self, call: str) -> bool:
        for words in self.refused.get(call, ()):
            self.error(words)
        return call in self.refused

    def error(self, words: str) -> bool:
        """Tells an error as TensorRT does; what the call then returns."""
        self.recorder.report_error(self.ErrorCodeTRT.UNSPECIFIED_ERROR, words)
        return False

    @contextlib.contextmanager
    def counting(self) -> Iterator[dict[str, int]]:
        """What happens in the block."""

        def now() -> dict[str, int]:
            return {
                "captures": self.captures.total(),
                "replays": self.replays.total(),
                "compilations": self.compilations,
                "loads": len(self.loads),
            }

        before, counts = now(), {}
        yield counts
        counts.update({name: value - before[name] for name, value in now().items()})


class FakeRuntime:
    """`Runtime`."""

    def __init__(self, trt: FakeTrt, logger: Any) -> None:
        if not isinstance(logger, FakeTrt.Logger) or logger.min_severity > _Severity.WARNING:
            raise AssertionError("a logger that is called for every message")
        self.trt = trt
        self.engine_host_code_allowed = False

    @property
    def error_recorder(self) -> Any:
        return self.trt.recorder

    @error_recorder.setter
    def error_recorder(self, recorder: Any) -> None:
        self.trt.recorder = recorder

    def deserialize_cuda_engine(self, blob: bytes) -> FakeEngine | None:
        if self.engine_host_code_allowed:
            raise AssertionError("host code from engine files must stay off")
        if self.trt.refuses("deserialize_cuda_engine"):
            return None
        value = json.loads(bytes(blob).decode())
        profiles = [
            {name: tuple(map(tuple, limits)) for name, limits in profile.items()}
            for profile in value["profiles"]
        ]
        self.trt.loads.append(value["graph"])
        engine = FakeEngine(self.trt, value["graph"], profiles)
        self.trt.engines[value["graph"]] = engine
        return engine
