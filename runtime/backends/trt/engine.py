"""A loaded engine: for each shape a context whose addresses never change, so that it replays.

TensorRT-RTX captures an execution as a CUDA graph by itself, and captures anew when a shape or an
address is another one. So each shape has a context of its own, with fixed buffers for inputs and
outputs; a run copies its small inputs there on the device. Weights stay where they are, scratch and
keys and values have fixed addresses (`virtual`).
"""

import contextlib
import logging
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from klein_kv.artifacts.digest import write_atomic
from klein_kv.artifacts.engines.engine_record import EngineRecord
from klein_kv.artifacts.signature import Signature, TensorSpec, is_kv
from klein_kv.errors import BackendError
from klein_kv.runtime.backends.trt.cuda import aligned
from klein_kv.runtime.backends.trt.memory import CudaMemory, DeviceBuffer
from klein_kv.runtime.backends.trt.virtual import KvBlock, KvMemory, Place, Scratch, place_kv

__all__ = ["Engine", "ShapeKey", "key_inputs", "make_recorder", "reason"]

_log = logging.getLogger(__name__)
_MOST_SHAPES = 8
_TOLD_ERRORS, _TOLD_LENGTH = 2, 600


ShapeKey = tuple[Any, ...]
"""Tells the shapes of a graph's inputs apart."""


def key_inputs(signature: Signature) -> tuple[str, ...]:
    """Inputs whose shapes make the key; keys and values differ by their tokens alone."""
    names = [spec.name for spec in signature.inputs if not is_kv(spec.name)]
    return (*names, "k_ref.0") if len(names) < len(signature.inputs) else tuple(names)


def make_recorder(trt: Any, errors: list[str]) -> Any:
    """An error recorder of TensorRT's that adds the first errors since `errors` was cleared.

    TensorRT has one logger for a whole process, whatever is given to a later object (1.7.1: "the
    current new logger is ignored"), but each runtime may have an error recorder of its own.
    """

    class Recorder(trt.IErrorRecorder):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IErrorRecorder.__init__(self)

        def report_error(self, _code: Any, words: str) -> bool:
            if len(errors) < _TOLD_ERRORS:
                errors.append(words.strip())
            return True

        def clear(self) -> None:
            errors.clear()

        def has_overflowed(self) -> bool:
            return False

        def get_num_errors(self) -> int:  # what the bindings call, whatever the class lists
            return 0

        def get_error_code(self, _at: int) -> Any:
            return trt.ErrorCodeTRT.UNSPECIFIED_ERROR

        def get_error_desc(self, _at: int) -> str:
            return ""

    return Recorder()


def reason(errors: list[str]) -> str:
    """What TensorRT said was wrong, for a message of ours."""
    return " | ".join(errors)[:_TOLD_LENGTH] or "it gave no reason"


@dataclass(slots=True)
class _Execution:
    """One shape of an engine: a context with everything bound, and fixed buffers."""

    context: Any
    inputs: dict[str, DeviceBuffer]  # without keys and values
    outputs: dict[str, DeviceBuffer]  # without keys and values
    places: dict[str, Place]  # of the keys and values that come in or out
    kv_bytes: int
    scratch_bytes: int
    sources: dict[str, "weakref.ref[DeviceBuffer]"] = field(default_factory=dict)  # copied last
    ran: bool = False


@dataclass(eq=False)
class Engine:
    """One deserialised engine; weights stay bound."""

    trt: Any
    engine: Any  # what TensorRT deserialised
    record: EngineRecord
    signature: Signature
    unit: int  # pixels of a token's side
    weights: Mapping[str, DeviceBuffer]
    memory: CudaMemory
    scratch: Scratch
    kv: KvMemory
    cache_file: Path  # for compiled kernels
    errors: list[str]  # what TensorRT says
    running: bool = False  # in use, and so are the buffers of the last shape

    def __post_init__(self) -> None:
        self._executions: OrderedDict[ShapeKey, _Execution] = OrderedDict()
        self._key_inputs = key_inputs(self.signature)
        self._makes_kv = any(is_kv(spec.name) for spec in self.signature.outputs)
        self.kernels = _Kernels(self.trt, self.engine, self.cache_file)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of all fixed buffers."""
        return sum(
            aligned(buffer.nbytes)
            for execution in self._executions.values()
            for buffer in (*execution.inputs.values(), *execution.outputs.values())
        )

    def scratch_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        """What the engine needs for a shape; None where it has not been prepared."""
        execution = self._executions.get(self._key(shapes))
        return None if execution is None else execution.scratch_bytes

    def drop_shapes(self, keep: int = 0) -> None:
        """Frees the buffers of all shapes but those that were used last."""
        if len(self._executions) > keep:
            self.memory.synchronize()  # they may still be running
        while len(self._executions) > keep:
            self._executions.popitem(last=False)

    def prepare(self, shapes: Mapping[str, tuple[int, ...]], *, eager: bool) -> None:
        """Takes what a run at these shapes of all inputs needs; see `Backend.prepare`."""
        execution = self._find(shapes, eager=eager)
        if self._makes_kv:
            self.kv.hold(self.kv.take(execution.kv_bytes))  # which the run finds idle, in place
        self.scratch.require(execution.scratch_bytes)

    def run(self, inputs: Mapping[str, DeviceBuffer], key: ShapeKey) -> dict[str, DeviceBuffer]:
        """Enqueues one execution; the key is the shapes of `key_inputs`.

        Outputs are valid in stream order until this engine runs again at this shape; keys and
        values belong to the caller.
        """
        if key in self._executions:
            execution = self._executions[key]
            self._executions.move_to_end(key)
        else:
            execution = self._find({name: x.shape for name, x in inputs.items()}, eager=False)
        self.errors.clear()
        block: KvBlock | None = None
        if self._makes_kv:
            block = self.kv.take(execution.kv_bytes)
        elif execution.places:
            block = self._block_of(inputs, execution)
        if block is not None:
            self.kv.settle(block)
            self.kv.hold(block)
        self.scratch.require(execution.scratch_bytes)  # last: whatever takes memory may shrink it
        for name, fixed in execution.inputs.items():
            source = inputs[name]
            last = execution.sources.get(name)
            if source.volatile or last is None or last() is not source:
                self.memory.copy(fixed.pointer, source.pointer, fixed.nbytes)
                execution.sources[name] = weakref.ref(source)
        if not execution.context.execute_async_v3(self.memory.stream):
            raise self._refusal("TensorRT could not run the engine")
        if not execution.ran:
            execution.ran = True
            self.kernels.save()
        made = block.buffers(execution.places) if self._makes_kv and block is not None else {}
        return execution.outputs | made

    def _key(self, shapes: Mapping[str, tuple[int, ...]]) -> ShapeKey:
        return tuple(shapes[name] for name in self._key_inputs)

    def _find(self, shapes: Mapping[str, tuple[int, ...]], *, eager: bool) -> _Execution:
        key = self._key(shapes)
        execution = self._executions.get(key)
        if execution is None:
            execution = self._make(shapes, eager=eager)
            self.drop_shapes(keep=_MOST_SHAPES - 1)
            self._executions[key] = execution
        self._executions.move_to_end(key)
        return execution

    def _make(self, shapes: Mapping[str, tuple[int, ...]], *, eager: bool) -> _Execution:
        self.errors.clear()
        profile = self.record.profile_for(shapes)
        shapes = {**shapes, **self.signature.output_shapes(shapes, self.unit)}
        context = self.kernels.make_context(eager=eager or self.record.profiles[profile].fixed)
        if context is None:
            raise self._refusal("TensorRT gives no execution context")
        stream = self.memory.stream
        if profile != context.active_optimization_profile and (
            not context.set_optimization_profile_async(profile, stream)
        ):
            raise self._refusal(f"TensorRT refuses profile {profile}")
        for spec in self.signature.inputs:
            if not context.set_input_shape(spec.name, shapes[spec.name]):
                raise self._refusal(f"TensorRT refuses shape {shapes[spec.name]} for {spec.name}")
        if unknown := context.infer_shapes():
            raise self._refusal(f"TensorRT cannot tell the shapes of {', '.join(unknown)[:200]}")
        for spec in self.signature.outputs:
            shape = tuple(context.get_tensor_shape(spec.name))
            if shape != shapes[spec.name]:
                raise BackendError(
                    f"{self.record.graph}: the engine gives {spec.name} the shape {shape}, "
                    f"expected {shapes[spec.name]}; build the engines again"
                )
        inputs, outputs = (
            {
                spec.name: self.memory.allocate(shapes[spec.name], spec.dtype, volatile=volatile)
                for spec in specs
                if not is_kv(spec.name)
            }
            for specs, volatile in (
                (self.signature.inputs, False),
                (self.signature.outputs, True),
            )
        )
        places, kv_bytes = place_kv(
            TensorSpec(spec.name, spec.dtype, shapes[spec.name])
            for spec in (*self.signature.inputs, *self.signature.outputs)
            if is_kv(spec.name)
        )
        bound = {**self.weights, **inputs, **outputs}
        addresses = {name: buffer.pointer for name, buffer in bound.items()}
        addresses |= {name: self.kv.place + place.start for name, place in places.items()}
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise self._refusal(f"TensorRT refuses an address for {name}")
        scratch = max(1, int(context.update_device_memory_size_for_shapes()))
        self.scratch.require(scratch)
        context.set_device_memory(self.scratch.pointer, aligned(scratch))
        if hasattr(context, "is_stream_capturable") and not context.is_stream_capturable(stream):
            _log.warning(
                "%s: TensorRT cannot capture this engine as a CUDA graph, each run will launch its "
                "kernels one by one; build it again with `klein-kv build`",
                self.record.graph,
            )
        return _Execution(context, inputs, outputs, places, kv_bytes, scratch)

    def _block_of(self, inputs: Mapping[str, DeviceBuffer], execution: _Execution) -> KvBlock:
        """The block that holds the keys and values; a copy where they lie elsewhere."""
        block, places = inputs["k_ref.0"].block, execution.places
        if isinstance(block, KvBlock) and all(
            inputs[name].pointer == block.pointer + place.start for name, place in places.items()
        ):
            return block
        block = self.kv.take(execution.kv_bytes)
        self.kv.settle(block)
        for name, place in places.items():
            source = inputs[name]
            self.memory.copy(block.pointer + place.start, source.pointer, source.nbytes)
        return block

    def _refusal(self, what: str) -> BackendError:
        """What TensorRT did not do, in its own words."""
        return BackendError(f"{self.record.graph}: {what}: {reason(self.errors)}")


class _Kernels:
    """Contexts of one engine, and the kernels that they had compiled, kept in a file."""

    def __init__(self, trt: Any, engine: Any, cache_file: Path) -> None:
        self._trt, self._engine, self._file = trt, engine, cache_file
        self._cache: Any = None
        self._saved = b""
        if hasattr(trt, "CudaGraphStrategy"):  # TensorRT proper compiles nothing when it runs
            self._cache = engine.create_runtime_config().create_runtime_cache()
            with contextlib.suppress(FileNotFoundError):
                blob = cache_file.read_bytes()
                if self._cache.deserialize(blob):
                    self._saved = blob
                else:
                    _log.info("%s is of another driver; kernels are compiled anew", cache_file)

    def make_context(self, *, eager: bool) -> Any:
        """A context without scratch of its own, with whole-graph capture where there is such.

        Eager ones compile for a shape before it first runs; else fallback kernels run meanwhile.
        """
        lent = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._cache is None:
            return self._engine.create_execution_context(lent)
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(lent)
        config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        kinds = self._trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER if eager else kinds.LAZY
        config.set_runtime_cache(self._cache)
        return self._engine.create_execution_context(config)

    def save(self) -> None:
        """Writes the kernels that were compiled since they were last written."""
        if self._cache is None:
            return
        memory = self._cache.serialize()
        blob = b"" if memory is None else bytes(memory)  # None: it could not name the device
        if blob in (b"", self._saved):
            return
        self._saved = blob
        try:
            write_atomic(self._file, blob)
        except OSError as error:
            _log.warning(
                "cannot save %s (%s): kernels will be compiled again next time",
                self._file,
                error.strerror,
            )
