"""What a request needs of a GPU before anything is loaded: `klein-kv plan`.

Bytes of weights, keys and values, and inputs are exact; scratch is what the built engines report,
else an estimate that is marked as one. The plan keeps the transformer and the VAE on the device and
the text encoder too where it fits; otherwise the text encoder comes and goes before the
transformer's work begins.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klein_kv.config import ITEM_SIZE, ModelConfig
from klein_kv.engines.manifest import EngineManifest, find_engines
from klein_kv.engines.targets import Gpu, find_target
from klein_kv.errors import RequestError
from klein_kv.manifest import Manifest, graph_weights
from klein_kv.runtime.memory import request_bytes
from klein_kv.signature import GraphSet, make_signature

__all__ = [
    "PRECISIONS",
    "MemoryPlan",
    "Request",
    "Stage",
    "component_bytes",
    "make_plan",
    "plan_artifacts",
    "text_from_plans",
]

RESERVED = 600_000_000
"""Bytes that the CUDA context and the library's code take; an estimate, not measured."""

PRECISIONS = {"bf16": 2.0, "fp16": 2.0, "fp32": 4.0, "fp8": 1.0, "nvfp4": 0.5 + 1 / 16}
"""Bytes per weight of a block's linear layer; nvfp4 has one fp8 scale for 16 weights."""

_STAGES = ("text_encoder", "vae_encoder", "first_step", "cached_step", "vae_decoder")
_BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be made.

    Attributes:
        height: pixels of the output.
        width: pixels of the output.
        references: number of reference images.
        reference_side: side of a square reference in pixels; 1024 is the most that is used.
        batch: images at once.
        text_tokens: prompt tokens.
    """

    height: int
    width: int
    references: int
    reference_side: int = 1024
    batch: int = 1
    text_tokens: int = 512

    def __post_init__(self) -> None:
        for name in ("height", "width", "reference_side", "batch", "text_tokens"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if self.references < 0:
            raise RequestError(f"references is {self.references}, expected 0 or more")

    def sizes(self, config: ModelConfig) -> dict[str, int]:
        """Sizes of all symbols of the graphs' signatures."""
        unit = config.vae.multiple_of
        grid = self.height // unit, self.width // unit
        return {
            "batch": self.batch,
            "text_tokens": self.text_tokens,
            "image_tokens": grid[0] * grid[1],
            "ref_tokens": self.references * (self.reference_side // unit) ** 2,
            "grid_height": grid[0],
            "grid_width": grid[1],
            "height": self.height,
            "width": self.width,
        }


@dataclass(frozen=True, slots=True)
class Stage:
    """Device memory while one graph runs, bytes by part."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How a request runs on a GPU.

    Attributes:
        request: what is to be made.
        precision: of the transformer's block linears.
        capacity: bytes of the GPU.
        weights: bytes by component.
        kv_bytes: reference keys and values.
        text_stays: the text encoder stays on the device.
        stages: in order.
        scratch_source: "engines", or "estimated".
    """

    request: Request
    precision: str
    capacity: int
    weights: dict[str, int]
    kv_bytes: int
    text_stays: bool
    stages: tuple[Stage, ...]
    scratch_source: str

    @property
    def peak(self) -> int:
        """Bytes of the largest stage."""
        return max(stage.total for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Whether every stage fits."""
        return self.peak <= self.capacity

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "size": [self.request.width, self.request.height],
            "references": self.request.references,
            "batch": self.request.batch,
            "precision": self.precision,
            "capacity": self.capacity,
            "weights": self.weights,
            "kv_bytes": self.kv_bytes,
            "text_encoder": "resident" if self.text_stays else "loaded for each new prompt",
            "stages": {stage.name: {**stage.parts, "total": stage.total} for stage in self.stages},
            "scratch": self.scratch_source,
            "peak": self.peak,
            "fits": self.fits,
        }


def make_plan(
    config: ModelConfig,
    dtype: str,
    weights: Mapping[str, int],
    request: Request,
    capacity: int,
    *,
    precision: str = "bf16",
    scratch: Mapping[str, int] | None = None,
) -> MemoryPlan:
    """Adds everything up.

    Args:
        config: the checkpoint's configuration.
        dtype: type of graphs, activations, keys and values.
        weights: bytes by component, already in `precision`.
        request: what is to be made.
        capacity: bytes of the GPU.
        precision: name for the report.
        scratch: bytes by graph, from built engines; None estimates.
    """
    sizes = request.sizes(config)
    kv = config.transformer.kv_bytes(sizes["ref_tokens"], dtype)
    fixed = {"reserved": RESERVED, "transformer": weights["transformer"], "vae": weights["vae"]}

    def stages(text_stays: bool) -> tuple[Stage, ...]:
        built = []
        for name in _STAGES:
            if not request.references and name in ("vae_encoder", "first_step"):
                continue
            parts = dict(fixed)
            if text_stays or name == "text_encoder":
                parts["text encoder"] = weights["text_encoder"]
            if name in ("first_step", "cached_step"):
                parts["reference K/V"] = kv
            parts["inputs and outputs"] = _io_bytes(name, config, dtype, sizes)
            parts["scratch"] = (
                scratch[name]
                if scratch is not None and name in scratch
                else _estimate(name, config, dtype, sizes)
            )
            built.append(Stage(name, parts))
        return tuple(built)

    resident = stages(True)
    text_stays = max(stage.total for stage in resident) <= capacity
    return MemoryPlan(
        request=request,
        precision=precision,
        capacity=capacity,
        weights=dict(weights),
        kv_bytes=kv,
        text_stays=text_stays,
        stages=resident if text_stays else stages(False),
        scratch_source="estimated" if scratch is None else "engines",
    )


def _io_bytes(graph: str, config: ModelConfig, dtype: str, sizes: Mapping[str, int]) -> int:
    signature = make_signature(graph, config, dtype)
    specs = (*signature.inputs, *signature.outputs)
    return sum(spec.nbytes(sizes) for spec in specs if not spec.name[1:].startswith("_ref."))


def _estimate(graph: str, config: ModelConfig, dtype: str, sizes: Mapping[str, int]) -> int:
    if graph in ("first_step", "cached_step"):
        parts = request_bytes(
            config,
            dtype,
            batch=sizes["batch"],
            image_tokens=sizes["image_tokens"],
            ref_tokens=sizes["ref_tokens"],
            text_tokens=sizes["text_tokens"],
        )
        return parts["activations"]
    if graph == "text_encoder":
        text = config.text_encoder
        width = 4 * text.hidden_size + 3 * text.intermediate_size
        return sizes["batch"] * sizes["text_tokens"] * width * ITEM_SIZE[dtype]
    # The widest feature map of the VAE three times over: 256 channels at full size for klein.
    return 3 * sizes["batch"] * sizes["height"] * sizes["width"] * 256 * ITEM_SIZE[dtype]


def component_bytes(artifacts: Path, graphs: GraphSet, precision: str) -> dict[str, int]:
    """Bytes of each component's weights on the device, every tensor counted once.

    Args:
        artifacts: the folder.
        graphs: its graphs; a component is a folder of them.
        precision: of the block linears of the transformer; the rest keeps the files' type.
    """
    total = {}
    components = {file.partition("/")[0] for file in graphs.files.values()}
    for component in sorted(components):
        refs = {
            ref: name
            for file in graphs.files.values()
            if file.startswith(f"{component}/")
            for name, ref in graph_weights(artifacts, file).items()
        }
        total[component] = sum(
            int(ref.nbytes / ITEM_SIZE[ref.dtype] * PRECISIONS[precision])
            if precision in ("fp8", "nvfp4")
            and component == "transformer"
            and name.startswith(_BLOCKS)
            and len(ref.shape) == 2
            else ref.nbytes
            for ref, name in refs.items()
        )
    return total


def plan_artifacts(
    artifacts: Path,
    gpu: str,
    requests: Iterable[Request],
    precisions: Iterable[str],
    engines: Path | None = None,
) -> list[MemoryPlan]:
    """Plans requests on an artifact folder.

    Args:
        artifacts: what `klein-kv export` wrote; only headers and manifests are read.
        gpu: name of a GPU with known memory.
        requests: what is to be made.
        precisions: keys of `PRECISIONS`.
        engines: folder of engines whose scratch counts; None takes the only one of that GPU's
            kind, if there is one.

    Raises:
        RequestError: an unknown GPU or precision.
        ArtifactError: the folder is not whole.
    """
    manifest = Manifest.load(artifacts, check_files=False)
    capacity = int(_gpu(gpu).memory * 1e9)
    scratch = _engine_scratch(artifacts, engines)
    plans = []
    for precision in precisions:
        if precision not in PRECISIONS:
            raise RequestError(
                f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}"
            )
        weights = component_bytes(artifacts, manifest.graphs, precision)
        plans += [
            make_plan(
                manifest.config,
                manifest.dtype,
                weights,
                request,
                capacity,
                precision=precision,
                scratch=scratch,
            )
            for request in requests
        ]
    return plans


def _gpu(name: str) -> Gpu:
    gpu = find_target(name).gpu
    if gpu is None:
        raise RequestError(f"the memory of {name} is not known; name another GPU, e.g. rtx5090")
    return gpu


def _engine_scratch(artifacts: Path, engines: Path | None) -> dict[str, int] | None:
    found = [engines] if engines is not None else find_engines(artifacts)
    if len(found) != 1:
        return None
    records = EngineManifest.load(found[0]).engines
    return {graph: record.scratch_bytes for graph, record in records.items()}


def text_from_plans(plans: list[MemoryPlan]) -> str:
    """One line per plan, then the parts of the first."""
    first = plans[0]
    lines = [
        f"{'precision':10} {'output':>10} {'refs':>4} {'batch':>5} {'K/V':>7} {'peak':>7} "
        f"of {first.capacity / 1e9:.0f} GB"
    ]
    for plan in plans:
        request = plan.request
        verdict = "fits" if plan.fits else "does NOT fit"
        if plan.fits and not plan.text_stays:
            verdict += ", text encoder loaded for each new prompt"
        lines.append(
            f"{plan.precision:10} {request.width:>5}x{request.height:<4} {request.references:>4} "
            f"{request.batch:>5} {plan.kv_bytes / 1e9:7.2f} {plan.peak / 1e9:7.2f} {verdict}"
        )
    lines.append(f"\n{first.precision}, {first.request.references} references, GB by stage:")
    for stage in first.stages:
        parts = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in stage.parts.items())
        lines.append(f"  {stage.name:13} {stage.total / 1e9:6.2f}  ({parts})")
    lines.append(f"scratch: {first.scratch_source}; reserved for CUDA: an estimate")
    return "\n".join(lines)
