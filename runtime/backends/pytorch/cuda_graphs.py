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

    `kv_names` are inputs that change once per request at most: keys and values, of batch 1.
    """

    def __init__(
        self,
        function: Graph,
        kv_names: list[str],
        capture: Callable[[Callable[[], Tensors]], tuple[Replay, Tensors]],
    ) -> None:
        self._function = function
        self._kv_names = frozenset(kv_names)
        self._capture = capture
        self._shapes: OrderedDict[Shapes, _Shape] = OrderedDict()
        self._place: Tensors = {}  # of keys and values, flat, as large as the largest so far
        self._held: dict[str, weakref.ref[torch.Tensor]] = {}

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> Tensors:
        """Runs, captures or replays; outputs are the caller's own."""
        kv = self._hold({name: x for name, x in inputs.items() if name in self._kv_names})
        key: Shapes = tuple(sorted((name, tuple(x.shape)) for name, x in inputs.items()))
        shape = self._shapes.get(key)
        if shape is None:
            small = {
                name: x.clone(memory_format=torch.contiguous_format)
                for name, x in inputs.items()
                if name not in kv
            }
            first = self._function(small | kv)
            if len(self._shapes) == _MOST_SHAPES:
                self._shapes.popitem(last=False)
            self._shapes[key] = _Shape(small)
            return first
        self._shapes.move_to_end(key)
        for name, buffer in shape.inputs.items():
            buffer.copy_(inputs[name], non_blocking=True)
        if shape.captured is None:
            step_inputs = shape.inputs | kv
            shape.captured = self._capture(lambda: self._function(step_inputs))
            _log.info("captured a step, the graph of %d shapes", len(self._shapes))
        replay, outputs = shape.captured
        replay()
        # The next replay writes to the same memory.
        return {name: output.clone() for name, output in outputs.items()}

    def _hold(self, kv: Tensors) -> Tensors:
        """Keys and values in their place; copied there unless these very tensors were the last."""
        places = self._place
        if any(name not in places or x.numel() > places[name].numel() for name, x in kv.items()):
            self._held.clear()
            self._shapes.clear()  # their graphs read the former place
            self._place.clear()  # before the new one is made: both may not fit
            for name, x in kv.items():
                self._place[name] = torch.empty(x.numel(), dtype=x.dtype, device=x.device)
        views = {name: self._place[name][: x.numel()].view(x.shape) for name, x in kv.items()}
        for name, x in kv.items():
            last = self._held.get(name)
            if last is None or last() is not x:
                views[name].copy_(x, non_blocking=True)
                self._held[name] = weakref.ref(x)
        return views
