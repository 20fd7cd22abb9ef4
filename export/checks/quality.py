"""What a precision costs: `klein-kv verify ARTIFACTS [CHECKPOINT] --precision fp8`.

Three runs of the same requests in torch, from the same noise: float32, bfloat16, and the quantized
layers simulated (`quantized_torch_ops`). float32 is the judge; what bfloat16 loses against it is
the noise floor below which nothing can be told. Errors are given

    by layer    on the layer's own inputs: output of the quantized layer against its own weight
    by block    on the block's inputs in float32
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

from klein_kv.artifacts.attention_scales import AttentionScales, attention_scales, kv_scales
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.numbers import QuantizedLinear
from klein_kv.artifacts.quantized_weights import load_quantized
from klein_kv.artifacts.weights import WeightIndex, WeightRef
from klein_kv.export.checks.artifact_weights import (
    MappedWeights,
    component_parameters,
    component_weights,
)
from klein_kv.export.checks.block_ops import BlockComparingOps, ComparingOps
from klein_kv.export.checks.compare import Difference, psnr, ssim
from klein_kv.export.checks.float_vae import FloatVae
from klein_kv.export.checks.samples import Sample
from klein_kv.export.checks.tolerances import TOLERANCES, Tolerance
from klein_kv.export.checks.torch_loop import (
    LoopRequest,
    encode_prompt,
    prepare_request,
    reference_kv,
    run_step,
)
from klein_kv.networks.quantized_torch_ops import QuantizedOps, round_to_fp8
from klein_kv.networks.torch_ops import TorchOps

__all__ = [
    "ErrorRow",
    "ImageRow",
    "QualityReport",
    "dict_from_report",
    "measure_quality",
    "text_from_report",
]

_STEPS, _WORST = 4, 5


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """Errors of one quantity, added up over all requests.

    Attributes:
        name: layer, block, or what came out.
        fp32: of the precision against float32; for a layer against its own weight.
        floor: of bfloat16 against float32; nothing is added to it for a layer.
        tolerance: of a layer: a larger error is more than rounding.
    """

    name: str
    fp32: Difference = field(default_factory=Difference)
    floor: Difference = field(default_factory=Difference)
    tolerance: Tolerance | None = None

    def add(self, judge: torch.Tensor, floor: torch.Tensor, subject: torch.Tensor) -> None:
        """Adds what float32, bfloat16 and the precision gave."""
        self.fp32.add(subject, judge)
        self.floor.add(floor, judge)


@dataclass(frozen=True, slots=True)
class ImageRow:
    """Likeness of the images of one request to those of float32.

    Attributes:
        name: the request.
        psnr: dB, infinite for equal images.
        ssim: 1 for equal images.
        floor_psnr: of bfloat16's image.
        floor_ssim: of bfloat16's image.
    """

    name: str
    psnr: float
    ssim: float
    floor_psnr: float
    floor_ssim: float


@dataclass(slots=True)
class QualityReport:
    """Everything that was measured.

    Attributes:
        precision: what was measured.
        reference: whose weights the float32 and bfloat16 runs used.
        samples: number of requests.
        layers: by quantized layer, the transformer's first.
        blocks: by block.
        ends: text, keys and values, latents.
        images: by request.
    """

    precision: str
    reference: str
    samples: int
    layers: list[ErrorRow] = field(default_factory=list)
    blocks: list[ErrorRow] = field(default_factory=list)
    ends: list[ErrorRow] = field(default_factory=list)
    images: list[ImageRow] = field(default_factory=list)

    @property
    def failed(self) -> list[ErrorRow]:
        """Layers whose error is larger than rounding explains."""
        return [
            row
            for row in self.layers
            if row.tolerance is not None and not row.fp32.relative <= row.tolerance.bound
        ]

    def row(self, rows: list[ErrorRow], name: str) -> ErrorRow:
        """The row of that name, a new one if there is none."""
        for row in rows:
            if row.name == name:
                return row
        rows.append(ErrorRow(name))
        return rows[-1]


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
    scales = None
    if kv or attention:
        own = component_weights(artifacts, manifest, "transformer")
        scales = attention_scales(manifest.config.transformer, parts["transformer"].attention, own)
    report = QualityReport(
        precision + (", fp8 attention" if attention else ", fp8 K/V" if kv else ""),
        "the artifacts' own weights" if checkpoint is None else str(checkpoint),
        len(samples),
    )
    layers: dict[str, Difference] = {}
    text, transformer = (
        _networks(
            artifacts,
            manifest,
            component,
            {} if component not in parts else parts[component].linears,
            checkpoint,
            device,
            report,
            layers,
            scales if attention and component == "transformer" else None,
        )
        for component in ("text_encoder", "transformer")
    )
    vae = FloatVae(artifacts, manifest)
    progress: Any = tqdm(total=len(samples) * (_STEPS + 1), desc="measuring", disable=None)
    with torch.inference_mode(), progress as bar:
        for i, sample in enumerate(samples):
            request = prepare_request(sample, manifest, vae, _STEPS)
            texts = [
                encode_prompt(ops, artifacts, manifest, sample.prompt, text_tokens) for ops in text
            ]
            report.row(report.ends, "text embeddings").add(*texts)
            bar.update()
            finals = _run(transformer, manifest, request, texts, scales, report, bar)
            judge, floor, subject = (
                vae.decode(x.float().cpu().reshape(1, *request.grid, -1).numpy())[0] for x in finals
            )
            report.images.append(
                ImageRow(
                    f"request {i + 1}, {len(sample.images)} references",
                    psnr(subject, judge),
                    ssim(subject, judge),
                    psnr(floor, judge),
                    ssim(floor, judge),
                )
            )
    for part in parts.values():
        for name, linear in part.linears.items():
            if name in layers:
                tolerance = TOLERANCES["layer", linear.format]
                report.layers.append(ErrorRow(name, layers[name], tolerance=tolerance))
    return report


def _networks(
    artifacts: Path,
    manifest: Manifest,
    component: str,
    linears: Mapping[str, QuantizedLinear],
    checkpoint: Path | None,
    device: str,
    report: QualityReport,
    layers: dict[str, Difference],
    attention: Mapping[str, AttentionScales] | None,
) -> tuple[TorchOps, TorchOps, TorchOps]:
    """A network in float32, which is the judge, in bfloat16 and in the precision."""
    own: Mapping[str, WeightRef] = component_weights(artifacts, manifest, component)
    reference = own
    if checkpoint is not None:
        index = WeightIndex.from_folder(checkpoint / component, component)
        index.expect(
            component_parameters(manifest.config, component),
            ignore=("model.layers.", "model.norm.", "lm_head."),
        )
        reference = index
    dtype: torch.dtype = getattr(torch, manifest.dtype)
    weights = MappedWeights(own, dtype, device)
    exact = MappedWeights(reference, torch.float32, device)
    floor = TorchOps(MappedWeights(reference, torch.bfloat16, device), torch.bfloat16)
    comparing = ComparingOps(weights, dtype, linears, layers, attention)
    if component == "text_encoder":  # it has no blocks that could be run alone
        return TorchOps(exact, torch.float32), floor, comparing

    def note(block: str, judge: torch.Tensor, others: list[torch.Tensor]) -> None:
        report.row(report.blocks, block).add(judge, *others)

    judge = BlockComparingOps(exact, torch.float32, (floor, comparing), note)
    return judge, floor, QuantizedOps(weights, dtype, linears, attention)


def _run(
    networks: tuple[TorchOps, TorchOps, TorchOps],
    manifest: Manifest,
    request: LoopRequest,
    texts: Sequence[torch.Tensor],
    scales: Mapping[str, AttentionScales] | None,
    report: QualityReport,
    bar: Any,
) -> list[torch.Tensor]:
    """Three whole loops; returns the final latents."""
    keys: list[list[torch.Tensor]] = [[], [], []]
    if manifest.variant == "kv":
        keys = [reference_kv(ops, manifest, request) for ops in networks]
        if scales is not None:  # as graphs hand them on in float8 with constant scales
            constants = kv_scales(manifest.config.transformer, scales)
            keys[2] = [
                round_to_fp8(x, scale).to(x.dtype)
                for x, scale in zip(keys[2], constants, strict=True)
            ]
        if request.references is not None:
            for three in zip(*keys, strict=True):
                report.row(report.ends, "reference keys and values").add(*three)
    latents = [request.noise] * 3
    for step in range(request.schedule.num_steps):
        latents = [
            run_step(ops, manifest, request, step, x, text, kv)
            for ops, x, text, kv in zip(networks, latents, texts, keys, strict=True)
        ]
        report.row(report.ends, f"latents after step {step + 1}").add(*latents)
        bar.update()
    return latents


def dict_from_report(report: QualityReport) -> dict[str, Any]:
    """Plain values; infinite ratios (no error at all) become null."""
    both = f"{report.precision} to fp32", "bf16 to fp32"
    blocks, ends = (
        [
            {"name": row.name, both[0]: _values(row.fp32), both[1]: _values(row.floor)}
            for row in rows
        ]
        for rows in (report.blocks, report.ends)
    )
    return {
        "ok": not report.failed,
        "precision": report.precision,
        "reference": report.reference,
        "samples": report.samples,
        "layers": [
            {
                "name": row.name,
                "least_snr": None
                if row.tolerance is None
                else -20 * math.log10(row.tolerance.bound),
                **_values(row.fp32),
            }
            for row in report.layers
        ],
        "blocks": blocks,
        "end_to_end": ends,
        "images": [
            {"name": row.name, "pair": pair, "psnr": _finite(likeness[0]), "ssim": likeness[1]}
            for row in report.images
            for pair, likeness in zip(
                both, ((row.psnr, row.ssim), (row.floor_psnr, row.floor_ssim)), strict=True
            )
        ],
    }


def _values(error: Difference) -> dict[str, Any]:
    return {
        "snr_db": _finite(error.snr),
        "max_abs": _finite(error.max),
        "cosine": _finite(error.cosine),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def text_from_report(report: QualityReport) -> str:
    """Tables: every block, what came out, the worst layers, images."""
    worst = sorted(report.layers, key=lambda row: row.fp32.snr)[:_WORST]
    title = f"the {len(worst)} worst of {len(report.layers)} layers"
    lines = [
        f"{report.precision} over {report.samples} requests; fp32 and bf16 are {report.reference}",
        "SNR in dB (each 6 halve the error), largest difference, cosine",
        "",
        *_table("blocks, on their inputs in fp32", report.blocks, report.precision),
        "",
        *_table("end to end", report.ends, report.precision),
        "",
        f"{title}, on their own inputs, to their own weights",
    ]
    for row in worst:
        mark = "  FAILED" if row in report.failed else ""
        lines.append(f"{row.name:48} {_columns(row.fp32)}{mark}")
    lines += ["", f"{'images to those of fp32':28} {'PSNR':>7} {'SSIM':>8} {'bf16':>9} {'SSIM':>8}"]
    lines += [
        f"{row.name:28} {row.psnr:7.2f} {row.ssim:8.5f} {row.floor_psnr:9.2f} {row.floor_ssim:8.5f}"
        for row in report.images
    ]
    if report.failed:
        lines.append(
            f"{len(report.failed)} layers have a larger error than rounding explains: their "
            "numbers or scales are damaged, or the calibration's requests were too unlike these"
        )
    return "\n".join(lines)


def _table(title: str, rows: list[ErrorRow], precision: str) -> list[str]:
    width = max([len(row.name) for row in rows] + [28, len(title)])
    head = f"{title:{width}} {precision + ' to fp32':^27} | {'bf16 to fp32':^27}"
    return [head] + [
        f"{row.name:{width}} {_columns(row.fp32):27} | {_columns(row.floor)}" for row in rows
    ]


def _columns(error: Difference) -> str:
    return f"{error.snr:7.2f} {error.max:9.2e} {error.cosine:9.6f}"
