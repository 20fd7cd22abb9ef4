"""Where ONNX Runtime computes: all that differs for it between a CPU and a CUDA GPU.

What is said here of the CUDA provider was read off onnxruntime-gpu 1.31.1 itself, loaded over a
stand-in for the CUDA runtime that launches nothing: which nodes go where, what is copied, which
memory is taken. No GPU has run it.
"""

import contextlib
import functools
import io
import logging
from dataclasses import dataclass
from typing import Any

from klein_kv.errors import ArtifactError, BackendError
from klein_kv.runtime.backends.trt.cuda import Cuda, load_cuda

__all__ = [
    "CPU",
    "OrtDevice",
    "check_assignment",
    "free_memory",
    "give_back_memory",
    "open_device",
    "open_session",
]

_log = logging.getLogger(__name__)

_SHAPE_OPS = frozenset(
    (
        *("Add", "Cast", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Floor", "Gather"),
        *("Identity", "Max", "Min", "Mul", "Range", "Reshape", "Shape", "Size", "Slice"),
        *("Squeeze", "Sub", "Unsqueeze", "Where"),
    )
)
"""Integers about shapes: the CUDA provider leaves these few numbers to the CPU on purpose."""

# The ONNX model y = x, float32 [1]: onnx is not among what the runtime needs.
_IDENTITY = bytes.fromhex(
    "08083a3b0a100a017812017922084964656e746974791205656d7074795a0f0a0178120a0a08080112040a020801"
    "620f0a0179120a0a08080112040a02080142040a00100d"
)


@dataclass(frozen=True, slots=True)
class OrtDevice:
    """One device of ONNX Runtime; its kind is also the extra of this package for its provider."""

    kind: str = "cpu"  # or "cuda"
    index: int = 0  # among those of its kind

    @property
    def is_host(self) -> bool:
        """Its memory is the host's, so that weights need not be copied to it."""
        return self.kind == "cpu"

    @property
    def backend(self) -> str:
        """Name of the backend on it; results of another one round differently."""
        return "onnxruntime" if self.is_host else "onnxruntime-cuda"

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Types of graphs that it computes."""
        return ("float32", "float16") if self.is_host else ("float32", "float16", "bfloat16")

    @property
    def provider(self) -> str:
        """Its execution provider."""
        return f"{self.kind.upper()}ExecutionProvider"

    @property
    def options(self) -> dict[str, str]:
        """The provider's options."""
        if self.is_host:
            return {}
        return {
            "device_id": str(self.index),
            "arena_extend_strategy": "kSameAsRequested",  # doubling takes up to twice the weights
            "use_tf32": "0",
            "cudnn_conv_algo_search": "HEURISTIC",  # without trying all on every shape
        }


CPU = OrtDevice()


def open_device(onnxruntime: Any, device: OrtDevice) -> None:
    """Makes sure that a device can be used, and that all take its memory from one place.

    Raises:
        BackendError: the installed onnxruntime has no such provider, or it cannot start.
    """
    available = onnxruntime.get_available_providers()
    if device.provider not in available:
        raise BackendError(
            f"device is {device.kind!r}, and the installed onnxruntime {onnxruntime.__version__} "
            f"has no {device.provider}, only {', '.join(available)}; it is in onnxruntime-gpu: pip "
            f"uninstall onnxruntime, then pip install 'klein-kv[{device.kind}]'"
        )
    try:
        _share_arena(onnxruntime, device)
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise BackendError(
            f"{device.provider} of onnxruntime {onnxruntime.__version__} cannot start on device "
            f"{device.index}: {error}; it needs an NVIDIA driver, and CUDA and cuDNN of its own "
            f"version (pip install 'klein-kv[{device.kind}]' brings these)"
        ) from error


@functools.cache
def _share_arena(onnxruntime: Any, device: OrtDevice) -> None:
    """One arena for all sessions of the process: what a finished graph leaves, the next one uses.

    On a GPU buffers and weights come from it too. Measured on a CPU on an edit with four 512x512
    references: 1.45 GB at the peak against 1.92 GB.
    """
    info = onnxruntime.OrtMemoryInfo(
        device.kind.capitalize(),
        onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR,
        device.index,
        onnxruntime.OrtMemType.DEFAULT,
    )
    if device.is_host:
        onnxruntime.create_and_register_allocator(info, None)
        return
    not_found = io.StringIO()
    with contextlib.redirect_stdout(not_found):  # it prints the libraries that it does not find
        onnxruntime.preload_dlls()
    if not_found.getvalue():
        _log.info("%s", not_found.getvalue().strip())
    as_requested = onnxruntime.OrtArenaCfg({"arena_extend_strategy": 1})
    onnxruntime.create_and_register_allocator_v2(
        device.provider, info, device.options, as_requested
    )


def open_session(onnxruntime: Any, device: OrtDevice, model: str | bytes, options: Any) -> Any:
    """A session on the device, in the shared arena; ONNX Runtime adds the CPU for shapes."""
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.log_severity_level = 3
    providers = [(device.provider, device.options)]
    return onnxruntime.InferenceSession(model, options, providers=providers, enable_fallback=0)


def free_memory(device: OrtDevice, cuda: Cuda | None = None) -> int:
    """Bytes that a GPU has free, as `load_cuda` tells; ONNX Runtime tells nothing of it."""
    cuda = cuda or load_cuda(device.kind)
    before = cuda.call("cudaGetDevice")  # of this thread, whose it stays
    cuda.call("cudaSetDevice", device.index)
    try:
        return int(cuda.call("cudaMemGetInfo")[0])
    finally:
        cuda.call("cudaSetDevice", before)


def give_back_memory(onnxruntime: Any, device: OrtDevice) -> None:
    """Returns what a GPU's arena holds and nobody uses.

    ONNX Runtime does this at the end of a run, if asked: an empty graph is run for it. Regions go
    back whole, and weights have regions of their own.
    """
    session = _empty_session(onnxruntime, device)
    binding = session.io_binding()
    value = onnxruntime.OrtValue.ortvalue_from_shape_and_type((1,), 1, device.kind, device.index)
    binding.bind_ortvalue_input("x", value)
    binding.bind_ortvalue_output("y", value)
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", f"gpu:{device.index}")
    session.run_with_iobinding(binding, options)


@functools.cache
def _empty_session(onnxruntime: Any, device: OrtDevice) -> Any:
    return open_session(onnxruntime, device, _IDENTITY, onnxruntime.SessionOptions())


def check_assignment(session: Any, device: OrtDevice, file: str) -> None:
    """Refuses a session that would compute elsewhere than on its device.

    `session.disable_cpu_ep_fallback` would refuse every graph with dynamic shapes, whose shape
    arithmetic belongs on the CPU. And a provider that cannot start is only warned of. The session
    is made with `session.record_ep_graph_assignment_info`.

    Raises:
        BackendError: the provider did not start.
        ArtifactError: it has no kernel for a node that computes.
    """
    providers = session.get_providers()
    if device.provider not in providers:
        raise BackendError(
            f"{file}: {device.provider} did not start, only {', '.join(providers)} did; check the "
            "driver, and that CUDA and cuDNN have the versions that onnxruntime-gpu asks for"
        )
    if device.is_host:
        return
    strays = {
        node.op_type
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != device.provider
        for node in part.get_nodes()
        if node.op_type not in _SHAPE_OPS
    }
    if strays:
        raise ArtifactError(
            f"{file}: {device.provider} has no kernel for {', '.join(sorted(strays))} in the "
            "graph's type and would leave them to the CPU; export again with another --dtype"
        )
