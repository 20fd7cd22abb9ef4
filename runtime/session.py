"""A backend under a plan: refuses what cannot fit, makes room in order, takes the times.

`klein-kv plan` and this ask the same `make_plan`: there with a GPU's figures, here with what the
device has free. Where everything fits, it is loaded before the first graph runs, and stays. Else a
component that cannot stay beside the next one is released before that is loaded: the text encoder
before the transformer, and the other way round for the next prompt.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.signature import GraphSet
from klein_kv.errors import ArtifactError, CapacityError, KleinKVError, RequestError
from klein_kv.runtime.backends.backend import Backend, Buffer, GraphMemory, WeightChanges
from klein_kv.runtime.planning.footprint import COMPONENTS, Footprint, component_of
from klein_kv.runtime.planning.memory import reference_budget
from klein_kv.runtime.planning.memory_plan import MemoryPlan, Stage, make_plan, size_text
from klein_kv.runtime.planning.plan_choices import what_fits
from klein_kv.runtime.planning.request import Request, flagship_request
from klein_kv.runtime.timings import (
    COPIES,
    LOADING,
    Span,
    Timings,
    nvtx_ranges,
    timings_from_spans,
)

__all__ = ["Session"]

_log = logging.getLogger(__name__)

_MARGIN = 100
"""One part in so many of a device is left alone, for alignment and the driver."""

_PARTS = {
    "text_encoder": "text encoder",
    "vae": "VAE",
    "kv": "reference K/V",
    "activations": "inputs and outputs",
    "reserved": "reserve",
}
"""Names of `Stage.parts` for people, where they differ."""

FreeSets = Callable[[int, str | None], int]
"""Asked for bytes of kept reference sets, and which set to keep; returns how many it gave up."""


class Session:
    """Runs the graphs of one artifact folder, a request at a time.

    Attributes:
        plan: of the request under way or the last one.
        watch: called with every graph that ran and its outputs.
        make_room: asked for bytes of the device that others of this process hold, where a request
            lacks them; gives up what it can.

    Raises:
        BackendError: nvtx is not installed.
    """

    def __init__(
        self, backend: Backend, manifest: Manifest, graphs: GraphSet, *, nvtx: bool = False
    ) -> None:
        self.backend = backend
        self.plan: MemoryPlan | None = None
        self.watch: Callable[[str, Mapping[str, Buffer]], None] | None = None
        self.make_room: Callable[[int], None] | None = None
        self._config = manifest.config
        self._graphs = graphs
        self._memory: dict[str, GraphMemory] = {}
        self._loaded: set[str] = set()
        self._last = ""  # the graph that ran last, or "" where room must be made before the next
        self._prepared = False
        self._eager = False  # set while warming up
        self._kept_scratch = 0
        self._kept_kv = 0
        self._free: FreeSets = lambda _missing, _keep: 0
        self._keep: str | None = None
        self._spans: list[Span] | None = None
        self._thread = 0  # whose spans are recorded
        self._range: Callable[[str], contextlib.AbstractContextManager[object]] = (
            nvtx_ranges() if nvtx else contextlib.nullcontext
        )

    # The graphs -------------------------------------------------------------------------------

    def run(self, graph: str, inputs: Mapping[str, Buffer]) -> dict[str, Buffer]:
        """See `Backend.run`."""
        stage = None if self.plan is None else self.plan.stage(graph)
        memory = self.graph_memory(graph)
        if stage is not None and graph != self._last and memory.weights and not self._prepared:
            self._make_room(stage)
            if self._eager:
                self._prepare_graph(graph)
        if memory.weights:  # what has none needs no room, nor does what runs after it
            self._last = graph
        with self._loading(graph), self._span(graph):
            outputs = self.backend.run(graph, inputs)
        if stage is not None and memory.keeps_scratch:
            self._kept_scratch = max(self._kept_scratch, stage.passing)
        if self.plan is not None and memory.kv_copies:
            self._kept_kv = max(self._kept_kv, memory.kv_copies * self.plan.kv_bytes)
        if self.watch is not None:
            self.watch(graph, outputs)
        return outputs

    def upload(self, array: NDArray[Any]) -> Buffer:
        """See `Backend.upload`."""
        with self._span(COPIES):
            return self.backend.upload(array)

    def upload_kv(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Buffer]:
        """See `Backend.upload_kv`."""
        with self._span(COPIES):
            return self.backend.upload_kv(arrays)

    def download(self, buffer: Buffer) -> NDArray[Any]:
        """See `Backend.download`."""
        with self._span(COPIES):
            return self.backend.download(buffer)

    def view(self, buffer: Buffer, shape: tuple[int, ...], start: int = 0) -> Buffer:
        """See `Backend.view`."""
        return self.backend.view(buffer, shape, start)

    def assemble(self, shape: tuple[int, ...], parts: Iterable[Buffer]) -> Buffer:
        """See `Backend.assemble`."""
        return self.backend.assemble(shape, parts)

    def release(self, graph: str) -> None:
        """See `Backend.release`."""
        self._loaded.discard(graph)
        self._last, self._prepared = "", False
        if self.graph_memory(graph).kv_copies:
            self._kept_kv = 0
        self.backend.release(graph)

    def replace_weights(self, changes: WeightChanges, nbytes: int) -> None:
        """See `Backend.replace_weights`.

        Raises:
            CapacityError: where weights are mapped files, no memory for the `nbytes` of tensors
                that were the file's own before and are not any more.
        """
        mapped = not self._weights(self._built_graphs())
        if mapped and nbytes > (available := self.backend.available_memory()):
            raise CapacityError(
                f"the adapters change {size_text(nbytes)} of weights, which then have to be in "
                f"memory; {size_text(available)} can be had. Merge them into artifacts of their "
                "own: klein-kv export --lora"
            )
        with self._span(LOADING):
            self.backend.replace_weights(changes)

    def graph_memory(self, graph: str) -> GraphMemory:
        """See `Backend.graph_memory`."""
        if graph not in self._memory:
            self._memory[graph] = self.backend.graph_memory(graph)
        return self._memory[graph]

    def close(self) -> None:
        """See `Backend.close`."""
        self._loaded.clear()
        self.backend.close()

    @property
    def captures(self) -> bool:
        """Whether runs are captured, for which each graph has to run more than once."""
        return any(self.graph_memory(graph).fixed_buffers for graph in self._loaded)

    @property
    def held_bytes(self) -> int:
        """Bytes of weights, scratch, and keys and values of a request; mapped files count none."""
        return self._weights(self._loaded) + self._kept_scratch + self._kept_kv

    # A request --------------------------------------------------------------------------------

    def admit(self, request: Request, free: FreeSets, keep: str | None = None) -> MemoryPlan:
        """Plans a request, or refuses it before any of it is run; graphs then follow the plan.

        `keep` is the digest of the references that the steps need.

        Raises:
            CapacityError: it cannot fit, with the numbers and what would.
        """
        plan = self._make(request, self._capacity(request))
        if not plan.all_fits and self.make_room is not None:
            self.make_room(plan.together - plan.capacity)
            plan = self._make(request, self._capacity(request))
        if not plan.fits:
            freed = free(plan.peak - plan.capacity, keep)
            # What the store gives up may still be in use elsewhere: a device can tell.
            more = 0 if self._on_device(request) else freed
            plan = self._make(request, self._capacity(request) + more)
        if not plan.fits:
            raise CapacityError(self._refusal(plan))
        self.plan, self._free, self._keep = plan, free, keep
        self._last, self._prepared = "", False
        return plan

    def prepare(self, kv: Mapping[str, Buffer] | None = None, *, eager: bool = False) -> None:
        """Loads what the admitted request needs and takes its memory, where all of it fits at once.

        `kv` are the keys and values that the steps start with, where they are known.
        """
        plan = self.plan
        self._eager = eager
        if plan is None or not plan.all_fits or not self._on_device(plan.request):
            return
        stages = plan.request.stages
        self._make_room_for_all(plan)
        with self._span(LOADING):
            for graph in stages:
                known = graph == "cached_step" and "first_step" not in stages
                self._prepare_graph(graph, kv if known else None)
        self._prepared = True

    @contextlib.contextmanager
    def interrupted(self) -> Iterator[None]:
        """Lets other requests be made in the block; the one under way goes on after it."""
        plan, free, keep, eager = self.plan, self._free, self._keep, self._eager
        try:
            yield
        finally:
            if self.plan is not plan:  # there were some: room is made anew
                self.plan, self._free, self._keep, self._eager = plan, free, keep, eager
                self._last, self._prepared = "", False

    def default_reference_budget(self) -> int:
        """Bytes of reference sets that fit beside everything else (`memory.reference_budget`)."""
        built = self._built_graphs()
        weights = self._component_weights(built)
        available = self.backend.available_memory()
        request = flagship_request(self._graphs.variant, self._config)
        request = replace(request, stages=tuple(x for x in request.stages if x in built))
        besides = 0
        if request.stages and any(weights.values()):
            stages = self._make(request, available).stages
            besides = max(stage.passing for stage in stages) + available // _MARGIN
        kv_bytes = self._footprint(request).kv_bytes(request)
        return reference_budget(available, weights, besides, kv_bytes)

    # The plan ---------------------------------------------------------------------------------

    def _make(
        self, request: Request, capacity: int, footprint: Footprint | None = None
    ) -> MemoryPlan:
        return make_plan(
            footprint or self._footprint(request),
            request,
            capacity,
            scratch={g: (n, "engine") for g in request.stages if (n := self._scratch(g, request))},
            loaded={component_of(graph) for graph in self._loaded},
            reserved=capacity // _MARGIN if self._on_device(request) else 0,
            kv_copies=max(self.graph_memory(graph).kv_copies for graph in request.stages),
        )

    def _footprint(self, request: Request) -> Footprint:
        weights = self._component_weights({*request.stages, *self._loaded})
        return Footprint(self._config, self._graphs, weights)

    def _capacity(self, request: Request) -> int:
        """What can be had, and what this pipeline holds already and the plan counts."""
        own = self.held_bytes
        if request.kv_held:
            own += self._footprint(request).kv_bytes(request)
        return self.backend.available_memory() + own

    def _built_graphs(self) -> list[str]:
        """All graphs but those that no engine was built of."""
        built = []
        for graph in self._graphs.files:
            with contextlib.suppress(ArtifactError):
                self.graph_memory(graph)
                built.append(graph)
        return built

    def _component_weights(self, graphs: Collection[str]) -> dict[str, int]:
        return {
            component: self._weights(g for g in graphs if component_of(g) == component)
            for component in COMPONENTS
        }

    def _weights(self, graphs: Iterable[str]) -> int:
        """Bytes of the tensors of these graphs, each once."""
        tensors: dict[Hashable, int] = {}
        for graph in graphs:
            tensors |= self.graph_memory(graph).weights
        return sum(tensors.values())

    def _scratch(self, graph: str, request: Request) -> int | None:
        """What the backend knows of a graph's scratch; what it refuses it will refuse itself."""
        runs = request.shapes(graph, self._config, self._graphs)
        try:
            needs = [self.backend.scratch_bytes(graph, shapes) for shapes in runs]
        except RequestError:
            return None
        return max((need for need in needs if need is not None), default=None)

    def _on_device(self, request: Request) -> bool:
        return any(self.graph_memory(graph).weights for graph in request.stages)

    def _refusal(self, plan: MemoryPlan) -> str:
        worst = max(plan.stages, key=lambda stage: stage.total)
        parts = ", ".join(
            f"{_PARTS.get(part, part)} {size_text(nbytes)}"
            for part, nbytes in worst.parts.items()
            if nbytes
        )
        device = self._on_device(plan.request)

        def other(footprint: Footprint, request: Request) -> MemoryPlan:
            return self._make(request, plan.capacity, footprint)

        choices = what_fits(plan, other, device=device)
        fitting = "; ".join(choice.text for choice in choices) or "nothing that was tried"
        return (
            f"the request needs {size_text(worst.total)} in {worst.name} ({parts}), "
            f"{size_text(plan.capacity)} of {'device ' if device else ''}memory can be had; "
            f"what would fit: {fitting}"
        )

    # Following it -----------------------------------------------------------------------------

    def _make_room(self, stage: Stage) -> None:
        """Releases what does not stay beside one graph, then reference sets, if memory lacks."""
        for graph in self._graphs.files:
            if component_of(graph) not in stage.resident and graph in self._loaded:
                _log.info("%s makes room for %s", graph, stage.name)
                self.release(graph)
        besides = stage.passing
        if stage.name in ("first_step", "encode_references"):
            besides += stage.parts.get("kv", 0)
        keep = None if stage.name == "vae_decoder" else self._keep
        self._free_sets(self._missing({stage.name}, besides), keep)

    def _make_room_for_all(self, plan: MemoryPlan) -> None:
        """Releases what the request does not need, then reference sets, if memory lacks."""
        stages = set(plan.request.stages)
        besides = max(stage.passing for stage in plan.stages)
        besides += 0 if plan.request.kv_held else plan.kv_bytes
        own = {component_of(graph) for graph in stages}
        for graph in sorted(self._loaded):
            if component_of(graph) not in own and self._missing(stages, besides) > 0:
                _log.info("%s makes room for %s", graph, ", ".join(plan.request.stages))
                self.release(graph)
        self._free_sets(self._missing(stages, besides), self._keep)

    def _free_sets(self, missing: int, keep: str | None) -> None:
        if missing > 0:
            self._free(missing, keep)

    def _missing(self, graphs: set[str], besides: int) -> int:
        """Bytes that the device lacks for `besides` and the weights that these graphs load."""
        to_come = self._weights(self._loaded | graphs) - self._weights(self._loaded)
        return to_come + besides - self.backend.available_memory()

    def _prepare_graph(self, graph: str, kv: Mapping[str, Buffer] | None = None) -> None:
        assert self.plan is not None  # noqa: S101 - asked before
        runs = self.plan.request.shapes(graph, self._config, self._graphs)
        with self._loading(graph):
            for shapes in runs:
                self.backend.prepare(graph, shapes, kv, eager=self._eager)

    @contextlib.contextmanager
    def _loading(self, graph: str) -> Iterator[None]:
        """Notes that a graph is loaded; frees what it left if it broke before that."""
        try:
            yield
        except BaseException:
            if graph not in self._loaded:
                with contextlib.suppress(KleinKVError):  # what broke is told
                    self.release(graph)
            raise
        if self.graph_memory(graph).weights:
            self._loaded.add(graph)

    # The times --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def record(self) -> Iterator[Callable[[], Timings]]:
        """Records until the block ends; a call inside another one counts for itself.

        Yields:
            What gives the timings so far; to be called after the last download, so that there is
            nothing left to wait for.
        """
        outer, spans = self._spans, list[Span]()
        self._spans, self._thread = spans, threading.get_ident()
        start = time.perf_counter()
        try:
            yield lambda: timings_from_spans(
                spans, self.backend.elapsed, time.perf_counter() - start
            )
        finally:
            self._spans = outer

    @contextlib.contextmanager
    def _span(self, stage: str) -> Iterator[None]:
        spans = self._spans if threading.get_ident() == self._thread else None
        with self._range(stage):
            if spans is None:
                yield
                return
            start = self.backend.mark()
            yield
            spans.append(Span(stage, start, self.backend.mark()))
