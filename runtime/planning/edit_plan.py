"""`klein-kv plan`: what edits with an artifact folder need of a GPU and of the host.

Only headers and manifests are read, and no GPU is asked: the plan is that of its vendor's figures.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from klein_kv.artifacts.config import ITEM_SIZE, dtype_name
from klein_kv.artifacts.engine_manifest import ENGINE_MANIFEST
from klein_kv.artifacts.engine_set import EngineFolder, EngineSet, open_engines
from klein_kv.artifacts.manifest import Manifest, graph_weights
from klein_kv.artifacts.numbers import PRECISION_FORMATS
from klein_kv.artifacts.signature import KV_FLOAT8, KV_STATIC_FLOAT8, GraphSet
from klein_kv.artifacts.targets import Gpu, find_target
from klein_kv.artifacts.weights import WeightRef
from klein_kv.errors import ArtifactError, BuildError, RequestError
from klein_kv.runtime.planning.host_needs import HostNeed, host_needs
from klein_kv.runtime.planning.latency import Latency, estimate_latency
from klein_kv.runtime.planning.memory import reference_budget
from klein_kv.runtime.planning.memory_plan import (
    COMPONENTS,
    RESERVED,
    Footprint,
    MemoryPlan,
    Request,
    component_of,
    edit_stages,
    flagship_request,
    make_plan,
)
from klein_kv.runtime.planning.plan_choices import Choice, what_fits
from klein_kv.runtime.planning.scratch import load_vae_shapes

__all__ = ["EditPlan", "PlanOptions", "Plans", "base_footprint", "plan_artifacts"]


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
        steps: denoising steps.
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
    steps: int = 4
    memory: int | None = None
    engines: Path | None = None

    def __post_init__(self) -> None:
        if self.kv_dtype not in ("bf16", "fp8"):
            raise RequestError(f"kv_dtype is {self.kv_dtype!r}, expected 'bf16' or 'fp8'")
        if self.attention not in (None, "fp8"):
            raise RequestError(f"attention is {self.attention!r}, expected 'fp8' or None")
        if min(self.references, default=0) < 0:
            raise RequestError(f"references is {min(self.references)}, expected 0 or more")
        for name, least in (("steps", 1), ("memory", 1), ("batch", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise RequestError(f"{name} is {value}, expected {least} or more")


@dataclass(frozen=True, slots=True)
class EditPlan:
    """One line of the plan: a precision and a number of references.

    Attributes:
        first: a new prompt and new references.
        again: a new prompt and references whose keys and values stayed on the device; None
            without references, and for plain weights, which keep none.
        first_time: how long the first takes.
        again_time: how long the second takes.
        choices: what would fit instead, where the first does not.
        kept_sets: sets of four 1024x1024 references whose keys and values stay on the device.
    """

    first: MemoryPlan
    again: MemoryPlan | None
    first_time: Latency
    again_time: Latency | None
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
            "first_edit": self.first.to_dict() | {"latency": self.first_time.to_dict()},
            "repeated_edit": None
            if self.again is None or self.again_time is None
            else self.again.to_dict() | {"latency": self.again_time.to_dict()},
            "what_fits": [choice.to_dict() for choice in self.choices],
        }


@dataclass(frozen=True, slots=True)
class Plans:
    """All that `klein-kv plan` tells."""

    gpu: Gpu
    capacity: int
    steps: int
    edits: tuple[EditPlan, ...]
    host: tuple[HostNeed, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "gpu": self.gpu.name,
            "capacity": self.capacity,
            "reserved": RESERVED,
            "steps": self.steps,
            "plans": [edit.to_dict() for edit in self.edits],
            "host": [need.to_dict() for need in self.host],
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
    precisions = options.precisions or (base.precision, "fp8", "nvfp4")
    if options.attention is not None:
        precisions = options.precisions or ("fp8", "nvfp4")
    capacity = int(target.gpu.memory * 1e9) if options.memory is None else options.memory
    planner = _Planner(artifacts, manifest, capacity, target.sm, options.engines)
    edits = []
    for precision in precisions:
        footprint = _footprint(artifacts, manifest, base, precision, options)
        for count in options.references:
            requests = [_request(manifest, options, count, known) for known in (False, True)]
            edits.append(_edit(planner, footprint, requests, options.steps, target.gpu))
    plans = [plan for edit in edits for plan in (edit.first, edit.again) if plan is not None]
    used = {
        built.path: built
        for plan in plans
        for built in planner.engines_of(plan.footprint, plan.request).values()
    }
    host = host_needs(artifacts, manifest, list(used.values()), plans)
    return Plans(target.gpu, capacity, options.steps, tuple(edits), tuple(host))


def base_footprint(artifacts: Path, manifest: Manifest) -> Footprint:
    """The exported model in 16 bits, as GPUs run it.

    Args:
        artifacts: the folder; float32 is planned as if it had been exported in bfloat16.
        manifest: its manifest.
    """
    dtype = "bfloat16" if manifest.dtype == "float32" else manifest.dtype
    precision = dtype_name(dtype)
    files = manifest.graphs.files
    return Footprint(
        config=manifest.config,
        dtype=dtype,
        weights={
            component: _component_bytes(artifacts, manifest, component, files, dtype)
            for component in COMPONENTS
        },
        vae_shapes=load_vae_shapes(artifacts, files),
        precision=precision,
        text_precision=precision,
        kv_dtype=dtype,
    )


def _component_bytes(
    artifacts: Path, manifest: Manifest, component: str, files: Mapping[str, str], dtype: str
) -> int:
    """Bytes of the tensors that a component's graphs read, each once, in a type for the floats."""
    held: dict[WeightRef, int] = {}
    for graph, file in files.items():
        if component_of(graph) == component:
            for ref in graph_weights(artifacts, file).values():
                held[ref] = ref.nbytes
                if ref.dtype == manifest.dtype:
                    held[ref] = ref.nbytes * ITEM_SIZE[dtype] // ITEM_SIZE[ref.dtype]
    return sum(held.values())


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
    found = replace(
        base.quantized(precision, text),
        kv_dtype=KV_FLOAT8 if packed else base.kv_dtype,
        attention=options.attention,
    )
    weights = dict(found.weights)
    for component, name in (("transformer", precision), ("text_encoder", text)):
        files = GraphSet(manifest.variant, manifest.dtype, quantized=((component, name),)).files
        own = {graph: file for graph, file in files.items() if component_of(graph) == component}
        if name in PRECISION_FORMATS and all(file in manifest.files for file in own.values()):
            weights[component] = _component_bytes(artifacts, manifest, component, own, base.dtype)
    return replace(found, weights=weights)


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
        engines = self.engines_of(footprint, request)
        scratch = {
            graph: (built.manifest.record(graph).scratch_for(shapes), built.path.name)
            for graph, built in engines.items()
            for shapes in self._shapes(graph, footprint, request)[:1]
        }
        copies = sum(
            built.manifest.weights == "embedded" and component_of(graph) == "transformer"
            for graph, built in engines.items()
        )
        if copies > 1:
            held = footprint.weights["transformer"] * copies
            footprint = replace(footprint, weights={**footprint.weights, "transformer": held})
        left = max((stage.parts["scratch"] for stage in after.stages), default=0) if after else 0
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
        flagship = footprint.kv_bytes(request) if self.manifest.variant == "kv" else 0
        if not flagship:
            return 0
        plan = self(footprint, request)
        passing = ("reserved", "scratch", "activations", "images")
        besides = max(sum(stage.parts.get(part, 0) for part in passing) for stage in plan.stages)
        budget = reference_budget(self.capacity, plan.footprint.weights, besides, flagship)
        return budget // flagship

    def engines_of(self, footprint: Footprint, request: Request) -> dict[str, EngineFolder]:
        """Engines by graph, where there are such."""
        engines = self._engines(footprint)
        found = {}
        for graph in request.stages if engines is not None else ():
            for shapes in self._shapes(graph, footprint, request)[:1]:
                with contextlib.suppress(ArtifactError, RequestError):
                    assert engines is not None  # noqa: S101 - or there is no graph
                    found[graph] = engines.choose(graph, shapes)
        return found

    def _engines(self, footprint: Footprint) -> EngineSet | None:
        graphs = self._graphs(footprint)
        try:
            return open_engines(self.artifacts, self.manifest, graphs, self.folder).for_sm(self.sm)
        except (ArtifactError, BuildError, KeyError):
            if self.folder is not None and not (self.folder / ENGINE_MANIFEST).exists():
                raise
            return None

    def _shapes(
        self, graph: str, footprint: Footprint, request: Request
    ) -> list[dict[str, tuple[int, ...]]]:
        """Inputs of each run; the largest first."""
        inputs = self._graphs(footprint).signature(graph, footprint.config).inputs
        shapes = [
            {spec.name: spec.concrete(sizes) for spec in inputs}
            for sizes in request.runs(graph, footprint.config)
        ]
        return sorted(shapes, key=lambda x: -sum(math.prod(shape) for shape in x.values()))

    def _graphs(self, footprint: Footprint) -> GraphSet:
        """The graphs that compute like that."""
        quantized = tuple(
            (component, name)
            for component, name in (
                ("text_encoder", footprint.text_precision),
                ("transformer", footprint.precision),
            )
            if name in PRECISION_FORMATS
        )
        kv = None
        if footprint.kv_dtype == KV_FLOAT8:
            kv = KV_STATIC_FLOAT8 if footprint.precision in PRECISION_FORMATS else KV_FLOAT8
        return GraphSet(
            self.manifest.variant, self.manifest.dtype, kv, quantized, footprint.attention
        )


def _request(manifest: Manifest, options: PlanOptions, count: int, known: bool) -> Request:
    unit = manifest.config.vae.multiple_of
    for what, size in (("size", options.size), ("reference_size", options.reference_size)):
        if any(side < unit or side % unit for side in size):
            raise RequestError(
                f"{what} is {size[0]}x{size[1]}, expected multiples of {unit} pixels"
            )
    width, height = options.size
    return Request(
        height=height,
        width=width,
        references=((options.reference_size[1], options.reference_size[0]),) * count,
        stages=edit_stages(manifest.variant, count, known=known),
        batch=options.batch,
        kv_held=known,
    )


def _edit(
    planner: _Planner,
    footprint: Footprint,
    requests: Sequence[Request],
    steps: int,
    gpu: Gpu,
) -> EditPlan:
    def latency(plan: MemoryPlan) -> Latency:
        return estimate_latency(plan, steps, gpu, planner.engines_of(footprint, plan.request))

    first = planner(footprint, requests[0])
    again = planner(footprint, requests[1], first) if first.kv_bytes else None
    return EditPlan(
        first=first,
        again=again,
        first_time=latency(first),
        again_time=None if again is None else latency(again),
        choices=() if first.fits else tuple(what_fits(first, planner)),
        kept_sets=planner.kept_sets(footprint),
    )
