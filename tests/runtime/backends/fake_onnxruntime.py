"""A stand-in for onnxruntime-gpu that computes on the CPU.

It is the installed onnxruntime under another name: "cuda" is the CPU, and the CUDA provider is the
CPU's, with shape arithmetic reported as left to the CPU. What a caller gets wrong about the device
(a buffer elsewhere, an output bound to the host, an unknown option) fails here too; that kernels
exist and compute right is not shown.
"""

import sys
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import onnxruntime

CUDA = "CUDAExecutionProvider"
OPTIONS = {"device_id", "arena_extend_strategy", "use_tf32", "cudnn_conv_algo_search"}
"""Names of onnxruntime-gpu 1.31.1, from `InferenceSession.get_provider_options`."""


def host(kind: str, index: int) -> str:
    if (kind, index) != ("cuda", 1):
        raise AssertionError(f"{kind}:{index} was asked for, expected cuda:1")
    return "cpu"


class FakeValue:
    """`OrtValue`'s makers; what they make is onnxruntime's own."""

    allocated = 0
    from_dlpack = onnxruntime.OrtValue.from_dlpack
    ortvalue_from_numpy_with_onnx_type = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type

    @classmethod
    def ortvalue_from_shape_and_type(cls, shape: Any, element: int, kind: str, index: int) -> Any:
        cls.allocated += 1
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, element, host(kind, index))


class FakeBinding:
    def __init__(self, binding: Any) -> None:
        self._binding = binding

    def bind_input(self, name: str, kind: str, index: int, *args: Any) -> None:
        self._binding.bind_input(name, host(kind, index), 0, *args)

    def bind_output(self, name: str, kind: str, index: int) -> None:
        self._binding.bind_output(name, host(kind, index), 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._binding, name)


class FakeSession:
    """`InferenceSession` of the CUDA provider.

    Attributes:
        strays: op types that the provider is said to have no kernel for.
        started: whether the provider starts; ONNX Runtime only warns if it does not.
    """

    def __init__(self, session: Any, strays: set[str], started: bool) -> None:
        self._session = session
        self._strays = strays
        self._started = started

    def get_providers(self) -> list[str]:
        return [*([CUDA] if self._started else []), "CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        parts = defaultdict(list)
        for part in self._session.get_provider_graph_assignment_info():
            for node in part.get_nodes():
                left = node.op_type in self._strays or node.op_type in ("Concat", "Squeeze")
                parts["CPUExecutionProvider" if left else CUDA].append(node)
        return [
            SimpleNamespace(ep_name=name, get_nodes=lambda nodes=nodes: nodes)
            for name, nodes in parts.items()
        ]

    def io_binding(self) -> FakeBinding:
        return FakeBinding(self._session.io_binding())

    def run_with_iobinding(self, binding: FakeBinding, options: Any = None) -> None:
        if options is not None:
            key = "memory.enable_memory_arena_shrinkage"
            if options.get_run_config_entry(key) != "gpu:1":
                raise AssertionError("the memory of another device was to be given back")
            options = onnxruntime.RunOptions()
            options.add_run_config_entry(key, "cpu:0")
            FakeOnnxruntime.given_back += 1
        self._session.run_with_iobinding(binding._binding, options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


class FakeOnnxruntime:
    """The module, for a machine whose second GPU is to be used.

    Args:
        strays: see `FakeSession`.
        started: see `FakeSession`.
        error: what registering the arena fails with.

    Attributes:
        arenas: (provider, memory, index, options) of every arena registered.
    """

    __version__ = onnxruntime.__version__
    given_back = 0
    OrtValue = FakeValue

    def __init__(self, strays=None, started=True, error=""):
        self.strays = strays or set()
        self.started = started
        self.error = error
        self.arenas: list[Any] = []

    def get_available_providers(self) -> list[str]:
        return [CUDA, "CPUExecutionProvider"]

    def preload_dlls(self) -> None:
        sys.stdout.write("Failed to load libcurand.so.10\n")

    def OrtMemoryInfo(self, name: str, _kind: Any, index: int, _type: Any) -> Any:  # noqa: N802
        return name, index

    def create_and_register_allocator_v2(self, provider, info, options, config):
        if self.error:
            raise RuntimeError(self.error)
        if not isinstance(config, onnxruntime.OrtArenaCfg):
            raise TypeError(config)
        self.arenas.append((provider, *info, options))

    def InferenceSession(  # noqa: N802
        self, path: str | bytes, options: Any, *, providers: Any, enable_fallback: int
    ) -> FakeSession:
        ((name, given),) = providers
        if name != CUDA or not set(given) <= OPTIONS or enable_fallback:
            raise AssertionError(f"session asked for with {providers}")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return FakeSession(session, self.strays, self.started)

    def __getattr__(self, name: str) -> Any:
        return getattr(onnxruntime, name)
