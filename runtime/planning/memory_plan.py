"""What a request needs of a device, stage by stage, before any work is done.

`klein-kv plan` asks this about a GPU that need not be there; the runtime asks it about the device
it runs on, and then does what the plan says. Bytes of weights, keys and values, inputs and outputs
are exact; scratch is what the engines report, else an estimate.

Weights of a component (text encoder, transformer, VAE) stay on the device after its work as long as
they fit beside what comes next. Where they do not, the text encoder goes first and the transformer
last: a new prompt loads the text encoder, every step needs the transformer.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from klein_kv.artifacts.config import ModelConfig
from klein_kv.artifacts.signature import is_kv, make_signature
from klein_kv.errors import RequestError
from klein_kv.flops import block_weights, text_block_weights
from klein_kv.runtime.planning.scratch import estimate_scratch

__all__ = [
    "COMPONENTS",
    "PRECISIONS",
    "RESERVED",
    "Footprint",
    "MemoryPlan",
    "Request",
    "Stage",
    "component_of",
    "edit_stages",
    "flagship_request",
    "make_plan",
    "size_text",
]

RESERVED = 600_000_000
"""Bytes that the CUDA context and the library's code take; an estimate, not measured."""

PRECISIONS = {
    "bf16": 2.0,
    "fp16": 2.0,
    "fp32": 4.0,
    "fp8": 1.0,
    "fp8-weight-only": 1.0,
    "nvfp4": 0.5 + 1 / 16,
}
"""Bytes per weight of a block's linear layer; nvfp4 has one fp8 scale for 16 weights."""

COMPONENTS = ("transformer", "vae", "text_encoder")
"""Parts of a model that are loaded and released whole; the first stay longest."""

_IMAGES = ("image", "sample")


def size_text(nbytes: int) -> str:
    """Bytes for people."""
    if nbytes >= 10**9:
        return f"{nbytes / 1e9:.2f} GB"
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 10**7 else f"{nbytes / 1e6:.3f} MB"


def component_of(graph: str) -> str:
    """The component whose weights a graph needs."""
    if graph == "text_encoder":
        return graph
    return "vae" if graph.startswith("vae_") else "transformer"


def edit_stages(variant: str, references: int, *, known: bool = False) -> tuple[str, ...]:
    """The graphs that a request runs, in order, each once.

    Args:
        variant: "kv" or "plain".
        references: number of reference images.
        known: their keys and values (for plain weights, their tokens) are at hand.
    """
    encode = ("vae_encoder",) if references and not known else ()
    if variant == "plain":
        return ("text_encoder", *encode, "plain_step", "vae_decoder")
    first = ("first_step",) if encode else ()
    return ("text_encoder", *encode, *first, "cached_step", "vae_decoder")


FLAGSHIP_SIDE, FLAGSHIP_REFERENCES = 1024, 4
"""The edit that a GPU should keep the references of: as large as klein takes them."""


def flagship_request(variant: str, config: ModelConfig) -> "Request":
    """A first edit of 1024x1024 pixels with four references of that size."""
    unit = config.vae.multiple_of
    side = -(-FLAGSHIP_SIDE // unit) * unit
    references = ((side, side),) * FLAGSHIP_REFERENCES
    return Request(side, side, references, edit_stages(variant, len(references)))


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be made.

    Attributes:
        height: pixels of the output.
        width: pixels of the output.
        references: (height, width) of each reference image, in pixels.
        stages: graphs that run, in order.
        batch: images at once.
        prompts: of them, whose texts are encoded at once.
        text_tokens: prompt tokens.
        kv_held: keys and values are on the device from the start; else `first_step` or
            `encode_references` makes them.
        kv_kept: they stay after the steps, if they fit beside the VAE.
    """

    height: int
    width: int
    references: tuple[tuple[int, int], ...]
    stages: tuple[str, ...]
    batch: int = 1
    prompts: int = 1
    text_tokens: int = 512
    kv_held: bool = False
    kv_kept: bool = False

    def __post_init__(self) -> None:
        for name in ("height", "width", "batch", "prompts", "text_tokens"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} is {getattr(self, name)}, expected 1 or more")

    def ref_tokens(self, config: ModelConfig) -> int:
        """R, tokens of all references."""
        unit = config.vae.multiple_of
        return sum((height // unit) * (width // unit) for height, width in self.references)

    def sizes(self, graph: str, config: ModelConfig) -> dict[str, int]:
        """Sizes of the symbols of one graph's signature.

        The VAE encoder sees one reference at a time: the largest counts.
        """
        unit = config.vae.multiple_of
        height, width = self.height, self.width
        if graph == "vae_encoder":
            height, width = max(self.references, key=math.prod, default=(0, 0))
        grid = height // unit, width // unit
        return {
            "batch": self.prompts if graph == "text_encoder" else self.batch,
            "text_tokens": self.text_tokens,
            "image_tokens": grid[0] * grid[1],
            "ref_tokens": self.ref_tokens(config),
            "grid_height": grid[0],
            "grid_width": grid[1],
            "height": height,
            "width": width,
        }

    def runs(self, graph: str, config: ModelConfig) -> list[dict[str, int]]:
        """Sizes of each different run of one graph: the VAE encoder has one per reference size."""
        if graph != "vae_encoder":
            return [self.sizes(graph, config)]
        sizes = dict.fromkeys(self.references)
        return [replace(self, references=(size,)).sizes(graph, config) for size in sizes]


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a model takes on a device, whatever is asked of it.

    Attributes:
        config: the checkpoint's configuration.
        dtype: type of activations.
        weights: bytes by component.
        vae_shapes: weights of "vae_encoder" and "vae_decoder", for estimates.
        precision: of the transformer's block linears, a key of `PRECISIONS`.
        text_precision: of the text encoder's.
        kv_dtype: type that keys and values are handed on in.
        attention: "fp8" where the transformer's attention is computed in float8.
    """

    config: ModelConfig
    dtype: str
    weights: Mapping[str, int]
    vae_shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
    precision: str = "bf16"
    text_precision: str = "bf16"
    kv_dtype: str = "bfloat16"
    attention: str | None = None

    def quantized(self, precision: str, text_precision: str) -> "Footprint":
        """The same model with its block linears in other precisions; the rest keeps its type."""
        for name in (precision, text_precision):
            if name not in PRECISIONS:
                raise RequestError(
                    f"precision is {name!r}, expected one of {', '.join(PRECISIONS)}"
                )
        saved = PRECISIONS[self.precision] - PRECISIONS[precision]
        text_saved = PRECISIONS[self.text_precision] - PRECISIONS[text_precision]
        weights = dict(self.weights)
        weights["transformer"] -= int(block_weights(self.config.transformer) * saved)
        weights["text_encoder"] -= int(text_block_weights(self.config.text_encoder) * text_saved)
        weights = {component: max(0, nbytes) for component, nbytes in weights.items()}
        return replace(self, weights=weights, precision=precision, text_precision=text_precision)

    def kv_bytes(self, request: Request) -> int:
        """Bytes of keys and values; in eight bits with a float32 scale per head and tensor."""
        net, ref_tokens = self.config.transformer, request.ref_tokens(self.config)
        scales = 2 * net.num_blocks * net.num_attention_heads * 4
        eight = ref_tokens > 0 and self.kv_dtype.startswith("float8")
        return net.kv_bytes(ref_tokens, self.kv_dtype) + (scales if eight else 0)


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
    rows: list[tuple[str, dict[str, int], str]] = []
    for name, (nbytes, source) in needs.items():
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
        rows.append((name, parts, source))
    together = sum(held[name] for name in {component_of(name) for name in request.stages})
    if fixed:
        largest = max(held_scratch, *(nbytes for nbytes, _ in needs.values()))
        together += max(sum(parts.values()) - parts["scratch"] for _, parts, _ in rows) + largest
        if together <= capacity:  # else what one graph leaves is given back for the next
            rows = [(name, parts | {"scratch": largest}, source) for name, parts, source in rows]
    else:
        together += max(sum(parts.values()) for _, parts, _ in rows)
    resident = set(loaded or ())
    stages: list[Stage] = []
    for _ in range(1 if loaded is not None else 2):
        stages = []
        for name, parts, source in rows:
            own = component_of(name)
            loads = 0 if own in resident else footprint.weights[own]
            room = capacity - sum(parts.values()) - held[own]
            kept = {own}
            for other in COMPONENTS:
                if other in resident and other != own and held[other] <= room:
                    room -= held[other]
                    kept.add(other)
            resident = kept
            whole = {other: footprint.weights[other] for other in (own, *sorted(kept - {own}))}
            buffers = dict(parts)
            for component in kept:
                for part, size in fixed.get(component, {}).items():
                    buffers[part] += size
            stages.append(Stage(name, whole | buffers, loads, source))
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
        sizes = request.sizes(name, footprint.config)
        signature = make_signature(name, footprint.config, footprint.dtype)
        outputs = signature.outputs if name == graph else ()
        for spec in (*signature.inputs, *outputs):
            if not is_kv(spec.name):
                parts["images" if spec.name in _IMAGES else "activations"] += spec.nbytes(sizes)
    return parts


def _fixed_buffers(footprint: Footprint, request: Request) -> dict[str, dict[str, int]]:
    """By component, inputs and outputs of its graphs, but for keys and values."""
    found = {component: {"activations": 0, "images": 0} for component in COMPONENTS}
    for name in request.stages:
        signature = make_signature(name, footprint.config, footprint.dtype)
        for sizes in request.runs(name, footprint.config):
            for spec in (*signature.inputs, *signature.outputs):
                if not is_kv(spec.name):
                    part = "images" if spec.name in _IMAGES else "activations"
                    found[component_of(name)][part] += spec.nbytes(sizes)
    return found


def _sources(footprint: Footprint, request: Request) -> dict[str, int]:
    """What is copied to the graphs' inputs and exists besides: uploads, text, reference tokens."""
    steps = [name for name in request.stages if name.endswith("_step")]
    parts = {"activations": 0, "images": 0}
    for name in {*steps[:1], *({"text_encoder", "vae_encoder"} & set(request.stages))}:
        sizes = request.sizes(name, footprint.config)
        for spec in make_signature(name, footprint.config, footprint.dtype).inputs:
            if not is_kv(spec.name):
                parts["images" if spec.name in _IMAGES else "activations"] += spec.nbytes(sizes)
    return parts


def _estimate(graph: str, footprint: Footprint, request: Request) -> int:
    sizes = request.sizes(graph, footprint.config)
    return estimate_scratch(graph, footprint.config, footprint.dtype, sizes, footprint.vae_shapes)
