"""A backend that does what the memory plan says: refuses what cannot fit, and makes room in order.

`klein-kv plan` and this ask the same `make_plan`: there with a GPU's figures, here with what the
device has free. A component that cannot stay beside the next one is released before that is loaded:
the text encoder before the transformer, and the other way round for the next prompt.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from klein_kv.config import dtype_name
from klein_kv.errors import ArtifactError, CapacityError
from klein_kv.manifest import Manifest
from klein_kv.runtime.backend import Backend, Buffer, GraphMemory
from klein_kv.runtime.memory_plan import (
    COMPONENTS,
    Footprint,
    MemoryPlan,
    Request,
    Stage,
    component_of,
    make_plan,
    size_text,
)
from klein_kv.runtime.plan_choices import what_fits
from klein_kv.runtime.scratch import load_vae_shapes
from klein_kv.signature import GraphSet

__all__ = ["PlannedBackend"]

_log = logging.getLogger(__name__)

_MARGIN = 100
"""One part in so many of a device is left alone: what alignment and the driver take is not known
exactly."""

_PARTS = {
    "text_encoder": "text encoder",
    "transformer": "transformer",
    "vae": "VAE",
    "kv": "reference K/V",
    "scratch": "scratch",
    "activations": "inputs and outputs",
    "images": "images",
    "reserved": "reserve",
}


class PlannedBackend:
    """Runs graphs on `inner` under a plan.

    On a device, one request at a time: each `admit` replaces the plan before it.

    Args:
        inner: what runs the graphs.
        artifacts: the artifact folder.
        manifest: its manifest.
        graphs: which of its graphs `inner` runs.

    Attributes:
        inner: see above.
        plan: of the request under way or the last one.
    """

    def __init__(
        self, inner: Backend, artifacts: Path, manifest: Manifest, graphs: GraphSet
    ) -> None:
        self.inner = inner
        self.name = inner.name
        self.plan: MemoryPlan | None = None
        self._artifacts = artifacts
        self._manifest = manifest
        self._graphs = graphs
        self._memory: dict[str, GraphMemory] = {}
        self._vae_shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        self._sums: dict[frozenset[str], int] = {}
        self._loaded: set[str] = set()
        self._last = ""
        self._kept_scratch = 0
        self._free: Callable[[int, str | None], int] = lambda _missing, _keep: 0
        self._keep: str | None = None
        self._lock = threading.RLock()

    def admit(
        self,
        request: Request,
        free: Callable[[int, str | None], int],
        keep: str | None = None,
    ) -> MemoryPlan:
        """Plans a request, or refuses it before any of it is run.

        Args:
            request: what is to be made.
            free: asked for bytes that are missing, and what to keep; returns how many it gave up.
            keep: digest of the references that the steps need.

        Returns:
            The plan that the graphs run under from now on.

        Raises:
            CapacityError: it cannot fit, with the numbers and what would.
        """
        with self._lock:
            plan = self._make(request, self._capacity(request))
            if not plan.fits:
                freed = free(plan.peak - plan.capacity, keep)
                # What the store gives up may still be in use elsewhere: a device can tell.
                more = 0 if self._on_device(request) else freed
                plan = self._make(request, self._capacity(request) + more)
            if not plan.fits:
                raise CapacityError(self._refusal(plan))
            self.plan, self._free, self._keep, self._last = plan, free, keep, ""
            return plan

    def run(self, graph: str, inputs: Mapping[str, Buffer]) -> dict[str, Buffer]:
        stage = None if self.plan is None else self.plan.stage(graph)
        if self.graph_memory(graph).weights:
            with self._lock:
                if stage is not None and graph != self._last:  # a loop's step costs nothing here
                    self._make_room(stage)
                    self._last = graph
                outputs = self.inner.run(graph, inputs)
                self._loaded.add(graph)
                return outputs
        outputs = self.inner.run(graph, inputs)
        if stage is not None and self.graph_memory(graph).keeps_scratch:
            self._kept_scratch = max(self._kept_scratch, _passing(stage))
        return outputs

    def upload(self, array: NDArray[Any]) -> Buffer:
        return self.inner.upload(array)

    def download(self, buffer: Buffer) -> NDArray[Any]:
        return self.inner.download(buffer)

    def view(self, buffer: Buffer, shape: tuple[int, ...]) -> Buffer:
        return self.inner.view(buffer, shape)

    def release(self, graph: str) -> None:
        with self._lock:
            self._loaded.discard(graph)
            self._last = ""
            self.inner.release(graph)

    def available_memory(self) -> int:
        return self.inner.available_memory()

    def graph_memory(self, graph: str) -> GraphMemory:
        if graph not in self._memory:
            self._memory[graph] = self.inner.graph_memory(graph)
        return self._memory[graph]

    def component_weights(self) -> dict[str, int]:
        """Bytes of each component's weights on the device, loaded or not; 0 for mapped files."""
        graphs: dict[str, set[str]] = {component: set() for component in COMPONENTS}
        for graph in self._graphs.files:
            with contextlib.suppress(ArtifactError):  # an engine that was not built
                self.graph_memory(graph)
                graphs[component_of(graph)].add(graph)
        return {component: self._weights(found) for component, found in graphs.items()}

    def _on_device(self, request: Request) -> bool:
        return any(self.graph_memory(graph).weights for graph in request.stages)

    def _weights(self, graphs: Iterable[str]) -> int:
        """Bytes of the tensors of these graphs, each once."""
        chosen = frozenset(graphs)
        if chosen not in self._sums:
            held: dict[Hashable, int] = {}
            for graph in chosen:
                held |= self.graph_memory(graph).weights
            self._sums[chosen] = sum(held.values())
        return self._sums[chosen]

    def _capacity(self, request: Request) -> int:
        """What can be had, and what this pipeline holds already and the plan counts."""
        held = self._weights(self._loaded) + self._kept_scratch
        if request.kv_held:
            held += self._footprint(request).kv_bytes(request)
        return self.inner.available_memory() + held

    def _footprint(self, request: Request) -> Footprint:
        manifest, graphs = self._manifest, {*request.stages, *self._loaded}
        weights = {
            component: self._weights(g for g in graphs if component_of(g) == component)
            for component in COMPONENTS
        }
        if not self._vae_shapes:
            self._vae_shapes = load_vae_shapes(self._artifacts, self._graphs.files)
        precision = dtype_name(manifest.dtype)
        return Footprint(
            config=manifest.config,
            dtype=manifest.dtype,
            weights=weights,
            vae_shapes=self._vae_shapes,
            precision=self._graphs.precision or precision,
            text_precision=dict(self._graphs.quantized).get("text_encoder", precision),
            kv_dtype=self._graphs.kv_numbers,
        )

    def _make(
        self, request: Request, capacity: int, footprint: Footprint | None = None
    ) -> MemoryPlan:
        scratch = {
            graph: (memory.scratch, "engine")
            for graph in request.stages
            if (memory := self.graph_memory(graph)).scratch is not None
        }
        return make_plan(
            footprint or self._footprint(request),
            request,
            capacity,
            scratch=scratch,
            loaded={component_of(graph) for graph in self._loaded},
            reserved=capacity // _MARGIN if self._on_device(request) else 0,
        )

    def _make_room(self, stage: Stage) -> None:
        for graph in self._graphs.files:
            if component_of(graph) not in stage.resident:
                if graph in self._loaded:
                    _log.info("%s makes room for %s", graph, stage.name)
                self.release(graph)
        needed = self._weights(self._loaded | {stage.name}) - self._weights(self._loaded)
        needed += _passing(stage)
        if stage.name in ("first_step", "encode_references"):
            needed += stage.parts.get("kv", 0)
        missing = needed - self.inner.available_memory()
        if missing > 0:
            self._free(missing, None if stage.name == "vae_decoder" else self._keep)

    def _refusal(self, plan: MemoryPlan) -> str:
        worst = max(plan.stages, key=lambda stage: stage.total)
        parts = ", ".join(
            f"{_PARTS[part]} {size_text(nbytes)}" for part, nbytes in worst.parts.items() if nbytes
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


def _passing(stage: Stage) -> int:
    """Bytes of a stage that are neither weights nor keys and values."""
    return sum(stage.parts.get(part, 0) for part in ("scratch", "activations", "images"))
