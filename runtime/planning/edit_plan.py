"""`klein-kv plan`: what edits with an artifact folder need of a GPU and of the host.

Only headers and manifests are read, and no GPU is asked: its memory is what the vendor says.
"""

import contextlib
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from klein_kv.artifacts.engines.engine_manifest import ENGINE_MANIFEST
from klein_kv.artifacts.engines.engine_set import EngineSet, open_engines
from klein_kv.artifacts.engines.targets import find_target
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.numbers import PRECISION_FORMATS
from klein_kv.errors import ArtifactError, BuildError, RequestError
from klein_kv.runtime.backends.trt.memory import STAGING_BYTES
from klein_kv.runtime.planning.footprint import (
    Footprint,
    base_footprint,
    component_of,
    file_weights,
)
from klein_kv.runtime.planning.memory import reference_budget
from klein_kv.runtime.planning.memory_plan import RESERVED, MemoryPlan, make_plan
from klein_kv.runtime.planning.plan_choices import Choice, what_fits
from klein_kv.runtime.planning.request import Request, edit_stages, flagship_request

__all__ = ["EditPlan", "PlanOptions", "Plans", "plan_artifacts"]

_HOST_MEMORY = {
    "export": 700_000_000,  # measured at 9B, most of it libraries (docs/checkpoints.md)
    "build, shared weights": 1_700_000_000,  # measured at 9B, recipe `default` (docs/engines.md)
    "run: pinned buffers for uploads": STAGING_BYTES,
}
"""Bytes at the peak; none of it grows with the weights."""


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What to plan; sizes are (width, height) in pixels.

    Attributes:
        gpu: name of a GPU with known figures.
        size: of the output.
        references: numbers of reference images.
        reference_size: of each.
        precisions: of the transformer's block linears: "fp8", "nvfp4", "fp8-weight-only", or the 16
            bits that the artifacts hold, "bf16" or "fp16"; None takes that, fp8 and nvfp4.
        text_precision: of the text encoder's; None takes what the artifacts or the recipes of
            `klein-kv quantize` have beside a precision.
        kv_dtype: "bf16", or "fp8" for graphs that hand keys and values on in eight bits.
        attention: "fp8" for attention in float8, whose keys and values are float8 as well.
        batch: images at once.
        memory: device memory in bytes, in place of the GPU's.
        engines: folder of engines that count; None finds those that serve a request best.
    """

    gpu: str = "rtx5090"
    size: tuple[int, int] = (1024, 1024)
    references: tuple[int, ...] = (0, 1, 2, 3, 4)
    reference_size: tuple[int, int] = (1024, 1024)
    precisions: tuple[str, ...] | None = None
    text_precision: str | None = None
    kv_dtype: str = "bf16"
    attention: str | None = None
    batch: int = 1
    memory: int | None = None
    engines: Path | None = None

    def __post_init__(self) -> None:
        for name, given, known in (
            ("kv_dtype", self.kv_dtype, ("bf16", "fp8")),
            ("attention", self.attention, ("fp8", None)),
        ):
            if given not in known:
                expected = " or ".join(map(repr, known))
                raise RequestError(f"{name} is {given!r}, expected {expected}")
        for name, value, least in (
            ("references", min(self.references, default=0), 0),
            ("memory", self.memory, 1),
            ("batch", self.batch, 1),
        ):
            if value is not None and value < least:
                raise RequestError(f"{name} is {value}, expected {least} or more")


@dataclass(frozen=True, slots=True)
class EditPlan:
    """One line of the plan: a precision and a number of references."""

    first: MemoryPlan  # of a new prompt and new references
    # Of a new prompt and references whose keys and values stayed on the device; None without
    # references, and for plain weights, which keep none.
    again: MemoryPlan | None
    choices: tuple[Choice, ...]  # what would fit instead, where the first does not
    kept_sets: int  # of four 1024x1024 references, whose keys and values stay on the device

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        request, footprint = self.first.request, self.first.footprint
        return {
            "size": [request.width, request.height],
            "references": len(request.references),
            "batch": request.batch,
            "precision": footprint.precisions["transformer"],
            "text_precision": footprint.precisions["text_encoder"],
            "kv_dtype": footprint.graphs.kv_numbers,
            "attention": footprint.graphs.attention or footprint.graphs.dtype,
            "weights": dict(footprint.weights),
            "kv_bytes": self.first.kv_bytes,
            "peak": self.first.peak,
            "fits": self.first.fits,
            "kept_sets": self.kept_sets,
            "first_edit": self.first.to_dict(),
            "repeated_edit": None if self.again is None else self.again.to_dict(),
            "what_fits": [{"change": x.text, "peak": x.plan.peak} for x in self.choices],
        }


@dataclass(frozen=True, slots=True)
class Plans:
    """All that `klein-kv plan` tells."""

    gpu: str
    capacity: int  # bytes of its memory
    edits: tuple[EditPlan, ...]  # by precision, then number of references
    host: dict[str, int]  # bytes of its memory at the peak, by what takes it
    engines: tuple[str, ...] = ()  # what those that were found take, in pixels

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "gpu": self.gpu,
            "capacity": self.capacity,
            "reserved": RESERVED,
            "host": self.host,
            "plans": [edit.to_dict() for edit in self.edits],
            "engines": self.engines,
        }


def plan_artifacts(artifacts: Path, options: PlanOptions) -> Plans:
    """Plans edits with an artifact folder.

    Raises:
        BuildError: an unknown GPU.
        RequestError: a GPU without figures, a size of no whole tokens.
        ArtifactError: the folder is not whole, or there are no engines where some were named.
    """
    manifest = Manifest.load(artifacts, check_files=False)
    target = find_target(options.gpu)
    if target.gpu is None:
        raise RequestError(
            f"the figures of {target.name} are not known; name another GPU, e.g. rtx5090"
        )
    unit = manifest.config.vae.multiple_of
    for what, size in (("size", options.size), ("reference_size", options.reference_size)):
        if any(side < unit or side % unit for side in size):
            raise RequestError(
                f"{what} is {size[0]}x{size[1]}, expected multiples of {unit} pixels"
            )
    base = base_footprint(artifacts, manifest)
    own = () if options.attention else (base.precisions["transformer"],)
    capacity = int(target.gpu.memory * 1e9) if options.memory is None else options.memory
    planner = _Planner(artifacts, manifest, options, capacity, target.sm)
    edits = []
    for precision in options.precisions or (*own, "fp8", "nvfp4"):
        footprint = planner.footprint(base, precision)
        for count in options.references:
            first = planner(footprint, planner.request(count, known=False))
            again = None
            if first.kv_bytes:
                again = planner(footprint, planner.request(count, known=True), first)
            choices = () if first.fits else tuple(what_fits(first, planner))
            edits.append(EditPlan(first, again, choices, planner.kept_sets(footprint)))
    plans = [plan for edit in edits for plan in (edit.first, edit.again) if plan is not None]
    again_loaded = max((sum(plan.loads.values()) for plan in plans if plan.fits), default=0)
    host = _HOST_MEMORY | ({"run: file cache for weights": again_loaded} if again_loaded else {})
    return Plans(target.gpu.name, capacity, tuple(edits), host, tuple(planner.found))


@dataclass(frozen=True, slots=True)
class _Planner:
    """Plans requests for one device, on the engines that would run them."""

    artifacts: Path
    manifest: Manifest
    options: PlanOptions
    capacity: int
    sm: int
    found: dict[str, None] = field(default_factory=dict)  # what the engines take

    def footprint(self, base: Footprint, precision: str) -> Footprint:
        """The model in another precision: from its files where they are there, else from shapes."""
        own, options = base.precisions["transformer"], self.options
        text = options.text_precision
        if text is None:
            # The recipes of `klein-kv quantize` make the text encoder smaller too.
            recipe = {"text_encoder": {"nvfp4": "fp8"}.get(precision, precision)}
            text = self.manifest.precisions.get(precision, recipe).get("text_encoder", own)
        for name in (precision, text):
            if name != own and name not in PRECISION_FORMATS:
                raise RequestError(
                    f"precision is {name!r}, expected one of {own}, {', '.join(PRECISION_FORMATS)} "
                    f"for {self.artifacts}"
                )
        if options.attention is not None and precision == own:
            raise RequestError(
                f"attention is {options.attention!r} and precision {precision!r}: its scales "
                "belong to a quantized precision; name fp8 or nvfp4"
            )
        footprint = base.changed(
            float8_kv=options.kv_dtype == "fp8" or options.attention is not None,
            attention=options.attention,
            transformer=precision,
            text_encoder=text,
        )
        # Every form of keys and values reads the same weights.
        plain = replace(footprint.graphs, kv_dtype=None, attention=None)
        held = file_weights(self.artifacts, self.manifest, plain)
        return replace(footprint, weights={**footprint.weights, **held})

    def request(self, count: int, *, known: bool) -> Request:
        """An edit with so many references, whose keys and values are known or not."""
        return Request(
            height=self.options.size[1],
            width=self.options.size[0],
            references=(self.options.reference_size[::-1],) * count,
            stages=edit_stages(self.manifest.variant, count, known=known),
            batch=self.options.batch,
            kv_held=known,
        )

    def __call__(
        self, footprint: Footprint, request: Request, after: MemoryPlan | None = None
    ) -> MemoryPlan:
        """The plan of a request; of one that follows another."""
        engines = self._engines(footprint)
        scratch: dict[str, tuple[int, str]] = {}
        copies = 0
        for graph in request.stages:
            runs = request.shapes(graph, footprint.config, footprint.graphs)
            shapes = max(runs, key=lambda shapes: sum(map(math.prod, shapes.values())))
            with contextlib.suppress(ArtifactError, RequestError):  # no such engine: an estimate
                folder = engines.choose(graph, shapes)
                scratch[graph] = folder.manifest.record(graph).scratch_for(shapes), folder.path.name
                embedded = folder.manifest.weights == "embedded"
                copies += embedded and component_of(graph) == "transformer"
        if engines.folders:
            self.found[engines.sizes()] = None
        if copies > 1:
            whole = footprint.weights["transformer"] * copies
            footprint = replace(footprint, weights={**footprint.weights, "transformer": whole})
        left = 0 if after is None else max(stage.parts["scratch"] for stage in after.stages)
        return make_plan(footprint, request, self.capacity, scratch=scratch, held_scratch=left)

    def kept_sets(self, footprint: Footprint) -> int:
        """How many sets of four 1024x1024 references stay by default beside everything else."""
        plan = self(footprint, flagship_request(self.manifest.variant, footprint.config))
        if not plan.kv_bytes:
            return 0
        besides = RESERVED + max(stage.passing for stage in plan.stages)
        budget = reference_budget(self.capacity, plan.footprint.weights, besides, plan.kv_bytes)
        return budget // plan.kv_bytes

    def _engines(self, footprint: Footprint) -> EngineSet:
        """Those for this device; without any, every choice is an `ArtifactError`."""
        graphs, folder = footprint.graphs, self.options.engines
        try:
            return open_engines(self.artifacts, self.manifest, graphs, folder).for_sm(self.sm)
        except (ArtifactError, BuildError, KeyError):
            if folder is not None and not (folder / ENGINE_MANIFEST).exists():
                raise
            return EngineSet(())
