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
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from klein_kv.config import ITEM_SIZE
from klein_kv.manifest import Manifest, graph_weights
from klein_kv.signature import GRAPH_FILES, make_signature

NUMPY = {"float32": np.float32, "int64": np.int64, "uint8": np.uint8}


class CudaError(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2


class FakeCudart:
    """`cuda.bindings.runtime` on host memory, with as much "device memory" as it is told.

    Attributes:
        blocks: live allocations, address -> memory.
        copies: (kind, bytes) of every copy.
        waits: how often the host waited for the stream or an event.
    """

    cudaError_t = CudaError
    cudaStreamNonBlocking = 1
    cudaDeviceAttr = SimpleNamespace(
        cudaDevAttrComputeCapabilityMajor=75, cudaDevAttrComputeCapabilityMinor=76
    )
    cudaMemcpyKind = SimpleNamespace(
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
    )

    def __init__(self, capacity: int = 1 << 34) -> None:
        self.capacity = capacity
        self.blocks: dict[int, Any] = {}
        self.pinned: dict[int, Any] = {}
        self.copies: list[tuple[int, int]] = []
        self.streams = 0
        self.events = 0
        self.created = 0
        self.recorded: dict[int, float] = {}
        self.waits = 0

    @property
    def used(self) -> int:
        return sum(len(block) for block in self.blocks.values())

    def cudaDeviceGetAttribute(self, attribute: int, device: int) -> tuple[CudaError, int]:
        return CudaError.cudaSuccess, {75: 12, 76: 0}[attribute]

    def cudaSetDevice(self, device: int) -> tuple[CudaError]:
        return (CudaError.cudaSuccess,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[CudaError, int]:
        self.streams += 1
        return CudaError.cudaSuccess, 7

    def cudaStreamDestroy(self, stream: int) -> tuple[CudaError]:
        self.streams -= 1
        return (CudaError.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[CudaError]:
        self.waits += 1
        return (CudaError.cudaSuccess,)

    def cudaMalloc(self, nbytes: int) -> tuple[CudaError, int]:
        if self.used + nbytes > self.capacity:
            return CudaError.cudaErrorMemoryAllocation, 0
        block = (ctypes.c_ubyte * nbytes)()
        address = ctypes.addressof(block)
        self.blocks[address] = block
        return CudaError.cudaSuccess, address

    def cudaFree(self, pointer: int) -> tuple[CudaError]:
        del self.blocks[pointer]
        return (CudaError.cudaSuccess,)

    def cudaHostAlloc(self, nbytes: int, flags: int) -> tuple[CudaError, int]:
        block = (ctypes.c_ubyte * nbytes)()
        self.pinned[ctypes.addressof(block)] = block
        return CudaError.cudaSuccess, ctypes.addressof(block)

    def cudaFreeHost(self, pointer: int) -> tuple[CudaError]:
        del self.pinned[pointer]
        return (CudaError.cudaSuccess,)

    def cudaMemcpyAsync(
        self, target: int, source: int, nbytes: int, kind: int, stream: int
    ) -> tuple[CudaError]:
        self.copies.append((kind, nbytes))
        ctypes.memmove(target, source, nbytes)
        return (CudaError.cudaSuccess,)

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[CudaError, int]:
        self.events += 1
        self.created += 1
        return CudaError.cudaSuccess, self.created

    def cudaEventRecord(self, event: int, stream: int) -> tuple[CudaError]:
        self.recorded[event] = time.perf_counter()
        return (CudaError.cudaSuccess,)

    def cudaEventElapsedTime(self, start: int, end: int) -> tuple[CudaError, float]:
        return CudaError.cudaSuccess, 1e3 * (self.recorded[end] - self.recorded[start])

    def cudaEventSynchronize(self, event: int) -> tuple[CudaError]:
        self.waits += 1
        return (CudaError.cudaSuccess,)

    def cudaEventDestroy(self, event: int) -> tuple[CudaError]:
        self.events -= 1
        return (CudaError.cudaSuccess,)


def array_at(address: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """The tensor at an address, without a copy."""
    count = int(np.prod(shape, dtype=np.int64))
    raw = (ctypes.c_ubyte * (count * ITEM_SIZE[dtype])).from_address(address)
    return np.frombuffer(raw, NUMPY[dtype]).reshape(shape)


class FakeContext:
    """`IExecutionContext` of one graph."""

    def __init__(self, engine: "FakeEngine") -> None:
        self.engine = engine
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.runs = 0
        self.active_optimization_profile = 0
        self._session: Any = None

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.active_optimization_profile = index
        return True

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        self.addresses[name] = pointer
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
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
        missing = [n for n in engine.names if n not in self.addresses]
        if missing:
            raise AssertionError(f"no address for {missing[:3]}")
        if self._session is None:
            self._session = self._load()
        feeds = {
            spec.name: array_at(self.addresses[spec.name], self.shapes[spec.name], spec.dtype)
            for spec in engine.signature.inputs
        }
        names = [spec.name for spec in engine.signature.outputs]
        for spec, value in zip(
            engine.signature.outputs, self._session.run(names, feeds), strict=True
        ):
            array_at(self.addresses[spec.name], value.shape, spec.dtype)[...] = value
        engine.tamper(self)
        self.runs += 1
        return True

    def _load(self) -> Any:
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.disable_prepacking", "1")
        self._kept = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(
                array_at(self.addresses[name], ref.shape, ref.dtype)
            )
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

    def __init__(
        self, artifacts: Path, graph: str, shared: bool, tamper: Callable[[FakeContext], None]
    ) -> None:
        self.graph = graph
        self.tamper = tamper
        manifest = Manifest.load(artifacts, check_files=False)
        self.signature = make_signature(graph, manifest.config, manifest.dtype)
        self.unit = manifest.config.vae.multiple_of
        self.weights = graph_weights(artifacts, GRAPH_FILES[graph]) if shared else {}
        self.path = artifacts / GRAPH_FILES[graph]
        specs = (*self.signature.inputs, *self.signature.outputs)
        self.names = [*(spec.name for spec in specs), *self.weights]
        self.contexts: list[FakeContext] = []

    def create_execution_context(self, *_: Any) -> FakeContext:
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]


class FakeTrt:
    """A TensorRT module whose engine files hold the name of a graph.

    Args:
        artifacts: where the graphs are.
        shared: graphs -> whether their weights are inputs.
        tamper: called after every execution, to plant faults in what lies at the addresses.
    """

    __name__ = "fake_trt"
    __version__ = "0.0.1"

    def __init__(
        self,
        artifacts: Path,
        shared: Mapping[str, bool] | None = None,
        tamper: Callable[[FakeContext], None] = lambda context: None,
    ) -> None:
        self.artifacts = artifacts
        self.shared = shared or {}
        self.engines: dict[str, FakeEngine] = {}
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

        class Runtime:
            def __init__(self, logger: ILogger) -> None:
                self.logger = logger
                self.engine_host_code_allowed = False

            def deserialize_cuda_engine(self, blob: bytes) -> FakeEngine:
                if self.engine_host_code_allowed:
                    raise AssertionError("host code from engine files must stay off")
                graph = bytes(blob).decode()
                shared = outer.shared.get(graph, not graph.startswith("vae"))
                outer.engines[graph] = FakeEngine(outer.artifacts, graph, shared, tamper)
                return outer.engines[graph]

        self.ILogger = ILogger
        self.Runtime = Runtime
