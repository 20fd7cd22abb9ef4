"""What a precision costs: `klein-kv verify ARTIFACTS [CHECKPOINT] --precision fp8`.

Three runs of the same requests in torch, from the same noise: float32, bfloat16, and the quantized
layers simulated (`quantized_torch_ops`). float32 is the judge; what bfloat16 loses against it is
the noise floor below which nothing can be told. Errors are given

    by layer    on its inputs in float32: output of the quantized layer against its own weight
    by block    on its inputs in float32
    end to end  text, reference keys and values, latents after each step, and images

Images are decoded by the VAE in float32, so that they show the networks' errors alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from klein_kv.artifacts.attention_scales import attention_scales, kv_scales
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.quantized_weights import load_quantized
from klein_kv.artifacts.weights import WeightRef
from klein_kv.errors import RequestError
from klein_kv.export.checkpoints.weight_index import UNREAD_TEXT, check_weights, read_folder
from klein_kv.export.checks.artifact_weights import (
    MappedWeights,
    component_parameters,
    component_weights,
)
from klein_kv.export.checks.block_ops import ComparingOps
from klein_kv.export.checks.compare import Difference, psnr, ssim
from klein_kv.export.checks.float_vae import FloatVae
from klein_kv.export.checks.samples import Sample
from klein_kv.export.checks.tolerances import TOLERANCES
from klein_kv.export.checks.torch_loop import (
    LoopRequest,
    encode_prompt,
    prepare_request,
    reference_kv,
    run_loop,
)
from klein_kv.networks.quantized_torch_ops import QuantizedOps, round_to_fp8
from klein_kv.networks.torch_ops import TorchOps

__all__ = [
    "Errors",
    "Likeness",
    "QualityReport",
    "dict_from_report",
    "measure_quality",
    "text_from_report",
]

_STEPS, _WORST = 4, 5

Three = tuple[TorchOps, TorchOps, TorchOps]
"""A network in float32, which is the judge, in bfloat16 and in the precision."""


@dataclass(frozen=True, slots=True)
class Errors:
    """How far the precision, and bfloat16, are from float32, added up over all requests."""

    subject: Difference = field(default_factory=Difference)
    floor: Difference = field(default_factory=Difference)

    def add(self, judge: torch.Tensor, floor: torch.Tensor, subject: torch.Tensor) -> None:
        """Adds what the three networks gave."""
        self.subject.add(subject, judge)
        self.floor.add(floor, judge)


@dataclass(frozen=True, slots=True)
class Likeness:
    """PSNR in dB and SSIM of an image to that of float32; infinite and 1 for equal ones."""

    psnr: float
    ssim: float


@dataclass(slots=True)
class QualityReport:
    """Everything that was measured."""

    precision: str
    reference: str  # whose weights the float32 and bfloat16 runs used
    samples: int  # number of requests
    bounds: dict[str, float]  # relative error of each layer above which it is more than rounding
    # of the layers that were run, against their own weights
    layers: dict[str, Difference] = field(default_factory=dict)
    blocks: dict[str, Errors] = field(default_factory=dict)
    ends: dict[str, Errors] = field(default_factory=dict)  # text, keys and values, latents
    # of each request, of the precision and of bfloat16
    images: dict[str, tuple[Likeness, Likeness]] = field(default_factory=dict)

    @property
    def failed(self) -> list[str]:
        """Layers whose error is larger than rounding explains."""
        # Not `>`: NaN fails too.
        return [x for x, error in self.layers.items() if not error.relative <= self.bounds[x]]


def measure_quality(
    artifacts: Path,
    precision: str,
    samples: Sequence[Sample],
    *,
    checkpoint: Path | None = None,
    kv: bool = False,
    attention: bool = False,
    device: str | None = None,
    text_tokens: int = 512,
) -> QualityReport:
    """Measures a precision of an artifact folder.

    Weights are mapped and used one at a time; the memory that is needed is that of one request's
    activations: the residual streams of all blocks.

    Args:
        artifacts: the folder.
        precision: one of its precisions.
        samples: requests to run; better not those of calibration.
        checkpoint: folder in diffusers layout whose weights the float32 and bfloat16 runs use; None
            takes the artifacts' own.
        kv: reference keys and values in float8 with constant scales too.
        attention: the transformer's attention in float8 too, and with it keys and values.
        device: "cpu" or "cuda"; None takes a GPU where there is one.
        text_tokens: prompt tokens.

    Raises:
        ArtifactError: the folder is not whole, or does not hold the precision.
        CheckpointError: the checkpoint does not fit the artifacts.
    """
    manifest = Manifest.load(artifacts)
    manifest.precision_files(precision)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    parts = {
        component: load_quantized(artifacts, component, name)
        for component, name in manifest.precisions[precision].items()
    }
    linears = {component: part.linears for component, part in parts.items()}
    kv_constants: list[float] = []
    scales = None
    if kv or attention:
        net = manifest.config.transformer
        own = component_weights(artifacts, manifest, "transformer")
        scales = attention_scales(net, parts["transformer"].attention, own)
        kv_constants = kv_scales(net, scales)
    report = QualityReport(
        precision + (", fp8 attention" if attention else ", fp8 K/V" if kv else ""),
        "the artifacts' own weights" if checkpoint is None else str(checkpoint),
        len(samples),
        {
            name: TOLERANCES["layer", layer.format].bound
            for layers in linears.values()
            for name, layer in layers.items()
        },
    )

    def note(block: str, judge: torch.Tensor, floor: torch.Tensor, subject: torch.Tensor) -> None:
        report.blocks.setdefault(block, Errors()).add(judge, floor, subject)

    def networks(component: str) -> Three:
        own = component_weights(artifacts, manifest, component)
        reference = own if checkpoint is None else _reference(checkpoint, manifest, component)
        dtype: torch.dtype = getattr(torch, manifest.dtype)
        fp8 = scales if attention and component == "transformer" else None
        weights = MappedWeights(own, dtype, device)
        subject = QuantizedOps(weights, dtype, linears.get(component, {}), fp8)
        floor = TorchOps(MappedWeights(reference, torch.bfloat16, device), torch.bfloat16)
        exact = MappedWeights(reference, torch.float32, device)
        return ComparingOps(exact, floor, subject, report.layers, note), floor, subject

    text, transformer = networks("text_encoder"), networks("transformer")
    vae = FloatVae(artifacts, manifest)
    progress: Any = tqdm(total=len(samples) * (_STEPS + 1), desc="measuring", disable=None)
    with torch.inference_mode(), progress as bar:
        for i, sample in enumerate(samples):
            request = prepare_request(sample, manifest, vae, _STEPS)
            texts = [
                encode_prompt(ops, artifacts, manifest, sample.prompt, text_tokens) for ops in text
            ]
            report.ends.setdefault("text embeddings", Errors()).add(*texts)
            bar.update()
            finals = _run(transformer, manifest, request, texts, kv_constants, report, bar)
            judge, *others = (
                vae.decode(x.float().cpu().reshape(1, *request.grid, -1).numpy())[0] for x in finals
            )
            floor, subject = (Likeness(psnr(x, judge), ssim(x, judge)) for x in others)
            name = f"request {i + 1}, {len(sample.images)} references"
            report.images[name] = subject, floor
    report.layers = {x: report.layers[x] for x in report.bounds if x in report.layers}
    return report


def _reference(checkpoint: Path, manifest: Manifest, component: str) -> Mapping[str, WeightRef]:
    weights = read_folder(checkpoint / component, component)
    shapes = component_parameters(manifest.config, component)
    check_weights(component, weights, shapes, UNREAD_TEXT)
    wrong = [name for name, weight in weights.items() if not isinstance(weight, WeightRef)]
    if wrong:
        raise RequestError(
            f"{checkpoint}: {wrong[0]} is quantized, expected the checkpoint that quantized "
            "weights are measured against, in bf16 or float32"
        )
    return {name: weight for name, weight in weights.items() if isinstance(weight, WeightRef)}


def _run(
    networks: Three,
    manifest: Manifest,
    request: LoopRequest,
    texts: Sequence[torch.Tensor],
    kv_constants: Sequence[float],
    report: QualityReport,
    bar: Any,
) -> tuple[torch.Tensor, ...]:
    """Three whole loops; returns the final latents."""
    keys = [reference_kv(ops, manifest, request) for ops in networks]
    if kv_constants:  # as graphs hand them on in float8 with constant scales
        pairs = zip(keys[2], kv_constants, strict=True)
        keys[2] = [round_to_fp8(x, scale).to(x.dtype) for x, scale in pairs]
    if request.references.shape[1]:
        for three in zip(*keys, strict=True):
            report.ends.setdefault("reference keys and values", Errors()).add(*three)
    loops = [
        run_loop(ops, manifest, request, text, kv)
        for ops, text, kv in zip(networks, texts, keys, strict=True)
    ]
    latents: tuple[torch.Tensor, ...] = ()
    for step, latents in enumerate(zip(*loops, strict=True), start=1):
        report.ends.setdefault(f"latents after step {step}", Errors()).add(*latents)
        bar.update()
    return latents


def dict_from_report(report: QualityReport) -> dict[str, Any]:
    """Plain values; infinite ratios (no error at all) become null."""
    both = f"{report.precision} to fp32", "bf16 to fp32"
    blocks, ends = (
        [
            {"name": name, both[0]: _values(x.subject), both[1]: _values(x.floor)}
            for name, x in rows.items()
        ]
        for rows in (report.blocks, report.ends)
    )
    return {
        "ok": not report.failed,
        "precision": report.precision,
        "reference": report.reference,
        "samples": report.samples,
        "layers": [
            {"name": name, "least_snr": -20 * math.log10(report.bounds[name]), **_values(error)}
            for name, error in report.layers.items()
        ],
        "blocks": blocks,
        "end_to_end": ends,
        "images": [
            {"name": name, "pair": pair, "psnr": _finite(x.psnr), "ssim": x.ssim}
            for name, two in report.images.items()
            for pair, x in zip(both, two, strict=True)
        ],
    }


def _values(error: Difference) -> dict[str, Any]:
    values = {"snr_db": error.snr, "max_abs": error.max, "cosine": error.cosine}
    return {name: _finite(value) for name, value in values.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def text_from_report(report: QualityReport) -> str:
    """Tables: every block, what came out, the worst layers, images."""
    worst = sorted(report.layers, key=lambda name: report.layers[name].snr)[:_WORST]
    lines = [
        f"{report.precision} over {report.samples} requests; fp32 and bf16 are {report.reference}",
        "SNR in dB (each 6 halve the error), largest difference, cosine",
    ]
    for title, rows in (
        ("blocks, on their inputs in fp32", report.blocks),
        ("end to end", report.ends),
    ):
        width = max(len(name) for name in (*rows, title))
        lines.append(
            f"\n{title:{width}} {report.precision + ' to fp32':^27} | {'bf16 to fp32':^27}"
        )
        lines += [
            f"{name:{width}} {_columns(x.subject):27} | {_columns(x.floor)}"
            for name, x in rows.items()
        ]
    title = f"the {len(worst)} worst of {len(report.layers)} layers"
    lines.append(f"\n{title}, on their inputs in fp32, to their own weights")
    for name in worst:
        mark = "  FAILED" if name in report.failed else ""
        lines.append(f"{name:48} {_columns(report.layers[name])}{mark}")
    lines.append(
        f"\n{'images to those of fp32':28} {'PSNR':>7} {'SSIM':>8} {'bf16':>9} {'SSIM':>8}"
    )
    lines += [
        f"{name:28} {x.psnr:7.2f} {x.ssim:8.5f} {floor.psnr:9.2f} {floor.ssim:8.5f}"
        for name, (x, floor) in report.images.items()
    ]
    if report.failed:
        lines.append(
            f"{len(report.failed)} layers have a larger error than rounding explains: their "
            "numbers or scales are damaged, or the calibration's requests were too unlike these"
        )
    return "\n".join(lines)


def _columns(error: Difference) -> str:
    return f"{error.snr:7.2f} {error.max:9.2e} {error.cosine:9.6f}"
