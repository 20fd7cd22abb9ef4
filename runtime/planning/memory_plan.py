"""What a request needs of a device, stage by stage, before any work is done.

`klein-kv plan` asks this about a GPU that need not be there; the runtime asks it about the device
it runs on, and then does what the plan says. Bytes of weights, keys and values, inputs and outputs
are exact; scratch is what the engines report, else an estimate.

Weights of a component (text encoder, transformer, VAE) stay on the device after its work as long as
they fit beside what comes next. Where they do not, the text encoder goes first and the transformer
last: a new prompt loads the text encoder, every step needs the transformer. Inputs and outputs of a
component's graphs have memory of their own, as engines have them, and go with it.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from klein_kv.artifacts.signature import TensorSpec, is_kv
from klein_kv.runtime.planning.footprint import COMPONENTS, Footprint, component_of
from klein_kv.runtime.planning.request import Request

__all__ = ["RESERVED", "MemoryPlan", "Stage", "make_plan", "size_text"]

RESERVED = 600_000_000
"""Bytes that the CUDA context and the library's code take; an estimate, not measured."""

_WITH_KV = ("first_step", "cached_step", "blend", "encode_references")


def size_text(nbytes: int) -> str:
    """Bytes for people."""
    if nbytes >= 10**9:
        return f"{nbytes / 1e9:.2f} GB"
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 10**7 else f"{nbytes / 1e6:.3f} MB"


@dataclass(frozen=True, slots=True)
class Stage:
    """Device memory while one graph runs, in bytes."""

    name: str  # of the graph
    parts: dict[str, int]  # weights by component, inputs and outputs as "activations", and the rest
    loads: int  # weights that are loaded for it
    scratch_source: str  # name of the engines that reported it, or "estimated"

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts.values())

    @property
    def passing(self) -> int:
        """Bytes that are neither weights nor keys and values nor reserved."""
        return self.parts["scratch"] + self.parts["activations"]

    @property
    def resident(self) -> frozenset[str]:
        """Components whose weights are on the device."""
        return frozenset(self.parts) & frozenset(COMPONENTS)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How a request runs on a device of `capacity` bytes.

    `together` is the peak if all that takes part stays through all stages.
    """

    request: Request
    footprint: Footprint
    capacity: int
    stages: tuple[Stage, ...]
    together: int

    @property
    def peak(self) -> int:
        """Bytes of the largest stage."""
        return max(stage.total for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Whether every stage fits."""
        return self.peak <= self.capacity

    @property
    def all_fits(self) -> bool:
        """Whether every component that takes part can stay through all stages."""
        return self.together <= self.capacity

    @property
    def kv_bytes(self) -> int:
        """Reference keys and values."""
        return self.footprint.kv_bytes(self.request)

    @property
    def loads(self) -> dict[str, int]:
        """Bytes that are loaded in the course of it, by component."""
        return {component_of(stage.name): stage.loads for stage in self.stages if stage.loads}

    def stage(self, graph: str) -> Stage | None:
        """The stage of one graph."""
        return next((stage for stage in self.stages if stage.name == graph), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        stages = [
            {"graph": x.name, **x.parts, "total": x.total}
            | {"loads": x.loads, "scratch_source": x.scratch_source}
            for x in self.stages
        ]
        return {"peak": self.peak, "fits": self.fits, "loads": self.loads, "stages": stages}


def make_plan(
    footprint: Footprint,
    request: Request,
    capacity: int,
    *,
    scratch: Mapping[str, tuple[int, str]] | None = None,
    loaded: Collection[str] | None = None,
    reserved: int = RESERVED,
    kv_copies: int = 0,
    held_scratch: int = 0,
) -> MemoryPlan:
    """Adds everything up, for a device of `capacity` bytes, and decides which weights stay.

    `scratch` has bytes and their source by graph, where known; the rest is estimated. `loaded` are
    the components on the device now; None plans a request that follows one like it. `reserved`
    bytes are not to be had, `held_scratch` are what an earlier request left of shared scratch;
    `kv_copies` is `GraphMemory`'s.
    """
    needs = dict(scratch or {})
    for name in request.stages:
        if name not in needs:
            sizes = request.sizes(name, footprint.config)
            needs[name] = footprint.scratch_bytes(name, sizes), "estimated"
    buffers = _buffers(footprint, request)
    component_bytes = {name: footprint.weights[name] + buffers[name] for name in COMPONENTS}

    # 1. What each graph needs beside its component.
    kv, sources = footprint.kv_bytes(request), _sources(footprint, request)
    copies = kv_copies if "cached_step" in request.stages else 0  # they stay where they are
    rows: dict[str, dict[str, int]] = {}
    for name in request.stages:
        parts = {"kv": kv * ((request.kv_held or name in _WITH_KV) + copies)}
        parts |= {"scratch": needs[name][0], "activations": sources, "reserved": reserved}
        if name == "vae_decoder" and request.kv_kept and not request.kv_held:
            fits = sum(parts.values()) + component_bytes["vae"] + kv <= capacity
            parts["kv"] += kv if fits else 0
        rows[name] = parts

    # 2. All together, with the scratch that they share; else what one leaves is given back.
    largest = max(held_scratch, *(parts["scratch"] for parts in rows.values()))
    together = largest + sum(component_bytes[part] for part in set(map(component_of, rows)))
    together += max(sum(parts.values()) - parts["scratch"] for parts in rows.values())
    if together <= capacity:
        rows = {name: parts | {"scratch": largest} for name, parts in rows.items()}

    # 3. Which weights stay. A request that follows one like it begins with what that one left.
    resident = set(loaded or ())
    stages: list[Stage] = []
    for _ in range(1 if loaded is not None else 2):
        stages = []
        for name, parts in rows.items():
            own = component_of(name)
            loads = 0 if own in resident else footprint.weights[own]
            room = capacity - sum(parts.values()) - component_bytes[own]
            staying = [own]
            for other in COMPONENTS:
                if other in resident and other != own and component_bytes[other] <= room:
                    room -= component_bytes[other]
                    staying.append(other)
            resident = set(staying)
            weights = {component: footprint.weights[component] for component in staying}
            activations = parts["activations"] + sum(buffers[component] for component in staying)
            whole = weights | parts | {"activations": activations}
            whole = {part: n for part, n in whole.items() if n or part not in ("kv", "reserved")}
            stages.append(Stage(name, whole, loads, needs[name][1]))
    return MemoryPlan(request, footprint, capacity, tuple(stages), together)


def _buffers(footprint: Footprint, request: Request) -> dict[str, int]:
    """By component, inputs and outputs of its graphs, but for keys and values."""
    nbytes = dict.fromkeys(COMPONENTS, 0)
    for name in request.stages:
        signature = footprint.graphs.signature(name, footprint.config)
        for sizes in request.runs(name, footprint.config):
            nbytes[component_of(name)] += _nbytes((*signature.inputs, *signature.outputs), sizes)
    return nbytes


def _sources(footprint: Footprint, request: Request) -> int:
    """What is copied to the graphs' inputs and exists besides: uploads, text, reference tokens."""
    config, total = footprint.config, 0
    steps = [name for name in request.stages if name.endswith("_step")]
    for name in {*steps[:1], *({"text_encoder", "vae_encoder", "blend"} & set(request.stages))}:
        inputs = footprint.graphs.signature(name, config).inputs
        total += _nbytes(inputs, request.sizes(name, config))
    return total


def _nbytes(specs: Iterable[TensorSpec], sizes: Mapping[str, int]) -> int:
    return sum(spec.nbytes(sizes) for spec in specs if not is_kv(spec.name))
