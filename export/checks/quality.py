"""What a precision costs: `klein-kv verify ARTIFACTS [CHECKPOINT] --precision fp8`.

Three runs of the same requests in torch, from the same noise: float32, bfloat16, and the quantized
layers simulated (`quantized_torch_ops`). float32 is the judge; what bfloat16 loses against it is
the noise floor below which nothing can be told. Errors are given

    by layer    on the layer's own inputs: output of the quantized layer against its own weight
    by block    on the block's inputs in float32
    end to end  text, reference keys and values, latents after each step, and images

Images are decoded by the VAE in float32, so that they show the networks' errors alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from klein_kv.artifacts.attention_scales import AttentionScales, attention_scales, kv_scales
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.quantized_weights import QuantizedComponent, load_quantized
from klein_kv.artifacts.weights import WeightIndex, WeightRef
from klein_kv.export.checks.artifact_weights import (
    MappedWeights,
    component_parameters,
    component_weights,
)
from klein_kv.export.checks.block_ops import ComparingOps, ForcedOps, TracingOps
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

__all__ = ["ErrorRow", "ImageRow", "QualityReport", "measure_quality"]

_STEPS = 4


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


@dataclass(frozen=True, slots=True)
class _Networks:
    """The three ways to compute one network."""

    judge: TorchOps
    floor: TorchOps
    subject: ComparingOps

    @property
    def quiet(self) -> tuple[TorchOps, TorchOps, TorchOps]:
        """The three, without comparing layers: that is done once, on the inputs of float32."""
        ops = self.subject
        subject = QuantizedOps(ops.weights, ops.dtype, ops.quantized, ops.attention_scales)
        return self.judge, self.floor, subject


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
    layers: dict[str, Difference] = {}
    text, transformer = (
        _networks(artifacts, manifest, name, parts.get(name), checkpoint, device, layers)
        for name in ("text_encoder", "transformer")
    )
    scales = None
    if kv or attention:
        own = component_weights(artifacts, manifest, "transformer")
        scales = attention_scales(manifest.config.transformer, parts["transformer"].attention, own)
    if attention:
        transformer.subject.attention_scales = scales
    report = QualityReport(
        precision + (", fp8 attention" if attention else ", fp8 K/V" if kv else ""),
        "the artifacts' own weights" if checkpoint is None else str(checkpoint),
        len(samples),
    )
    vae = FloatVae(artifacts, manifest)
    progress: Any = tqdm(total=len(samples) * (_STEPS + 1), desc="measuring", disable=None)
    with torch.inference_mode(), progress as bar:
        for i, sample in enumerate(samples):
            request = prepare_request(sample, manifest, vae, _STEPS)
            texts = [
                encode_prompt(ops, artifacts, manifest, sample.prompt, text_tokens)
                for ops in (text.judge, text.floor, text.subject)
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
    quantized: QuantizedComponent | None,
    checkpoint: Path | None,
    device: str,
    errors: dict[str, Difference],
) -> _Networks:
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
    linears = {} if quantized is None else quantized.linears
    return _Networks(
        TorchOps(MappedWeights(reference, torch.float32, device), torch.float32),
        TorchOps(MappedWeights(reference, torch.bfloat16, device), torch.bfloat16),
        ComparingOps(MappedWeights(own, dtype, device), dtype, linears, errors),
    )


def _run(
    networks: _Networks,
    manifest: Manifest,
    request: LoopRequest,
    texts: Sequence[torch.Tensor],
    scales: Mapping[str, AttentionScales] | None,
    report: QualityReport,
    bar: Any,
) -> list[torch.Tensor]:
    """Three whole loops, and the blocks of each of their steps; returns the final latents."""
    keys: list[list[torch.Tensor]] = [[], [], []]
    if manifest.variant == "kv":
        keys = [reference_kv(ops, manifest, request) for ops in networks.quiet]
        if scales is not None:  # as graphs hand them on in float8 with constant scales
            constants = kv_scales(manifest.config.transformer, scales)
            keys[2] = [
                round_to_fp8(x, scale).to(x.dtype)
                for x, scale in zip(keys[2], constants, strict=True)
            ]
        if request.references is not None:
            for three in zip(*keys, strict=True):
                report.row(report.ends, "reference keys and values").add(*three)
            _blocks(networks, report, lambda ops: reference_kv(ops, manifest, request))
    latents = [request.noise] * 3
    for step in range(request.schedule.num_steps):
        before = latents[0]
        latents = [
            run_step(ops, manifest, request, step, x, text, kv)
            for ops, x, text, kv in zip(networks.quiet, latents, texts, keys, strict=True)
        ]
        report.row(report.ends, f"latents after step {step + 1}").add(*latents)

        def again(ops: Any, step: int = step, before: torch.Tensor = before) -> object:
            return run_step(ops, manifest, request, step, before, texts[0], keys[0])

        _blocks(networks, report, again)
        bar.update()
    return latents


def _blocks(networks: _Networks, report: QualityReport, run: Callable[[Any], object]) -> None:
    tracing = TracingOps(networks.judge)
    run(tracing)
    floor, subject = (ForcedOps(ops, tracing.trace) for ops in (networks.floor, networks.subject))
    run(floor)
    run(subject)
    for i, block in tracing.trace.starts():
        if block:
            judge = tracing.trace.streams[i]
            report.row(report.blocks, block).add(judge, floor.outputs[i], subject.outputs[i])
