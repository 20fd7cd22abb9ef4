"""`klein-kv plan`: what edits with an artifact folder need of a GPU and of the host.

Only headers and manifests are read, and no GPU is asked: its memory is what the vendor says.
"""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from klein_kv.artifacts.engines.engine_manifest import ENGINE_MANIFEST
from klein_kv.artifacts.engines.engine_set import EngineFolder, EngineSet, open_engines
from klein_kv.artifacts.engines.targets import find_target
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.numbers import PRECISION_FORMATS
from klein_kv.artifacts.signature import GraphSet, KVFormat
from klein_kv.errors import ArtifactError, BuildError, RequestError
from klein_kv.runtime.planning.footprint import (
    Footprint,
    base_footprint,
    component_bytes,
    component_of,
)
from klein_kv.runtime.planning.host_needs import HostNeed, host_needs
from klein_kv.runtime.planning.memory import reference_budget
from klein_kv.runtime.planning.memory_plan import RESERVED, MemoryPlan, make_plan
from klein_kv.runtime.planning.plan_choices import Choice, what_fits
from klein_kv.runtime.planning.request import Request, edit_stages, flagship_request

__all__ = ["EditPlan", "PlanOptions", "Plans", "plan_artifacts"]


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What to plan.

    Attributes:
        gpu: name of a GPU with known figures.
        size: (width, height) of the output in pixels.
        references: numbers of reference images.
        reference_size: (width, height) of each.
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
        if self.kv_dtype not in ("bf16", "fp8"):
            raise RequestError(f"kv_dtype is {self.kv_dtype!r}, expected 'bf16' or 'fp8'")
        if self.attention not in (None, "fp8"):
            raise RequestError(f"attention is {self.attention!r}, expected 'fp8' or None")
        if min(self.references, default=0) < 0:
            raise RequestError(f"references is {min(self.references)}, expected 0 or more")
        for name in ("memory", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"{name} is {value}, expected 1 or more")


@dataclass(frozen=True, slots=True)
class EditPlan:
    """One line of the plan: a precision and a number of references.

    Attributes:
        first: a new prompt and new references.
        again: a new prompt and references whose keys and values stayed on the device; None
            without references, and for plain weights, which keep none.
        choices: what would fit instead, where the first does not.
        kept_sets: sets of four 1024x1024 references whose keys and values stay on the device.
    """

    first: MemoryPlan
    again: MemoryPlan | None
    choices: tuple[Choice, ...]
    kept_sets: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        request, footprint = self.first.request, self.first.footprint
        return {
            "size": [request.width, request.height],
            "references": len(request.references),
            "batch": request.batch,
            "precision": footprint.precision,
            "text_precision": footprint.text_precision,
            "kv_dtype": footprint.kv_dtype,
            "attention": footprint.attention or footprint.dtype,
            "weights": dict(footprint.weights),
            "kv_bytes": self.first.kv_bytes,
            "peak": self.first.peak,
            "fits": self.first.fits,
            "kept_sets": self.kept_sets,
            "first_edit": self.first.to_dict(),
            "repeated_edit": None if self.again is None else self.again.to_dict(),
            "what_fits": [choice.to_dict() for choice in self.choices],
        }


@dataclass(frozen=True, slots=True)
class Plans:
    """All that `klein-kv plan` tells.

    Attributes:
        gpu: its name, for people.
        capacity: bytes of its memory.
        edits: by precision, then number of references.
        host: what the host needs.
    """

    gpu: str
    capacity: int
    edits: tuple[EditPlan, ...]
    host: tuple[HostNeed, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "gpu": self.gpu,
            "capacity": self.capacity,
            "reserved": RESERVED,
            "plans": [edit.to_dict() for edit in self.edits],
            "host": [need._asdict() for need in self.host],
        }


def plan_artifacts(artifacts: Path, options: PlanOptions) -> Plans:
    """Plans edits with an artifact folder.

    Args:
        artifacts: what `klein-kv export` wrote; only headers and manifests are read.
        options: what to plan.

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
    base = base_footprint(artifacts, manifest)
    usual = ("fp8", "nvfp4") if options.attention else (base.precision, "fp8", "nvfp4")
    capacity = int(target.gpu.memory * 1e9) if options.memory is None else options.memory
    planner = _Planner(artifacts, manifest, capacity, target.sm, options.engines)
    edits = []
    for precision in options.precisions or usual:
        footprint = _footprint(artifacts, manifest, base, precision, options)
        for count in options.references:
            first = planner(footprint, _request(manifest, options, count, known=False))
            again = None
            if first.kv_bytes:
                again = planner(footprint, _request(manifest, options, count, known=True), first)
            choices = () if first.fits else tuple(what_fits(first, planner))
            edits.append(EditPlan(first, again, choices, planner.kept_sets(footprint)))
    plans = [plan for edit in edits for plan in (edit.first, edit.again) if plan is not None]
    host = host_needs(artifacts, manifest, plans)
    return Plans(target.gpu.name, capacity, tuple(edits), host)


def _footprint(
    artifacts: Path, manifest: Manifest, base: Footprint, precision: str, options: PlanOptions
) -> Footprint:
    """The model in another precision: from its files where they are there, else from shapes."""
    quantized = precision in PRECISION_FORMATS
    text = options.text_precision
    if text is None:
        # The recipes of `klein-kv quantize` make the text encoder smaller too.
        usual = {"nvfp4": "fp8"}.get(precision, precision)
        networks = manifest.precisions.get(precision, {"text_encoder": usual} if quantized else {})
        text = networks.get("text_encoder", base.precision)
    for name in (precision, text):
        if name != base.precision and name not in PRECISION_FORMATS:
            raise RequestError(
                f"precision is {name!r}, expected one of {base.precision}, "
                f"{', '.join(PRECISION_FORMATS)} for {artifacts}"
            )
    if options.attention is not None and not quantized:
        raise RequestError(
            f"attention is {options.attention!r} and precision {precision!r}: its scales belong to "
            "a quantized precision; name fp8 or nvfp4"
        )
    packed = options.kv_dtype == "fp8" or options.attention is not None
    footprint = base.quantized(precision, text)
    weights = dict(footprint.weights)
    for component, name in (("transformer", precision), ("text_encoder", text)):
        files = GraphSet(manifest.variant, manifest.dtype, quantized=((component, name),)).files
        own = {graph: file for graph, file in files.items() if component_of(graph) == component}
        if name in PRECISION_FORMATS and all(file in manifest.files for file in own.values()):
            weights[component] = component_bytes(artifacts, manifest, component, own, base.dtype)
    return replace(
        footprint,
        weights=weights,
        kv_dtype=KVFormat.FP8_PER_HEAD if packed else base.kv_dtype,
        attention=options.attention,
    )


def _request(manifest: Manifest, options: PlanOptions, count: int, *, known: bool) -> Request:
    unit = manifest.config.vae.multiple_of
    for what, size in (("size", options.size), ("reference_size", options.reference_size)):
        if any(side < unit or side % unit for side in size):
            raise RequestError(
                f"{what} is {size[0]}x{size[1]}, expected multiples of {unit} pixels"
            )
    return Request(
        height=options.size[1],
        width=options.size[0],
        references=(options.reference_size[::-1],) * count,
        stages=edit_stages(manifest.variant, count, known=known),
        batch=options.batch,
        kv_held=known,
    )


@dataclass(frozen=True, slots=True)
class _Planner:
    """Plans requests for one device, on the engines that would run them."""

    artifacts: Path
    manifest: Manifest
    capacity: int
    sm: int
    folder: Path | None

    def __call__(
        self, footprint: Footprint, request: Request, after: MemoryPlan | None = None
    ) -> MemoryPlan:
        """The plan of a request; of one that follows another."""
        engines = self._engines(footprint)
        scratch: dict[str, tuple[int, str]] = {}
        copies = 0
        for graph in request.stages:
            shapes = self._shapes(graph, footprint, request)
            folder = _choose(engines, graph, shapes)
            if folder is not None:
                scratch[graph] = folder.manifest.record(graph).scratch_for(shapes), folder.path.name
                if folder.manifest.weights == "embedded" and component_of(graph) == "transformer":
                    copies += 1
        if copies > 1:
            embedded = footprint.weights["transformer"] * copies
            footprint = replace(footprint, weights={**footprint.weights, "transformer": embedded})
        left = 0 if after is None else max(stage.parts["scratch"] for stage in after.stages)
        return make_plan(
            footprint,
            request,
            self.capacity,
            scratch=scratch,
            fixed_buffers=True,
            held_scratch=left,
        )

    def kept_sets(self, footprint: Footprint) -> int:
        """How many sets of four 1024x1024 references stay by default beside everything else."""
        request = flagship_request(self.manifest.variant, footprint.config)
        plan = self(footprint, request)
        if not plan.kv_bytes:
            return 0
        besides = RESERVED + max(stage.passing for stage in plan.stages)
        budget = reference_budget(self.capacity, plan.footprint.weights, besides, plan.kv_bytes)
        return budget // plan.kv_bytes

    def _engines(self, footprint: Footprint) -> EngineSet | None:
        graphs = _graphs(self.manifest, footprint)
        try:
            return open_engines(self.artifacts, self.manifest, graphs, self.folder).for_sm(self.sm)
        except (ArtifactError, BuildError, KeyError):
            if self.folder is not None and not (self.folder / ENGINE_MANIFEST).exists():
                raise
            return None

    def _shapes(
        self, graph: str, footprint: Footprint, request: Request
    ) -> dict[str, tuple[int, ...]]:
        """Inputs of the largest run."""
        inputs = _graphs(self.manifest, footprint).signature(graph, footprint.config).inputs
        runs = [
            {spec.name: spec.concrete(sizes) for spec in inputs}
            for sizes in request.runs(graph, footprint.config)
        ]
        return max(runs, key=lambda shapes: sum(map(math.prod, shapes.values())))


def _choose(
    engines: EngineSet | None, graph: str, shapes: Mapping[str, tuple[int, ...]]
) -> EngineFolder | None:
    """The engine that would run a graph, where there is one."""
    if engines is not None:
        with contextlib.suppress(ArtifactError, RequestError):
            return engines.choose(graph, shapes)
    return None


def _graphs(manifest: Manifest, footprint: Footprint) -> GraphSet:
    """The graphs that compute in the precisions of a footprint."""
    networks = {"text_encoder": footprint.text_precision, "transformer": footprint.precision}
    quantized = tuple((part, name) for part, name in networks.items() if name in PRECISION_FORMATS)
    kv = None
    if footprint.kv_dtype == KVFormat.FP8_PER_HEAD:
        kv = (
            KVFormat.FP8_CONSTANT
            if footprint.precision in PRECISION_FORMATS
            else KVFormat.FP8_PER_HEAD
        )
    return GraphSet(manifest.variant, manifest.dtype, kv, quantized, footprint.attention)
