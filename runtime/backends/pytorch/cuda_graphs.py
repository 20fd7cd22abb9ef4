"""Steps replayed as CUDA graphs: one launch instead of a thousand.

A captured graph reads and writes fixed addresses. Small inputs are copied into buffers of its own
before each replay. Keys and values are gigabytes, so there is one place for them, which every
graph was captured on; a request's are copied there once, and not even once where the same set is
there already from the request before. (Capturing on a request's own keys and values would save
that copy and a second place, but a graph would be captured anew for every set of references.)

The first run at a shape is eager, on those same buffers: it compiles kernels and creates what
capture may not create. The second run captures, which waits for the device once; it and all later
ones replay.
"""

import logging
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from klein_kv.runtime.backends.pytorch.graphs import Graph

__all__ = ["CudaCapture", "StepGraphs"]

_log = logging.getLogger(__name__)
_MOST_SHAPES = 16

Tensors = dict[str, torch.Tensor]
Shapes = tuple[tuple[str, tuple[int, ...]], ...]
Replay = Callable[[], None]
"""Enqueues captured work on the current stream."""


class CudaCapture:
    """Captures work on one GPU; all graphs share a pool of memory, since none run at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            # Of its own: torch's default for captures is on the first GPU that captured.
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, work: Callable[[], Tensors]) -> tuple[Replay, Tensors]:
        """Captures without running: what replays the work, and the tensors that it writes."""
        graph = torch.cuda.CUDAGraph()
        # "thread_local": other threads may allocate meanwhile.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            outputs = work()
        return graph.replay, outputs


@dataclass(slots=True)
class _Shape:
    """Buffers of one combination of input shapes, and what replays it once it is captured."""

    inputs: Tensors
    captured: tuple[Replay, Tensors] | None = None


class StepGraphs:
    """A step graph that replays what it captured.

    Args:
        function: the graph, computed eagerly or by compiled blocks.
        kv_names: inputs that change once per request at most: keys and values, of batch 1.
        capture: what captures: `CudaCapture`.
    """

    def __init__(
        self,
        function: Graph,
        kv_names: list[str],
        capture: Callable[[Callable[[], Tensors]], tuple[Replay, Tensors]],
    ) -> None:
        self._function = function
        self._kv = _KvPlace(kv_names)
        self._capture = capture
        self._shapes: OrderedDict[Shapes, _Shape] = OrderedDict()

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> Tensors:
        """Runs, captures or replays; outputs are the caller's own."""
        if self._kv.hold(inputs):
            self._shapes.clear()  # their graphs read the former place
        key: Shapes = tuple(sorted((name, tuple(x.shape)) for name, x in inputs.items()))
        shape = self._shapes.get(key)
        if shape is None:
            return self._first(key, inputs)
        self._shapes.move_to_end(key)
        for name, buffer in shape.inputs.items():
            buffer.copy_(inputs[name], non_blocking=True)
        if shape.captured is None:
            step_inputs = shape.inputs | self._kv.views(inputs)
            shape.captured = self._capture(lambda: self._function(step_inputs))
            _log.info("captured a step, the graph of %d shapes", len(self._shapes))
        replay, outputs = shape.captured
        replay()
        # The next replay writes to the same memory.
        return {name: output.clone() for name, output in outputs.items()}

    def _first(self, key: Shapes, inputs: Mapping[str, torch.Tensor]) -> Tensors:
        small = {
            name: x.clone(memory_format=torch.contiguous_format)
            for name, x in inputs.items()
            if name not in self._kv.names
        }
        outputs = self._function(small | self._kv.views(inputs))
        if len(self._shapes) == _MOST_SHAPES:
            self._shapes.popitem(last=False)
        self._shapes[key] = _Shape(small)
        return outputs


class _KvPlace:
    """Memory for the keys and values of one request, as large as the largest so far."""

    def __init__(self, names: list[str]) -> None:
        self.names = frozenset(names)
        self._buffers: dict[str, torch.Tensor] = {}  # flat
        self._held: dict[str, weakref.ref[torch.Tensor]] = {}

    def hold(self, inputs: Mapping[str, torch.Tensor]) -> bool:
        """Copies keys and values in, unless these very tensors were the last.

        Returns:
            Whether the place moved.
        """
        kv = {name: x for name, x in inputs.items() if name in self.names}
        moved = any(
            name not in self._buffers or self._buffers[name].numel() < x.numel()
            for name, x in kv.items()
        )
        if moved:
            self._held.clear()
            self._buffers.clear()  # before the new ones are made: both may not fit
            for name, x in kv.items():
                self._buffers[name] = torch.empty(x.numel(), dtype=x.dtype, device=x.device)
        for name, x in kv.items():
            last = self._held.get(name)
            if last is None or last() is not x:
                self._view(name, x).copy_(x, non_blocking=True)
                self._held[name] = weakref.ref(x)
        return moved

    def views(self, inputs: Mapping[str, torch.Tensor]) -> Tensors:
        """The place, in the shapes of these inputs."""
        return {name: self._view(name, x) for name, x in inputs.items() if name in self.names}

    def _view(self, name: str, like: torch.Tensor) -> torch.Tensor:
        return self._buffers[name][: math.prod(like.shape)].view(like.shape)
