"""A loaded engine: for each shape a context whose addresses never change, so that it replays.

TensorRT-RTX captures an execution as a CUDA graph by itself, and captures anew when a shape or an
address is another one. So each shape has a context of its own, with fixed buffers for inputs and
outputs; a run copies its small inputs there on the device. Weights stay where they are, scratch and
keys and values have fixed addresses (`virtual`).
"""

import contextlib
import logging
import os
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from klein_kv.artifacts.engines.engine_record import EngineRecord
from klein_kv.artifacts.signature import Signature, TensorSpec, is_kv
from klein_kv.artifacts.weights import WeightRef
from klein_kv.errors import BackendError
from klein_kv.runtime.backends.trt.cuda import aligned
from klein_kv.runtime.backends.trt.memory import CudaMemory, DeviceBuffer
from klein_kv.runtime.backends.trt.virtual import KvBlock, KvMemory, Scratch

__all__ = ["Engine", "Errors", "ShapeKey", "key_inputs", "make_errors", "place_kv"]

_log = logging.getLogger(__name__)
_MOST_SHAPES = 8
_TOLD_ERRORS, _TOLD_LENGTH = 2, 600


ShapeKey = tuple[Any, ...]
"""Tells the shapes of a graph's inputs apart."""


def key_inputs(signature: Signature) -> tuple[str, ...]:
    """Inputs whose shapes make the key; keys and values differ by their tokens alone."""
    names = [spec.name for spec in signature.inputs if not is_kv(spec.name)]
    return (*names, "k_ref.0") if len(names) < len(signature.inputs) else tuple(names)


class Place(NamedTuple):
    """Where in a block one of a set's tensors lies."""

    start: int
    shape: tuple[int, ...]
    dtype: str


def place_kv(tensors: tuple[TensorSpec, ...]) -> tuple[dict[str, Place], int]:
    """The layout of a set's keys and values in one block, and its size in bytes.

    Args:
        tensors: with concrete shapes.
    """
    places, end = {}, 0
    for spec in tensors:
        places[spec.name] = Place(end, spec.concrete({}), spec.dtype)
        end += aligned(spec.nbytes({}))
    return places, end


class Errors:
    """What TensorRT said was wrong since `begin`; only the first of it is kept.

    TensorRT has one logger for a whole process, whatever is given to a later object (1.7.1: "the
    current new logger is ignored"), but each runtime may have an error recorder of its own.
    """

    def __init__(self) -> None:
        self._words: list[str] = []

    def begin(self) -> None:
        """Forgets what was said before."""
        self._words.clear()

    def add(self, words: str) -> None:
        """Keeps an error."""
        if len(self._words) < _TOLD_ERRORS:
            self._words.append(words.strip())

    @property
    def reason(self) -> str:
        """For a message of ours."""
        return " | ".join(self._words)[:_TOLD_LENGTH] or "it gave no reason"


def make_errors(trt: Any, errors: Errors) -> Any:
    """An error recorder of TensorRT's that fills `errors`."""

    class Recorder(trt.IErrorRecorder):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IErrorRecorder.__init__(self)

        def report_error(self, _code: Any, words: str) -> bool:
            errors.add(words)
            return True

        def clear(self) -> None:
            errors.begin()

        def has_overflowed(self) -> bool:
            return False

        def get_num_errors(self) -> int:  # what the bindings call, whatever the class lists
            return 0

        def get_error_code(self, _at: int) -> Any:
            return trt.ErrorCodeTRT.UNSPECIFIED_ERROR

        def get_error_desc(self, _at: int) -> str:
            return ""

    return Recorder()


@dataclass(slots=True)
class _Execution:
    """One shape of an engine.

    Attributes:
        context: its execution context, everything bound.
        inputs: fixed buffers, without keys and values.
        outputs: fixed buffers, likewise.
        kv_outputs: where keys and values come out, for graphs that make some.
        kv_bytes: bytes of keys and values that come in or out.
        scratch_bytes: what the context needs for this shape.
        sources: what was copied to each input last.
        kv_source: the first of the keys and values, if they were found in one block.
        ran: it has run.
    """

    context: Any
    inputs: dict[str, DeviceBuffer]
    outputs: dict[str, DeviceBuffer]
    kv_outputs: dict[str, Place]
    kv_bytes: int
    scratch_bytes: int
    sources: dict[str, "weakref.ref[DeviceBuffer]"] = field(default_factory=dict)
    kv_source: "weakref.ref[DeviceBuffer] | None" = None
    ran: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the fixed buffers."""
        buffers = (*self.inputs.values(), *self.outputs.values())
        return sum(aligned(buffer.nbytes) for buffer in buffers)


class Engine:
    """One deserialised engine; weights stay bound.

    Args:
        trt: the TensorRT module.
        engine: what it deserialised.
        record: what `engine.json` says of it.
        signature: the graph's contract.
        unit: pixels of a token's side.
        weights: device buffers of its weight inputs.
        refs: where each comes from.
        memory: of the device.
        scratch: memory for activations.
        kv: memory for keys and values.
        cache_file: for compiled kernels.
        errors: what TensorRT says.
    """

    def __init__(
        self,
        trt: Any,
        engine: Any,
        record: EngineRecord,
        signature: Signature,
        unit: int,
        weights: Mapping[str, DeviceBuffer],
        refs: Mapping[str, WeightRef],
        memory: CudaMemory,
        scratch: Scratch,
        kv: KvMemory,
        cache_file: Path,
        errors: Errors,
    ) -> None:
        self.record = record
        self.refs = frozenset(refs.values())
        self._trt = trt
        self._engine = engine
        self._signature = signature
        self._unit = unit
        self._weights = weights
        self._memory = memory
        self._scratch = scratch
        self._kv = kv
        self._errors = errors
        self._executions: OrderedDict[ShapeKey, _Execution] = OrderedDict()
        self._key_inputs = key_inputs(signature)
        self._reads_kv = any(is_kv(spec.name) for spec in signature.inputs)
        self._makes_kv = any(is_kv(spec.name) for spec in signature.outputs)
        self._kernels = _Kernels(trt, engine, cache_file)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of all fixed buffers."""
        return sum(execution.nbytes for execution in self._executions.values())

    def scratch_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        """What the engine needs for a shape; None where it has not been prepared."""
        execution = self._executions.get(self._key(shapes))
        return None if execution is None else execution.scratch_bytes

    def drop_shapes(self, keep: int = 0) -> None:
        """Frees the buffers of all shapes but those that were used last."""
        if len(self._executions) > keep:
            self._memory.synchronize()  # they may still be running
        while len(self._executions) > keep:
            self._executions.popitem(last=False)

    def prepare(self, shapes: Mapping[str, tuple[int, ...]], *, eager: bool) -> None:
        """Makes context and buffers, and takes the memory that a run at this shape needs.

        Args:
            shapes: of all inputs.
            eager: have kernels for this very shape compiled at the first run, and not meanwhile.
        """
        execution = self._find(shapes, eager=eager)
        if self._makes_kv:
            self._kv.hold(self._kv.take(execution.kv_bytes))  # which the run finds idle, in place
        self._scratch.require(execution.scratch_bytes)

    def run(self, inputs: Mapping[str, DeviceBuffer], key: ShapeKey) -> dict[str, DeviceBuffer]:
        """Enqueues one execution.

        Args:
            inputs: all of them.
            key: shapes of `key_inputs`.

        Returns:
            Outputs, valid in stream order until this engine runs again at this shape; keys and
            values belong to the caller.
        """
        if key in self._executions:
            execution = self._executions[key]
            self._executions.move_to_end(key)
        else:
            execution = self._find({name: x.shape for name, x in inputs.items()}, eager=False)
        self._errors.begin()
        block: KvBlock | None = None
        if self._makes_kv:
            block = self._kv.take(execution.kv_bytes)
        elif self._reads_kv:
            block = self._block_of(inputs, execution)
        if block is not None:
            self._kv.settle(block)
            self._kv.hold(block)
        self._scratch.require(execution.scratch_bytes)  # last: whatever takes memory may shrink it
        for name, fixed in execution.inputs.items():
            source = inputs[name]
            last = execution.sources.get(name)
            if source.volatile or last is None or last() is not source:
                self._memory.copy_on_device(fixed.pointer, source.pointer, fixed.nbytes)
                execution.sources[name] = weakref.ref(source)
        if not execution.context.execute_async_v3(self._memory.stream):
            raise self._refusal("TensorRT could not run the engine")
        if not execution.ran:
            execution.ran = True
            self._kernels.save()
        outputs = dict(execution.outputs)
        if block is not None and self._makes_kv:
            for name, place in execution.kv_outputs.items():
                pointer = block.pointer + place.start
                outputs[name] = DeviceBuffer(pointer, place.shape, place.dtype, block)
        return outputs

    def save_kernels(self) -> None:
        """Writes the kernels that were compiled since they were last written."""
        self._kernels.save()

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
        self._errors.begin()
        profile = self.record.profile_for(shapes)
        expected = self._signature.output_shapes(shapes, self._unit)
        context = self._kernels.make_context(eager=eager or self.record.profiles[profile].fixed)
        if context is None:
            raise self._refusal("TensorRT gives no execution context")
        stream = self._memory.stream
        if profile != context.active_optimization_profile and (
            not context.set_optimization_profile_async(profile, stream)
        ):
            raise self._refusal(f"TensorRT refuses profile {profile}")
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise self._refusal(f"TensorRT refuses shape {shape} for {name}")
        if unknown := context.infer_shapes():
            raise self._refusal(f"TensorRT cannot tell the shapes of {', '.join(unknown)[:200]}")
        for spec in self._signature.outputs:
            shape = tuple(context.get_tensor_shape(spec.name))
            if shape != expected[spec.name]:
                raise BackendError(
                    f"{self.record.graph}: the engine gives {spec.name} the shape {shape}, "
                    f"expected {expected[spec.name]}; build the engines again"
                )
        inputs = {
            spec.name: self._memory.allocate(shapes[spec.name], spec.dtype)
            for spec in self._signature.inputs
            if not is_kv(spec.name)
        }
        outputs = {
            spec.name: self._memory.allocate(expected[spec.name], spec.dtype, volatile=True)
            for spec in self._signature.outputs
            if not is_kv(spec.name)
        }
        places, kv_bytes = place_kv(self._kv_tensors({**shapes, **expected}))
        addresses = {name: buffer.pointer for name, buffer in self._weights.items()}
        addresses |= {name: buffer.pointer for name, buffer in (inputs | outputs).items()}
        addresses |= {name: self._kv.place + place.start for name, place in places.items()}
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise self._refusal(f"TensorRT refuses an address for {name}")
        scratch = max(1, self._needed(context, profile))
        self._scratch.require(scratch)
        context.set_device_memory(self._scratch.pointer, aligned(scratch))
        if hasattr(context, "is_stream_capturable") and not context.is_stream_capturable(stream):
            _log.warning(
                "%s: TensorRT cannot capture this engine as a CUDA graph, each run will launch its "
                "kernels one by one; build it again with `klein-kv build`",
                self.record.graph,
            )
        made = places if self._makes_kv else {}
        return _Execution(context, inputs, outputs, made, kv_bytes, scratch)

    def _kv_tensors(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[TensorSpec, ...]:
        specs = self._signature.outputs if self._makes_kv else self._signature.inputs
        return tuple(
            TensorSpec(spec.name, spec.dtype, shapes[spec.name])
            for spec in specs
            if is_kv(spec.name)
        )

    def _needed(self, context: Any, profile: int) -> int:
        """Bytes of scratch at the shapes that are set."""
        if hasattr(context, "update_device_memory_size_for_shapes"):
            return int(context.update_device_memory_size_for_shapes())
        return int(self._engine.get_device_memory_size_for_profile_v2(profile))

    def _block_of(self, inputs: Mapping[str, DeviceBuffer], execution: _Execution) -> KvBlock:
        """The block that holds the keys and values; a copy where they lie elsewhere."""
        first = inputs["k_ref.0"]
        if execution.kv_source is not None and execution.kv_source() is first:
            assert isinstance(first.block, KvBlock)  # noqa: S101 - or it would not be noted
            return first.block
        tensors = self._kv_tensors({name: x.shape for name, x in inputs.items()})
        places, nbytes = place_kv(tensors)
        block = first.block
        if isinstance(block, KvBlock) and all(
            inputs[name].pointer == block.pointer + place.start for name, place in places.items()
        ):
            execution.kv_source = weakref.ref(first)
            return block
        block = self._kv.take(nbytes)
        self._kv.settle(block)
        for name, place in places.items():
            source = inputs[name]
            self._memory.copy_on_device(block.pointer + place.start, source.pointer, source.nbytes)
        return block

    def _refusal(self, what: str) -> BackendError:
        """What TensorRT did not do, in its own words."""
        return BackendError(f"{self.record.graph}: {what}: {self._errors.reason}")


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
        """A context that brings no scratch of its own; whole-graph capture, where there is such.

        Args:
            eager: compile for a shape before it first runs; else fallback kernels run meanwhile.
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
        """Writes compiled kernels beside the engine, aside first."""
        if self._cache is None:
            return
        memory = self._cache.serialize()
        blob = b"" if memory is None else bytes(memory)  # None: it could not name the device
        if blob in (b"", self._saved):
            return
        self._saved = blob
        partial = self._file.with_name(f".{self._file.name}.partial-{os.getpid()}")
        try:
            partial.write_bytes(blob)
            partial.replace(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            _log.warning(
                "cannot save %s (%s): kernels will be compiled again next time",
                self._file,
                error.strerror,
            )
