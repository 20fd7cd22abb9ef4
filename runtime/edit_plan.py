"""`klein-kv plan`: what edits with an artifact folder need of a GPU and of the host.

Only headers and manifests are read, and no GPU is asked: the plan is that of its vendor's figures.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from klein_kv.config import DTYPES, ITEM_SIZE
from klein_kv.engines.targets import Gpu, find_target
from klein_kv.errors import RequestError
from klein_kv.manifest import Manifest, graph_weights
from klein_kv.runtime.engine_choice import BuiltEngines, choose_engines, load_engines
from klein_kv.runtime.host_needs import HostNeed, host_needs
from klein_kv.runtime.latency import Latency, estimate_latency
from klein_kv.runtime.memory_plan import (
    RESERVED,
    Footprint,
    MemoryPlan,
    Request,
    component_of,
    edit_stages,
    make_plan,
)
from klein_kv.runtime.plan_choices import Choice, what_fits
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
        precisions: of the transformer's block linears: "fp8", "nvfp4", or the 16 bits that the
            artifacts hold, "bf16" or "fp16"; None takes all three.
        text_precision: of the text encoder's; None takes the artifacts' 16 bits.
        kv_dtype: "bf16", or "fp8" for engines that hand keys and values on in eight bits.
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
    batch: int = 1
    steps: int = 4
    memory: int | None = None
    engines: Path | None = None

    def __post_init__(self) -> None:
        if self.kv_dtype not in ("bf16", "fp8"):
            raise RequestError(f"kv_dtype is {self.kv_dtype!r}, expected 'bf16' or 'fp8'")
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
    base = base_footprint(artifacts, manifest, kv_dtype=options.kv_dtype)
    precisions = options.precisions or (base.precision, "fp8", "nvfp4")
    text = options.text_precision or base.precision
    for name in (*precisions, text):
        if name not in (base.precision, "fp8", "nvfp4"):
            raise RequestError(
                f"precision is {name!r}, expected {base.precision}, fp8 or nvfp4 for {artifacts}"
            )
    capacity = int(target.gpu.memory * 1e9) if options.memory is None else options.memory
    engines = load_engines(artifacts, manifest, target.sm, options.engines)
    edits, used = [], None
    for precision in precisions:
        footprint = base.quantized(precision, text)
        for count in options.references:
            requests = [_request(manifest, options, count, known) for known in (False, True)]
            chosen = _engines(engines, footprint, requests[0])
            used = used or chosen
            plan = partial(_plan, capacity=capacity, engines=engines)
            edits.append(_edit(plan, footprint, requests, options.steps, target.gpu, chosen))
    plans = [plan for edit in edits for plan in (edit.first, edit.again) if plan is not None]
    host = host_needs(artifacts, manifest, used, plans)
    return Plans(target.gpu, capacity, options.steps, tuple(edits), tuple(host))


def base_footprint(artifacts: Path, manifest: Manifest, *, kv_dtype: str = "bf16") -> Footprint:
    """The exported model in 16 bits, as GPUs run it.

    Args:
        artifacts: the folder; float32 is planned as if it had been exported in bfloat16.
        manifest: its manifest.
        kv_dtype: "fp8" for keys and values in eight bits, else they have the graphs' type.
    """
    own, dtype = manifest.dtype, manifest.dtype
    if dtype == "float32":
        dtype = "bfloat16"
    weights: dict[str, dict[WeightRef, int]] = {}
    shapes = {}
    for graph, file in manifest.graphs.files.items():
        found = graph_weights(artifacts, file)
        held = weights.setdefault(component_of(graph), {})
        for ref in found.values():
            wide = ref.dtype == own
            held[ref] = ref.nbytes * ITEM_SIZE[dtype] // ITEM_SIZE[own] if wide else ref.nbytes
        if graph.startswith("vae_"):
            shapes[graph] = {name: ref.shape for name, ref in found.items()}
    precision = next(name for name, wide in DTYPES.items() if wide == dtype)
    return Footprint(
        config=manifest.config,
        dtype=dtype,
        weights={component: sum(held.values()) for component, held in weights.items()},
        vae_shapes=shapes,
        precision=precision,
        text_precision=precision,
        kv_dtype="float8_e4m3fn" if kv_dtype == "fp8" else dtype,
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


def _sizes(footprint: Footprint, request: Request) -> Mapping[str, Mapping[str, int]]:
    return {graph: request.sizes(graph, footprint.config) for graph in request.stages}


def _engines(
    engines: list[BuiltEngines], footprint: Footprint, request: Request
) -> BuiltEngines | None:
    sizes = _sizes(footprint, request)
    return choose_engines(engines, footprint.precision, footprint.kv_dtype, sizes)


def _plan(
    footprint: Footprint, request: Request, *, capacity: int, engines: list[BuiltEngines]
) -> MemoryPlan:
    chosen = _engines(engines, footprint, request)
    scratch = None if chosen is None else chosen.scratch(_sizes(footprint, request))
    if chosen is not None and chosen.manifest.weights == "embedded":
        copies = sum(component_of(graph) == "transformer" for graph in request.stages)
        weights = {**footprint.weights, "transformer": footprint.weights["transformer"] * copies}
        footprint = replace(footprint, weights=weights)
    return make_plan(footprint, request, capacity, scratch=scratch)


def _edit(
    plan: Callable[[Footprint, Request], MemoryPlan],
    footprint: Footprint,
    requests: Sequence[Request],
    steps: int,
    gpu: Gpu,
    engines: BuiltEngines | None,
) -> EditPlan:
    first, again = plan(footprint, requests[0]), None
    if first.kv_bytes:
        again = plan(footprint, requests[1])
    return EditPlan(
        first=first,
        again=again,
        first_time=estimate_latency(first, steps, gpu, engines),
        again_time=None if again is None else estimate_latency(again, steps, gpu, engines),
        choices=() if first.fits else tuple(what_fits(first, plan)),
    )
