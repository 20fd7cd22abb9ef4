# ruff: noqa: N802, N815 - the names are CUDA's
"""Stand-ins for the CUDA runtime and TensorRT that compute on the host.

Device memory is host memory, taken and freed by address; an engine is a graph of an artifact folder
that ONNX Runtime runs on whatever lies at the addresses that the executor bound. So the executor's
own work (allocation, uploads, bindings, shapes, what is handed on without a copy) is executed for
real, and a wrong address gives wrong numbers.
"""

import ctypes
import enum
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime

from klein_kv.config import ITEM_SIZE
from klein_kv.manifest import Manifest, graph_weights
from klein_kv.signature import GraphSet
from klein_kv.weights import NUMPY_DTYPES

ALIGNMENT = 256  # of what cudaMalloc gives
SCRATCH = 20_000  # bytes that every engine needs while it runs
_FIRST_STREAM = 7


class CudaError(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2


class FakeCudart:
    """`cuda.bindings.runtime` on host memory, with as much "device memory" as it is told.

    Streams that lag do nothing until somebody waits for them, and then no more than is waited for;
    the others do everything at once. So work that is not put in order comes out wrong in one way or
    the other.

    Args:
        capacity: bytes of the device.
        lagging: streams that lag, counted from 0 in the order of their creation.

    Attributes:
        blocks: live allocations, address -> memory.
        copies: (kind, bytes) of every copy.
        waits: how often the host waited for a stream or an event.
    """

    cudaError_t = CudaError
    cudaStreamNonBlocking = 1
    cudaDeviceAttr = SimpleNamespace(
        cudaDevAttrComputeCapabilityMajor=75, cudaDevAttrComputeCapabilityMinor=76
    )
    cudaMemcpyKind = SimpleNamespace(
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
    )

    def __init__(self, capacity: int = 1 << 34, lagging: Collection[int] = ()) -> None:
        self.capacity = capacity
        self.device = 0
        self.lagging = {_FIRST_STREAM + i for i in lagging}
        self.queues: dict[int, deque[Callable[[], None]]] = {}
        self.done: dict[int, int] = {}
        self.recorded: dict[int, tuple[int, int]] = {}
        self.blocks: dict[int, Any] = {}
        self.pinned: dict[int, Any] = {}
        self.copies: list[tuple[int, int]] = []
        self.streams = 0
        self.events = 0
        self.waits = 0
        self.times: dict[int, float] = {}
        self._last_event = 0

    @property
    def used(self) -> int:
        return sum(len(block) for block in self.blocks.values())

    def cudaDeviceGetAttribute(self, attribute: int, device: int) -> tuple[CudaError, int]:
        return CudaError.cudaSuccess, {75: 12, 76: 0}[attribute]

    def cudaGetDevice(self) -> tuple[CudaError, int]:
        return CudaError.cudaSuccess, self.device

    def cudaSetDevice(self, device: int) -> tuple[CudaError]:
        self.device = device
        return (CudaError.cudaSuccess,)

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        self.queues[stream].append(work)
        if stream not in self.lagging:
            self.catch_up(stream)

    def catch_up(self, stream: int, position: int | None = None) -> None:
        """Runs what a stream was given, up to a position counted from its creation."""
        queue = self.queues[stream]
        while queue and (position is None or self.done[stream] < position):
            work = queue.popleft()
            self.done[stream] += 1
            work()

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[CudaError, int]:
        handle = _FIRST_STREAM + self.streams
        self.streams += 1
        self.queues[handle], self.done[handle] = deque(), 0
        return CudaError.cudaSuccess, handle

    def cudaStreamDestroy(self, stream: int) -> tuple[CudaError]:
        self.catch_up(stream)
        self.streams -= 1
        return (CudaError.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[CudaError]:
        self.waits += 1
        self.catch_up(stream)
        return (CudaError.cudaSuccess,)

    def cudaStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple[CudaError]:
        after = self.recorded[event]
        self.enqueue(stream, lambda: self.catch_up(*after))
        return (CudaError.cudaSuccess,)

    def cudaMalloc(self, nbytes: int) -> tuple[CudaError, int]:
        if self.used + nbytes > self.capacity:
            return CudaError.cudaErrorMemoryAllocation, 0
        whole = (ctypes.c_ubyte * (nbytes + ALIGNMENT))()
        start = -ctypes.addressof(whole) % ALIGNMENT
        address = ctypes.addressof(whole) + start
        self.blocks[address] = memoryview(whole)[start : start + nbytes]
        return CudaError.cudaSuccess, address

    def cudaMemGetInfo(self) -> tuple[CudaError, int, int]:
        return CudaError.cudaSuccess, self.capacity - self.used, self.capacity

    def cudaFree(self, pointer: int) -> tuple[CudaError]:
        for stream in self.queues:  # as in CUDA: freeing waits for the device
            self.catch_up(stream)
        del self.blocks[pointer]
        return (CudaError.cudaSuccess,)

    def cudaHostAlloc(self, nbytes: int, flags: int) -> tuple[CudaError, int]:
        block = np.empty(nbytes, np.uint8)  # ctypes would write zeros into every page
        self.pinned[block.ctypes.data] = block
        return CudaError.cudaSuccess, block.ctypes.data

    def cudaFreeHost(self, pointer: int) -> tuple[CudaError]:
        del self.pinned[pointer]
        return (CudaError.cudaSuccess,)

    def cudaMemcpyAsync(
        self, target: int, source: int, nbytes: int, kind: int, stream: int
    ) -> tuple[CudaError]:
        self.copies.append((kind, nbytes))
        self.enqueue(stream, lambda: ctypes.memmove(target, source, nbytes))
        return (CudaError.cudaSuccess,)

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[CudaError, int]:
        self.events += 1
        self._last_event += 1
        self.recorded[self._last_event] = (_FIRST_STREAM, 0)
        return CudaError.cudaSuccess, self._last_event

    def cudaEventRecord(self, event: int, stream: int) -> tuple[CudaError]:
        self.enqueue(stream, lambda: self.times.update({event: time.perf_counter()}))
        self.recorded[event] = stream, self.done[stream] + len(self.queues[stream])
        return (CudaError.cudaSuccess,)

    def cudaEventElapsedTime(self, start: int, end: int) -> tuple[CudaError, float]:
        return CudaError.cudaSuccess, 1e3 * (self.times[end] - self.times[start])

    def cudaEventSynchronize(self, event: int) -> tuple[CudaError]:
        self.waits += 1
        self.catch_up(*self.recorded[event])
        return (CudaError.cudaSuccess,)

    def cudaEventDestroy(self, event: int) -> tuple[CudaError]:
        self.events -= 1
        del self.recorded[event]
        return (CudaError.cudaSuccess,)


def array_at(address: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """The tensor at an address, without a copy."""
    count = int(np.prod(shape, dtype=np.int64))
    raw = (ctypes.c_ubyte * (count * ITEM_SIZE[dtype])).from_address(address)
    return np.frombuffer(raw, NUMPY_DTYPES[dtype]).reshape(shape)


def ort_value(array: np.ndarray) -> Any:
    """The same memory as ONNX Runtime takes it."""
    if array.dtype != NUMPY_DTYPES["float8_e4m3fn"]:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
        array.view(np.uint8), onnx.TensorProto.FLOAT8E4M3FN
    )


class FakeContext:
    """`IExecutionContext` of one graph."""

    def __init__(self, engine: "FakeEngine") -> None:
        self.engine = engine
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.runs = 0
        self.scratch = 0, 0
        self.active_optimization_profile = 0
        self._session: Any = None

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        if self.engine.refuses("set_optimization_profile_async"):
            return False
        self.active_optimization_profile = index
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        if memory % ALIGNMENT:
            raise AssertionError(f"device memory must be aligned to {ALIGNMENT} bytes")
        if size < self.engine.device_memory_size_v2:
            raise AssertionError("too little device memory for the engine")
        self.scratch = memory, size

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        if self.engine.refuses("set_tensor_address"):
            return False
        self.addresses[name] = pointer
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self.engine.refuses("set_input_shape"):
            return False
        self.shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        engine = self.engine
        sizes: dict[str, int] = {}
        for spec in engine.signature.inputs:
            for axis, size in zip(spec.shape, self.shapes[spec.name], strict=True):
                if isinstance(axis, str):
                    sizes[axis] = size
        for side in ("height", "width"):
            if side in sizes:
                sizes[f"grid_{side}"] = sizes[side] // engine.unit
            elif f"grid_{side}" in sizes:
                sizes[side] = sizes[f"grid_{side}"] * engine.unit
        return engine.signature.output(name).concrete(sizes)

    def execute_async_v3(self, stream: int) -> bool:
        engine = self.engine
        if engine.refuses("execute_async_v3"):
            return False
        missing = [n for n in engine.names if n not in self.addresses]
        if missing:
            raise AssertionError(f"no address for {missing[:3]}")
        addresses, shapes = dict(self.addresses), dict(self.shapes)
        scratch = self.scratch
        engine.enqueue(stream, lambda: self._execute(addresses, shapes, scratch))
        self.runs += 1
        return True

    def _execute(
        self,
        addresses: dict[str, int],
        shapes: dict[str, tuple[int, ...]],
        scratch: tuple[int, int],
    ) -> None:
        if self._session is None:
            self._session = self._load()
        # Scratch that overlaps anything in use would give wrong numbers.
        ctypes.memset(scratch[0], 0xA5, scratch[1])
        binding = self._session.io_binding()
        for spec in self.engine.signature.inputs:
            array = array_at(addresses[spec.name], shapes[spec.name], spec.dtype)
            binding.bind_ortvalue_input(spec.name, ort_value(array))
        outputs = self.engine.signature.outputs
        for spec in outputs:
            binding.bind_output(spec.name, "cpu")
        self._session.run_with_iobinding(binding)
        for spec, value in zip(outputs, binding.get_outputs(), strict=True):
            array = value.numpy()
            target = array_at(addresses[spec.name], array.shape, spec.dtype)
            target[...] = array.view(target.dtype)
        self.engine.tamper(self)

    def _load(self) -> Any:
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.intra_op_num_threads = 1
        options.enable_mem_reuse = False  # planning it is most of the time that loading takes
        self._kept = {
            name: ort_value(array_at(self.addresses[name], ref.shape, ref.dtype))
            for name, ref in self.engine.weights.items()
        }
        for name, value in self._kept.items():
            options.add_initializer(name, value)
        return onnxruntime.InferenceSession(
            str(self.engine.path), options, providers=["CPUExecutionProvider"]
        )


class FakeEngine:
    """`ICudaEngine` made from a graph; shared weights are inputs, as in a real one."""

    num_optimization_profiles = 1
    device_memory_size_v2 = SCRATCH

    def __init__(
        self,
        artifacts: Path,
        graph: str,
        shared: bool,
        graphs: GraphSet | None,
        cudart: FakeCudart | None,
        tamper: Callable[[FakeContext], None],
        refuses: Callable[[str], bool],
    ) -> None:
        self.graph = graph
        self.tamper = tamper
        self.refuses = refuses
        manifest = Manifest.load(artifacts, check_files=False)
        graphs = graphs or manifest.graphs
        self.signature = graphs.signature(graph, manifest.config)
        self.unit = manifest.config.vae.multiple_of
        weights = graph_weights(artifacts, graphs.files[graph])
        self.weights = weights if shared else {}
        self.path = artifacts / graphs.files[graph]
        self.cudart = cudart
        specs = (*self.signature.inputs, *self.signature.outputs)
        self.names = [*(spec.name for spec in specs), *self.weights]
        self.contexts: list[Any] = []  # weak: whoever made a context keeps it
        self._memory = cudart, 0
        if cudart is not None and not shared:
            status, pointer = cudart.cudaMalloc(sum(ref.nbytes for ref in weights.values()))
            if status:
                raise AssertionError("an engine that does not fit was deserialised")
            self._memory = cudart, pointer

    def __del__(self) -> None:
        cudart, pointer = self._memory
        if cudart is not None and pointer:
            cudart.cudaFree(pointer)

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        if self.cudart is None:
            work()
        else:
            self.cudart.enqueue(stream, work)

    def create_execution_context(self, strategy: Any) -> FakeContext | None:
        if self.refuses("create_execution_context"):
            return None
        if strategy != FakeTrt.ExecutionContextAllocationStrategy.USER_MANAGED:
            raise AssertionError("a context with scratch of its own")
        context = FakeContext(self)
        self.contexts.append(weakref.proxy(context))
        return context


class FakeTrt:
    """A TensorRT module whose engine files hold the name of a graph.

    Args:
        artifacts: the folder of the graphs.
        shared: graphs whose weights are inputs or not; else all but the VAE's.
        graphs: which graphs of the folder.
        cudart: whose streams the engines run on, and where those that hold their weights put them;
            None runs them at once and gives them memory elsewhere.
        tamper: called after every execution, to plant faults in what lies at the addresses.

    Attributes:
        engines: those that somebody still holds, by graph.
        loads: graphs in the order they were deserialised in.
        refused: calls that TensorRT refuses, and what it logs then.
    """

    __name__ = "fake_trt"
    __version__ = "0.0.1"

    class ExecutionContextAllocationStrategy(enum.IntEnum):
        STATIC = 0
        USER_MANAGED = 2

    def __init__(
        self,
        artifacts: Path,
        shared: Mapping[str, bool] | None = None,
        graphs: GraphSet | None = None,
        cudart: FakeCudart | None = None,
        tamper: Callable[[FakeContext], None] = lambda _context: None,
    ) -> None:
        self.artifacts = artifacts
        self.shared = shared or {}
        self.engines: weakref.WeakValueDictionary[str, FakeEngine] = weakref.WeakValueDictionary()
        self.loads: list[str] = []
        self.refused: dict[str, list[str]] = {}
        outer = self

        class Severity(enum.IntEnum):
            VERBOSE = 4
            INFO = 3
            WARNING = 2
            ERROR = 1

        class ILogger:
            VERBOSE, INFO, WARNING, ERROR = Severity

            def __init__(self) -> None:
                pass

            def log(self, level: Severity, message: str) -> None:
                raise NotImplementedError

        class Runtime:
            def __init__(self, logger: ILogger) -> None:
                self.logger = logger
                self.engine_host_code_allowed = False

            def refuses(self, call: str) -> bool:
                for message in outer.refused.get(call, ()):
                    self.logger.log(Severity.ERROR, message)
                return call in outer.refused

            def deserialize_cuda_engine(self, blob: bytes) -> FakeEngine | None:
                if self.engine_host_code_allowed:
                    raise AssertionError("host code from engine files must stay off")
                if self.refuses("deserialize_cuda_engine"):
                    return None
                graph = bytes(blob).decode()
                shared = outer.shared.get(graph, not graph.startswith("vae"))
                outer.loads.append(graph)
                engine = FakeEngine(artifacts, graph, shared, graphs, cudart, tamper, self.refuses)
                outer.engines[graph] = engine
                return engine

        self.ILogger = ILogger
        self.Runtime = Runtime
