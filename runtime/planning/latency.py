"""How long a request would take, stage by stage. A model, not a measurement.

A stage takes what the kernel plan of its engine costs where there is an engine of exactly its
sizes, else its arithmetic at the peak rate of its types (`klein_kv.flops`), which no GPU reaches:
kernel plans of klein 9B in bf16 are 3 to 12 % above it. Loading weights takes their bytes at the
peak of the link to the host.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from klein_kv.artifacts.config import dtype_name
from klein_kv.artifacts.engine_set import EngineFolder
from klein_kv.artifacts.targets import Gpu
from klein_kv.engines.plan.kernel_plan import KernelPlan
from klein_kv.engines.plan.plan_cost import price_plan
from klein_kv.errors import ArtifactError, BuildError
from klein_kv.flops import (
    Operations,
    reference_operations,
    step_operations,
    text_operations,
)
from klein_kv.networks.vae_layers import vae_operations
from klein_kv.runtime.planning.memory_plan import Footprint, MemoryPlan, Request, component_of

__all__ = ["Latency", "StageTime", "estimate_latency"]

_PEAKS = {"fp8": "fp8", "nvfp4": "fp4"}


@dataclass(frozen=True, slots=True)
class StageTime:
    """Time of one stage.

    Attributes:
        name: the graph, or "load COMPONENT".
        runs: how often it runs in a request.
        seconds: of one run; None where no figure is known for this GPU and type.
        source: "kernel plan", "FLOP model" or "host link".
        engines: name of the engines, for a kernel plan.
    """

    name: str
    runs: int
    seconds: float | None
    source: str
    engines: str = ""


@dataclass(frozen=True, slots=True)
class Latency:
    """Time of a request."""

    stages: tuple[StageTime, ...]

    @property
    def total(self) -> float | None:
        """Seconds of all stages; None where one is not known."""
        total = 0.0
        for stage in self.stages:
            if stage.seconds is None:
                return None
            total += stage.runs * stage.seconds
        return total

    def of(self, name: str) -> StageTime | None:
        """One stage."""
        return next((stage for stage in self.stages if stage.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"seconds": self.total, "stages": [asdict(stage) for stage in self.stages]}


def estimate_latency(
    plan: MemoryPlan, steps: int, gpu: Gpu, engines: Mapping[str, EngineFolder]
) -> Latency:
    """Times of a planned request.

    Args:
        plan: says which graphs run and which weights are loaded.
        steps: denoising steps.
        gpu: its figures.
        engines: what would run its graphs, where that is built.
    """
    request, footprint = plan.request, plan.footprint
    stages = [
        StageTime(f"load {component}", 1, nbytes / (gpu.host_bandwidth * 1e9), "host link")
        for component, nbytes in plan.loads.items()
    ]
    for graph in request.stages:
        runs, engine = _runs(graph, request, steps), engines.get(graph)
        priced = None if engine is None else _price(engine, graph, gpu)
        if engine is not None and priced is not None:
            stages.append(StageTime(graph, runs, priced, "kernel plan", engine.path.name))
        else:
            seconds = _seconds(graph, footprint, request.sizes(graph, footprint.config), gpu)
            stages.append(StageTime(graph, runs, seconds, "FLOP model"))
    return Latency(tuple(stages))


def _price(engines: EngineFolder, graph: str, gpu: Gpu) -> float | None:
    """Price of the kernel plan; None where it has none, as for a range of sizes."""
    record = engines.manifest.record(graph)
    if not record.fixed:
        return None
    try:
        return price_plan(KernelPlan.load(engines.path / record.layers), gpu).seconds
    except (ArtifactError, BuildError):
        return None


def _runs(graph: str, request: Request, steps: int) -> int:
    if graph == "vae_encoder":
        return len(request.references)
    if graph == "cached_step":
        return steps - ("first_step" in request.stages)
    return steps if graph == "plain_step" else 1


def _seconds(graph: str, footprint: Footprint, sizes: Mapping[str, int], gpu: Gpu) -> float | None:
    own = dtype_name(footprint.dtype)
    text = graph == "text_encoder"
    precision = footprint.text_precision if text else footprint.precision
    attention = footprint.attention if component_of(graph) == "transformer" else None
    rates = [gpu.peak(name) for name in (_PEAKS.get(precision, own), attention or own, own)]
    done = _operations(graph, footprint, sizes)
    total = 0.0
    for operations, rate in zip((done.linears, done.attention, done.other), rates, strict=True):
        if rate is None:
            return None
        total += operations / rate
    return total


def _operations(graph: str, footprint: Footprint, sizes: Mapping[str, int]) -> Operations:
    config, batch = footprint.config, sizes["batch"]
    if graph == "text_encoder":
        return text_operations(config.text_encoder, batch=batch, text_tokens=sizes["text_tokens"])
    if graph.startswith("vae_"):
        return vae_operations(
            footprint.vae_shapes[graph],
            config.vae.num_levels,
            batch=batch if graph == "vae_decoder" else 1,
            height=sizes["height"],
            width=sizes["width"],
        )
    net, references = config.transformer, sizes["ref_tokens"]
    if graph == "encode_references":
        return reference_operations(net, references)
    step = step_operations(
        net,
        batch=batch,
        image_tokens=sizes["image_tokens"],
        text_tokens=sizes["text_tokens"],
        ref_tokens=references,
        plain=graph == "plain_step",
    )
    return step + reference_operations(net, references) if graph == "first_step" else step
