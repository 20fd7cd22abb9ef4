"""One graph to one serialized engine."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
import psutil

from klein_kv.artifacts.engines.engine_record import ProfileRecord
from klein_kv.artifacts.engines.targets import Target, compute_capability
from klein_kv.artifacts.numbers import FP8_MAX
from klein_kv.artifacts.signature import TensorSpec
from klein_kv.engines.build_log import BuildLog, make_logger
from klein_kv.engines.progress import make_monitor
from klein_kv.engines.rewrite.graph_rewrite import MAX_FUSED_HEAD_DIM, Graph
from klein_kv.errors import BackendError, BuildError, CapacityError

__all__ = ["BuiltEngine", "build_engine"]

_MIN_FUSED_HEAD_DIM = 12  # TensorRT-RTX 1.7.1 has no kernel for 8, and has one for 12

_EMBEDDED_FACTOR = 3.1
"""Peak memory of a build with embedded weights, in weight bytes (measured, TensorRT-RTX 1.7.1)."""

_SOFTMAX_SCALE = np.array(1 / FP8_MAX, np.float32)
"""TensorRT reads it during the build: it must stay alive."""


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """What a build made: the serialized engine, a buffer that the library owns, and its facts.

    Kernel plan lines and activation memory are told per optimization profile; the rest is as in
    `EngineRecord`.
    """

    plan: Any
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    layers: list[list[str]]
    scratch_bytes: tuple[int, ...]
    seconds: float


def build_engine(
    trt: Any,
    name: str,
    graph: Graph,
    profiles: Sequence[ProfileRecord],
    target: Target,
    progress: bool | None = None,
) -> BuiltEngine:
    """Builds the engine of the graph `name`; `progress` None shows a bar on a terminal.

    A `BuildError` says that TensorRT refuses the target or the graph, a `BackendError` that it
    cannot start, a `CapacityError` that memory does not suffice for embedded weights. After Ctrl-C
    (KeyboardInterrupt) and other signals that raise TensorRT is left in order.
    """
    if not graph.shared:
        _check_memory(name, graph.weight_bytes)
    start = time.perf_counter()
    log = BuildLog()
    capability = compute_capability(trt, target)
    try:
        builder = trt.Builder(make_logger(trt, log))
    except (RuntimeError, TypeError) as error:
        raise BackendError(f"{trt.__name__} cannot start: {log.reason} ({error})") from error
    network = _parse(trt, builder, name, graph, log)
    _allow_unfused(trt, network, name.startswith("vae_"))
    if graph.quantized.attentions:
        _quantize_softmax(trt, name, network)
    inputs, outputs = _tensors(trt, network, graph)
    config = _configure(trt, builder, profiles, capability, target)
    with _interruptible() as stopped, make_monitor(trt, name, progress, stopped) as monitor:
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildError(
            f"{name}: {trt.__name__} {trt.__version__} cannot build this graph for {target.name}: "
            f"{log.reason}"
        )
    if len(log.scratch_bytes) != len(profiles):
        raise BuildError(
            f"{name}: TensorRT told the memory of {len(log.scratch_bytes)} profiles, expected "
            f"{len(profiles)}; it has one logger per process: build in a process of its own"
        )
    return BuiltEngine(
        plan=plan,
        inputs=inputs,
        outputs=outputs,
        layers=log.layers,
        scratch_bytes=tuple(log.scratch_bytes),
        seconds=time.perf_counter() - start,
    )


def _check_memory(name: str, weight_bytes: int) -> None:
    needed = int(weight_bytes * _EMBEDDED_FACTOR) + (1 << 30)
    available = psutil.virtual_memory().available
    if needed > available:
        raise CapacityError(
            f"{name}: embedding {weight_bytes / 1e9:.1f} GB of weights needs about "
            f"{needed / 1e9:.0f} GB of memory ({_EMBEDDED_FACTOR} times the weights), "
            f"{available / 1e9:.1f} GB are available; build with shared weights, which needs less "
            "than 2 GB, or on a larger machine"
        )


def _parse(trt: Any, builder: Any, name: str, graph: Graph, log: BuildLog) -> Any:
    flag = trt.NetworkDefinitionCreationFlag
    # TensorRT 11 and TensorRT-RTX are always strongly typed; the flag may go.
    flags = 1 << int(flag.STRONGLY_TYPED) if hasattr(flag, "STRONGLY_TYPED") else 0
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, builder.logger)
    # The path tells where external data lies.
    if not parser.parse(graph.model, path=str(graph.path)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        reasons = [f"{e.node_operator()} {e.node_name()}: {e.desc().strip()}"[:400] for e in errors]
        raise BuildError(
            f"{name}: {trt.__name__} {trt.__version__} cannot read {graph.path.name}: "
            f"{'; '.join(reasons) or log.reason}"
        )
    return network


def _allow_unfused(trt: Any, network: Any, everywhere: bool) -> None:
    """Lets TensorRT decompose attention that it has no kernel for.

    A fused kernel is used wherever there is one. In the transformers there must be one, since
    unfused attention holds all scores in memory: there the build fails otherwise. The VAE has one
    small attention, for which TensorRT-RTX lacks a kernel at some sizes; and heads narrower than
    those of any model in use have none at all.
    """
    for layer in _attentions(trt, network):
        head_dim = layer.get_input(0).shape[-1]
        if everywhere or not _MIN_FUSED_HEAD_DIM <= head_dim <= MAX_FUSED_HEAD_DIM:
            layer.attention.decomposable = True


def _quantize_softmax(trt: Any, name: str, network: Any) -> None:
    """Rounds the softmax of every attention to float8, without which the kernel stays in 16 bits.

    ONNX `Attention` has no attribute for it. Probabilities are at most 1, so their scale is known.
    """
    if not hasattr(trt, "IAttentionInputLayer"):
        raise BuildError(
            f"{name}: {trt.__name__} {trt.__version__} offers no attention layer to quantize; "
            "build with tensorrt_rtx, or with attention in bf16"
        )
    for layer in _attentions(trt, network):
        scale = network.add_constant((), _SOFTMAX_SCALE)
        layer.attention.normalization_quantize_scale = scale.get_output(0)
        layer.attention.normalization_quantize_to_type = trt.DataType.FP8


def _attentions(trt: Any, network: Any) -> Iterator[Any]:
    """Layers of attention, in libraries that have them as layers."""
    if hasattr(trt, "IAttentionInputLayer"):
        for i in range(network.num_layers):
            layer = network.get_layer(i)
            if layer.type == trt.LayerType.ATTENTION_INPUT:
                layer.__class__ = trt.IAttentionInputLayer
                yield layer


def _tensors(
    trt: Any, network: Any, graph: Graph
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    names = {
        trt.DataType.FLOAT: "float32",
        trt.DataType.HALF: "float16",
        trt.DataType.BF16: "bfloat16",
        trt.DataType.INT64: "int64",
        trt.DataType.UINT8: "uint8",
        trt.DataType.FP8: "float8_e4m3fn",
    }

    def spec(tensor: Any) -> TensorSpec:
        return TensorSpec(tensor.name, names[tensor.dtype], tuple(tensor.shape))

    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    fed = [tensor for tensor in inputs if tensor.name not in graph.weights]
    return tuple(map(spec, fed)), tuple(map(spec, outputs))


def _configure(
    trt: Any, builder: Any, profiles: Sequence[ProfileRecord], capability: Any, target: Target
) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # A merge of weights is float32; no network has a product in that type.
    config.clear_flag(trt.BuilderFlag.TF32)
    config.max_aux_streams = 0  # else the parts of wide attention run at once, each in its memory
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        # Else wide profiles allocate while they run, and cannot be captured as CUDA graphs.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if hasattr(trt.PreviewFeature, "RUNTIME_ACTIVATION_RESIZE_10_10"):
        # Else small shapes of a wide profile need the scratch of its largest.
        feature = trt.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10
        config.set_preview_feature(feature, True)
    if capability is not None:
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(capability, 0):
            raise BuildError(
                f"target {target.name}: {trt.__name__} {trt.__version__} refuses compute "
                f"capability {target.sm / 10:.1f}"
            )
    for profile in profiles:
        shapes = builder.create_optimization_profile()
        for tensor, (low, typical, high) in profile.shapes.items():
            shapes.set_shape(tensor, low, typical, high)
        if config.add_optimization_profile(shapes) < 0:
            raise BuildError(
                f"profile {profile.name}: TensorRT refuses the shapes {profile.shapes}"
            )
    return config


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, and other signals that raise; the first is raised at the end.

    The build runs in native code, where an exception from a callback would end the process; the
    progress monitor asks the event instead and stops the build.
    """
    stopped, caught = threading.Event(), list[int]()

    def stop(number: int, _frame: object) -> None:
        caught.append(number)
        stopped.set()

    previous: dict[int, Callable[[int, FrameType | None], object]] = {}
    if threading.current_thread() is threading.main_thread():
        for number in map(int, signal.valid_signals()):
            handler = signal.getsignal(number)
            if callable(handler):  # of Python, so that it may raise
                previous[number] = handler
                signal.signal(number, stop)
    try:
        yield stopped
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
    for number in caught:
        previous[number](number, None)
