"""What a precision costs: `klein-kv verify ARTIFACTS [CHECKPOINT] --precision fp8`.

Three runs of the same requests in torch, from the same noise: float32, bfloat16, and the quantized
layers simulated (`quantized_torch_ops`). float32 is the judge; what bfloat16 loses against it is
the noise floor below which nothing can be told. Errors are given

    by layer    on the layer's own inputs: output of the quantized layer against its own weight
    by block    on the block's inputs in float32
    end to end  text, reference keys and values, latents after each step, and images

Images are decoded by the VAE in float32, so that they show the networks' errors alone.
"""

import logging
from collections.abc import Mapping, Sequence
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
from klein_kv.export.checks.block_ops import (
    BlockTrace,
    ComparingOps,
    ErrorSum,
    ForcedOps,
    TracingOps,
)
from klein_kv.export.checks.float_vae import FloatVae
from klein_kv.export.checks.image_metrics import lpips_distance, lpips_missing, psnr, ssim
from klein_kv.export.checks.samples import Sample
from klein_kv.export.checks.torch_loop import (
    LoopRequest,
    encode_prompt,
    prepare_request,
    reference_kv,
    run_step,
)
from klein_kv.networks.quantized_torch_ops import QuantizedOps, round_to_fp8
from klein_kv.networks.torch_ops import TorchOps

__all__ = ["LEAST_SNR", "ErrorRow", "ImageRow", "QualityReport", "measure_quality"]

_log = logging.getLogger(__name__)

LEAST_SNR = {"fp8": 15.0, "nvfp4": 8.0}
"""A layer's signal-to-noise ratio in dB below which something other than rounding is at work. A
scale that is off by 2 gives 6 dB or less, exchanged halves of bytes about 0; rounding normally
distributed numbers gives about 28 (fp8) and 17 (nvfp4)."""

STEPS = 4


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """Errors of one quantity.

    Attributes:
        name: layer, block, or what came out.
        fp32: of the precision against float32; for a layer against its own weight.
        bf16: of the precision against bfloat16; None for a layer.
        floor: of bfloat16 against float32; None for a layer.
    """

    name: str
    fp32: ErrorSum
    bf16: ErrorSum | None = None
    floor: ErrorSum | None = None


@dataclass(frozen=True, slots=True)
class ImageRow:
    """Likeness of one image.

    Attributes:
        name: the request.
        pair: what is compared, e.g. "fp8 to fp32".
        psnr: dB, infinite for equal images.
        ssim: 1 for equal images.
        lpips: 0 for equal images; None where LPIPS cannot run.
    """

    name: str
    pair: str
    psnr: float
    ssim: float
    lpips: float | None


@dataclass(frozen=True, slots=True)
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
        lpips_missing: why there is no LPIPS; "" if there is.
        least: `LEAST_SNR` of each layer's format, by name.
    """

    precision: str
    reference: str
    samples: int
    layers: list[ErrorRow]
    blocks: list[ErrorRow]
    ends: list[ErrorRow]
    images: list[ImageRow]
    lpips_missing: str
    least: dict[str, float] = field(default_factory=dict)

    @property
    def failed(self) -> list[ErrorRow]:
        """Layers whose error is larger than rounding explains."""
        return [row for row in self.layers if not row.fp32.snr >= self.least[row.name]]


@dataclass(slots=True)
class _Errors:
    """Three comparisons of one quantity, added up."""

    fp32: ErrorSum = field(default_factory=ErrorSum)
    bf16: ErrorSum = field(default_factory=ErrorSum)
    floor: ErrorSum = field(default_factory=ErrorSum)

    def add(self, judge: torch.Tensor, floor: torch.Tensor, subject: torch.Tensor) -> None:
        self.fp32.add(subject, judge)
        self.bf16.add(subject, floor)
        self.floor.add(floor, judge)


@dataclass(frozen=True, slots=True)
class _Networks:
    """The three ways to compute one network."""

    judge: TorchOps
    floor: TorchOps
    subject: ComparingOps

    @property
    def all(self) -> tuple[TorchOps, TorchOps, TorchOps]:
        return self.judge, self.floor, self.subject


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
    label = precision + (", fp8 attention" if attention else ", fp8 K/V" if kv else "")
    layer_errors: dict[str, ErrorSum] = {}
    networks = {
        component: _networks(
            artifacts, manifest, component, parts.get(component), checkpoint, device, layer_errors
        )
        for component in ("transformer", "text_encoder")
    }
    scales = None
    if kv or attention:
        own = component_weights(artifacts, manifest, "transformer")
        scales = attention_scales(manifest.config.transformer, parts["transformer"].attention, own)
    if attention:
        networks["transformer"].subject.attention_scales = scales
    measured = _Measured(label)
    vae = FloatVae(artifacts, manifest)
    progress: Any = tqdm(total=len(samples) * (STEPS + 1), desc="measuring", disable=None)
    with torch.inference_mode(), progress as bar:
        for i, sample in enumerate(samples):
            request = prepare_request(sample, manifest, vae, STEPS)
            texts = [
                encode_prompt(ops, artifacts, manifest, sample.prompt, text_tokens)
                for ops in networks["text_encoder"].all
            ]
            measured.end("text embeddings").add(*texts)
            bar.update()
            finals = _run(networks["transformer"], manifest, request, texts, scales, measured, bar)
            name = f"request {i + 1}, {len(sample.images)} references"
            measured.image(name, *(_decode(vae, request, x) for x in finals))
    formats = {
        name: linear.format for part in parts.values() for name, linear in part.linears.items()
    }
    return QualityReport(
        precision=label,
        reference="the artifacts' own weights" if checkpoint is None else str(checkpoint),
        samples=len(samples),
        layers=[ErrorRow(name, layer_errors[name]) for name in formats if name in layer_errors],
        blocks=[ErrorRow(n, e.fp32, e.bf16, e.floor) for n, e in measured.blocks.items()],
        ends=[ErrorRow(n, e.fp32, e.bf16, e.floor) for n, e in measured.ends.items()],
        images=measured.images,
        lpips_missing=measured.lpips_missing,
        least={name: LEAST_SNR[kind] for name, kind in formats.items()},
    )


def _networks(
    artifacts: Path,
    manifest: Manifest,
    component: str,
    quantized: QuantizedComponent | None,
    checkpoint: Path | None,
    device: str,
    errors: dict[str, ErrorSum],
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
    weights = MappedWeights(own, dtype, device)
    linears = {} if quantized is None else quantized.linears
    return _Networks(
        TorchOps(MappedWeights(reference, torch.float32, device), torch.float32),
        TorchOps(MappedWeights(reference, torch.bfloat16, device), torch.bfloat16),
        ComparingOps(weights, dtype, linears, errors),
    )


class _Measured:
    """Errors by name, and images."""

    def __init__(self, precision: str) -> None:
        self.precision = precision
        self.blocks: dict[str, _Errors] = {}
        self.ends: dict[str, _Errors] = {}
        self.images: list[ImageRow] = []
        self.lpips_missing = lpips_missing()

    def end(self, name: str) -> _Errors:
        return self.ends.setdefault(name, _Errors())

    def image(self, name: str, judge: Any, floor: Any, subject: Any) -> None:
        for pair, a, b in (
            (f"{self.precision} to fp32", subject, judge),
            (f"{self.precision} to bf16", subject, floor),
            ("bf16 to fp32", floor, judge),
        ):
            lpips = None if self.lpips_missing else lpips_distance(a, b)
            self.images.append(ImageRow(name, pair, psnr(a, b), ssim(a, b), lpips))


def _decode(vae: FloatVae, request: LoopRequest, latents: torch.Tensor) -> Any:
    grid = latents.float().cpu().reshape(1, *request.grid, -1)
    return vae.decode(grid.numpy())[0]


def _run(
    networks: _Networks,
    manifest: Manifest,
    request: LoopRequest,
    texts: Sequence[torch.Tensor],
    scales: Mapping[str, AttentionScales] | None,
    measured: _Measured,
    bar: Any,
) -> list[torch.Tensor]:
    """Three whole loops, and the blocks of each of their steps; returns the final latents."""
    keys: list[list[torch.Tensor]] = [[], [], []]
    if manifest.variant == "kv":
        keys = [reference_kv(ops, manifest, request) for ops in _free(networks)]
        if scales is not None:
            keys[2] = _round_kv(keys[2], kv_scales(manifest.config.transformer, scales))
        if request.references is not None:
            for three in zip(*keys, strict=True):
                measured.end("reference keys and values").add(*three)
            _blocks(networks, measured, lambda ops: reference_kv(ops, manifest, request))
    latents = [request.noise] * 3
    for step in range(request.schedule.num_steps):
        before = latents[0]
        latents = [
            run_step(ops, manifest, request, step, x, text, kv)
            for ops, x, text, kv in zip(_free(networks), latents, texts, keys, strict=True)
        ]
        measured.end(f"latents after step {step + 1}").add(*latents)
        _blocks(
            networks,
            measured,
            lambda ops, step=step, before=before: run_step(
                ops, manifest, request, step, before, texts[0], keys[0]
            ),
        )
        bar.update()
    return latents


def _free(networks: _Networks) -> tuple[TorchOps, TorchOps, TorchOps]:
    """The three, without comparing layers: that is done once, on the inputs of float32."""
    judge, floor, subject = networks.judge, networks.floor, networks.subject
    return (
        judge,
        floor,
        QuantizedOps(subject.weights, subject.dtype, subject.quantized, subject.attention_scales),
    )


def _round_kv(kv: Sequence[torch.Tensor], scales: Sequence[float]) -> list[torch.Tensor]:
    """Keys and values as graphs hand them on in float8 with constant scales."""
    return [round_to_fp8(x, scale).to(x.dtype) for x, scale in zip(kv, scales, strict=True)]


def _blocks(networks: _Networks, measured: _Measured, run: Any) -> None:
    tracing = TracingOps(networks.judge)
    run(tracing)
    trace: BlockTrace = tracing.trace
    outputs = []
    for ops in (networks.floor, networks.subject):
        forced = ForcedOps(ops, trace)
        run(forced)
        outputs.append(forced.outputs)
    for i, block in trace.starts():
        if block:
            errors = measured.blocks.setdefault(block, _Errors())
            errors.add(trace.streams[i], *(held[i] for held in outputs))
