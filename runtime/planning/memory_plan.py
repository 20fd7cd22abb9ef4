"""What a request needs of a device, stage by stage, before any work is done.

`klein-kv plan` asks this about a GPU that need not be there; the runtime asks it about the device
it runs on, and then does what the plan says. Bytes of weights, keys and values, inputs and outputs
are exact; scratch is what the engines report, else an estimate.

Weights of a component (text encoder, transformer, VAE) stay on the device after its work as long as
they fit beside what comes next. Where they do not, the text encoder goes first and the transformer
last: a new prompt loads the text encoder, every step needs the transformer.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from klein_kv.artifacts.signature import TensorSpec, is_kv, make_signature
from klein_kv.runtime.planning.footprint import COMPONENTS, Footprint, component_of
from klein_kv.runtime.planning.request import Request
from klein_kv.runtime.planning.scratch import estimate_scratch

__all__ = ["RESERVED", "MemoryPlan", "Stage", "make_plan", "size_text"]

RESERVED = 600_000_000
"""Bytes that the CUDA context and the library's code take; an estimate, not measured."""

_PASSING = ("scratch", "activations", "images")
_IMAGES = ("image", "sample")


def size_text(nbytes: int) -> str:
    """Bytes for people."""
    if nbytes >= 10**9:
        return f"{nbytes / 1e9:.2f} GB"
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 10**7 else f"{nbytes / 1e6:.3f} MB"


@dataclass(frozen=True, slots=True)
class Stage:
    """Device memory while one graph runs.

    Attributes:
        name: of the graph.
        parts: bytes by part; weights under their component's name.
        loads: bytes of weights that are loaded for it.
        scratch_source: name of the engines that reported it, or "estimated".
    """

    name: str
    parts: dict[str, int]
    loads: int
    scratch_source: str

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts.values())

    @property
    def passing(self) -> int:
        """Bytes that are neither weights nor keys and values nor reserved."""
        return sum(self.parts.get(part, 0) for part in _PASSING)

    @property
    def resident(self) -> frozenset[str]:
        """Components whose weights are on the device."""
        return frozenset(self.parts) & frozenset(COMPONENTS)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How a request runs on a device of `capacity` bytes.

    Attributes:
        request: what is made.
        footprint: of the model.
        capacity: bytes.
        stages: in order.
        together: bytes at the peak if all that takes part stays through all stages.
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
        plain = "plain_step" in self.request.stages
        return 0 if plain else self.footprint.kv_bytes(self.request)

    @property
    def loads(self) -> dict[str, int]:
        """Bytes that are loaded in the course of it, by component."""
        return {component_of(stage.name): stage.loads for stage in self.stages if stage.loads}

    def stage(self, graph: str) -> Stage | None:
        """The stage of one graph."""
        return next((stage for stage in self.stages if stage.name == graph), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "peak": self.peak,
            "fits": self.fits,
            "loads": self.loads,
            "stages": [
                {
                    "graph": stage.name,
                    **stage.parts,
                    "total": stage.total,
                    "loads": stage.loads,
                    "scratch_source": stage.scratch_source,
                }
                for stage in self.stages
            ],
        }


def make_plan(
    footprint: Footprint,
    request: Request,
    capacity: int,
    *,
    scratch: Mapping[str, tuple[int, str]] | None = None,
    loaded: Collection[str] | None = None,
    reserved: int = RESERVED,
    fixed_buffers: bool = False,
    kv_copies: int = 0,
    held_scratch: int = 0,
) -> MemoryPlan:
    """Adds everything up and decides which weights stay.

    Args:
        footprint: the model.
        request: what is to be made.
        capacity: bytes of the device.
        scratch: bytes and their source by graph, where known; the rest is estimated.
        loaded: components on the device now; None plans a request that follows one like it.
        reserved: bytes that are not to be had.
        fixed_buffers: see `GraphMemory`.
        kv_copies: see `GraphMemory`.
        held_scratch: bytes of shared scratch that an earlier request left.
    """
    needs = {
        name: (scratch or {}).get(name) or (_estimate(name, footprint, request), "estimated")
        for name in request.stages
    }
    fixed = _fixed_buffers(footprint, request) if fixed_buffers else {}
    held = {
        name: footprint.weights[name] + sum(fixed.get(name, {}).values()) for name in COMPONENTS
    }
    # What each graph needs beside weights.
    rows: dict[str, dict[str, int]] = {}
    for name, (nbytes, _) in needs.items():
        parts = {"reserved": reserved} if reserved else {}
        kv = _kv_bytes(name, footprint, request)
        if "cached_step" in request.stages:  # the copies stay where they are
            kv += kv_copies * footprint.kv_bytes(request)
        if kv:
            parts["kv"] = kv
        parts["scratch"] = nbytes
        parts |= _sources(footprint, request) if fixed else _buffers(name, footprint, request)
        if name == "vae_decoder" and request.kv_kept and not request.kv_held:
            stays = footprint.kv_bytes(request)
            if sum(parts.values()) + held["vae"] + stays <= capacity:
                parts["kv"] = parts.get("kv", 0) + stays
        rows[name] = parts
    together = sum(held[name] for name in {component_of(name) for name in request.stages})
    if fixed:
        largest = max(held_scratch, *(nbytes for nbytes, _ in needs.values()))
        together += max(sum(parts.values()) - parts["scratch"] for parts in rows.values()) + largest
        if together <= capacity:  # else what one graph leaves is given back for the next
            rows = {name: parts | {"scratch": largest} for name, parts in rows.items()}
    else:
        together += max(sum(parts.values()) for parts in rows.values())
    # Which weights stay. A request that follows one like it begins with what that one left.
    resident = set(loaded or ())
    stages: list[Stage] = []
    for _ in range(1 if loaded is not None else 2):
        stages = []
        for name, parts in rows.items():
            own = component_of(name)
            loads = 0 if own in resident else footprint.weights[own]
            room = capacity - sum(parts.values()) - held[own]
            staying = [own]
            for other in COMPONENTS:
                if other in resident and other != own and held[other] <= room:
                    room -= held[other]
                    staying.append(other)
            resident = set(staying)
            whole = {other: footprint.weights[other] for other in (own, *sorted(staying[1:]))}
            buffers = dict(parts)
            for component in staying:
                for part, size in fixed.get(component, {}).items():
                    buffers[part] += size
            stages.append(Stage(name, whole | buffers, loads, needs[name][1]))
    return MemoryPlan(request, footprint, capacity, tuple(stages), together)


def _kv_bytes(graph: str, footprint: Footprint, request: Request) -> int:
    if request.kv_held or graph in ("first_step", "cached_step", "encode_references"):
        return footprint.kv_bytes(request)
    return 0


def _buffers(graph: str, footprint: Footprint, request: Request) -> dict[str, int]:
    """Inputs and outputs but for keys and values, those of the loop over all stages.

    Text embeddings, latents and positions are on the device from the first step until the image is
    there, and are put there while the text encoder still is.
    """
    parts = {"activations": 0, "images": 0}
    steps = [stage for stage in request.stages if stage.endswith("_step")]
    for name in {graph} if graph in steps else {graph, *steps[-1:]}:
        signature = make_signature(name, footprint.config, footprint.dtype)
        specs = (*signature.inputs, *(signature.outputs if name == graph else ()))
        _add(parts, specs, request.sizes(name, footprint.config))
    return parts


def _fixed_buffers(footprint: Footprint, request: Request) -> dict[str, dict[str, int]]:
    """By component, inputs and outputs of its graphs, but for keys and values."""
    parts = {component: {"activations": 0, "images": 0} for component in COMPONENTS}
    for name in request.stages:
        signature = make_signature(name, footprint.config, footprint.dtype)
        for sizes in request.runs(name, footprint.config):
            _add(parts[component_of(name)], (*signature.inputs, *signature.outputs), sizes)
    return parts


def _sources(footprint: Footprint, request: Request) -> dict[str, int]:
    """What is copied to the graphs' inputs and exists besides: uploads, text, reference tokens."""
    parts = {"activations": 0, "images": 0}
    steps = [name for name in request.stages if name.endswith("_step")]
    for name in {*steps[:1], *({"text_encoder", "vae_encoder"} & set(request.stages))}:
        signature = make_signature(name, footprint.config, footprint.dtype)
        _add(parts, signature.inputs, request.sizes(name, footprint.config))
    return parts


def _add(parts: dict[str, int], specs: Iterable[TensorSpec], sizes: Mapping[str, int]) -> None:
    """Adds tensors to "images" and "activations", but for keys and values."""
    for spec in specs:
        if not is_kv(spec.name):
            parts["images" if spec.name in _IMAGES else "activations"] += spec.nbytes(sizes)


def _estimate(graph: str, footprint: Footprint, request: Request) -> int:
    sizes = request.sizes(graph, footprint.config)
    return estimate_scratch(graph, footprint.config, footprint.dtype, sizes, footprint.vae_shapes)
