"""`klein-kv plan`: what edits with an artifact folder need of a GPU and of the host.

Only headers and manifests are read, and no GPU is asked: the plan is that of its vendor's figures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from klein_kv.config import ITEM_SIZE, dtype_name
from klein_kv.engines.targets import Gpu, find_target
from klein_kv.errors import RequestError
from klein_kv.manifest import Manifest, graph_weights
from klein_kv.quantization import PRECISION_FORMATS
from klein_kv.runtime.engine_choice import BuiltEngine, choose_engine, load_engines
from klein_kv.runtime.host_needs import HostNeed, host_needs
from klein_kv.runtime.latency import Latency, estimate_latency
from klein_kv.runtime.memory_plan import (
    COMPONENTS,
    RESERVED,
    Footprint,
    MemoryPlan,
    Request,
    component_of,
    edit_stages,
    make_plan,
)
from klein_kv.runtime.plan_choices import Choice, what_fits
from klein_kv.runtime.scratch import load_vae_shapes
from klein_kv.signature import KV_FLOAT8, KV_STATIC_FLOAT8, GraphSet
from klein_kv.weights import WeightRef

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
    """

    first: MemoryPlan
    again: MemoryPlan | None
    first_time: Latency
    again_time: Latency | None
    choices: tuple[Choice, ...]

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
    engines = load_engines(artifacts, target.sm, options.engines)
    planner = _Planner(manifest, capacity, engines)
    edits = []
    for precision in precisions:
        footprint = _footprint(artifacts, manifest, base, precision, options)
        for count in options.references:
            requests = [_request(manifest, options, count, known) for known in (False, True)]
            edits.append(_edit(planner, footprint, requests, options.steps, target.gpu))
    plans = [plan for edit in edits for plan in (edit.first, edit.again) if plan is not None]
    used = {
        built.folder: built
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
    """Plans requests for one device."""

    manifest: Manifest
    capacity: int
    engines: Sequence[BuiltEngine]

    def __call__(self, footprint: Footprint, request: Request) -> MemoryPlan:
        """The plan on the engines that would run it."""
        engines = self.engines_of(footprint, request)
        scratch = {
            graph: (built.record.scratch_bytes, built.name) for graph, built in engines.items()
        }
        copies = sum(
            built.manifest.weights == "embedded" and component_of(graph) == "transformer"
            for graph, built in engines.items()
        )
        if copies > 1:
            held = footprint.weights["transformer"] * copies
            footprint = replace(footprint, weights={**footprint.weights, "transformer": held})
        return make_plan(footprint, request, self.capacity, scratch=scratch)

    def engines_of(self, footprint: Footprint, request: Request) -> dict[str, BuiltEngine]:
        """Engines by graph, where there are such."""
        found = {}
        for graph in request.stages:
            sizes = request.sizes(graph, footprint.config)
            digests = self._digests(graph, footprint)
            if (built := choose_engine(self.engines, graph, digests, sizes)) is not None:
                found[graph] = built
        return found

    def _digests(self, graph: str, footprint: Footprint) -> list[str]:
        """Of the files that an engine may have been built from, the best first."""
        component = component_of(graph)
        names = {"transformer": footprint.precision, "text_encoder": footprint.text_precision}
        name = names.get(component, "")
        quantized = ((component, name),) if name in PRECISION_FORMATS else ()
        kv = None
        if component == "transformer" and footprint.kv_dtype == KV_FLOAT8:
            kv = KV_STATIC_FLOAT8 if quantized else KV_FLOAT8
        attentions: list[str | None] = [None]
        if component == "transformer" and footprint.attention is not None:
            attentions = [footprint.attention, None]
        sets = [
            GraphSet(self.manifest.variant, self.manifest.dtype, kv, quantized, attention)
            for attention in attentions
        ]
        files = [graphs.files[graph] for graphs in sets]
        return [self.manifest.files[file].digest for file in files if file in self.manifest.files]


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
    again = planner(footprint, requests[1]) if first.kv_bytes else None
    return EditPlan(
        first=first,
        again=again,
        first_time=latency(first),
        again_time=None if again is None else latency(again),
        choices=() if first.fits else tuple(what_fits(first, planner)),
    )
