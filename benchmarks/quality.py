"""What is lost: held-out edits of the pocket checkpoint, scored against their right answers.

    python -m benchmarks.quality ARTIFACTS_FP32 ARTIFACTS_BF16 [--count 8] [--only bf16 nvfp4]

ARTIFACTS_BF16 has been quantized to fp8 and nvfp4. Each task's edits are the same for every
variant, and so is their noise. "pipeline" is `KleinKVPipeline` on the float32 graphs with its
default arguments (ONNX Runtime); all others are simulated in torch (docs/quantization.md), so that
no GPU is needed. The last line is JSON: per variant the median PSNR of each task, median and 10th
percentile of all edits, and the shares above 18 and 20 dB.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.pocket.instructions import TASKS
from benchmarks.pocket.scenes import Edit, draw_edit, load_subjects, psnr, sample_subjects
from klein_kv import KleinKVPipeline
from klein_kv.artifacts.attention_scales import attention_scales, kv_scales
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.quantized_weights import load_quantized
from klein_kv.export.checks.artifact_weights import MappedWeights, component_weights
from klein_kv.export.checks.float_vae import FloatVae
from klein_kv.export.checks.samples import Sample
from klein_kv.export.checks.torch_loop import (
    LoopRequest,
    encode_prompt,
    prepare_request,
    reference_kv,
    run_loop,
)
from klein_kv.networks.quantized_torch_ops import QuantizedOps, round_to_fp8
from klein_kv.networks.torch_ops import TorchOps


@dataclass(frozen=True)
class Variant:
    """One way to compute: the type between layers, and what is quantized."""

    dtype: torch.dtype
    precision: str | None = None
    kv: bool = False  # reference keys and values in float8, constant scales
    attention: bool = False  # attention in float8
    steps: int = 4


PIPELINE = "pipeline"

VARIANTS = {
    "fp32": Variant(torch.float32),
    "fp16": Variant(torch.float16),
    "bf16": Variant(torch.bfloat16),
    "bf16, K/V fp8": Variant(torch.bfloat16, "fp8-scales", kv=True),
    "fp8": Variant(torch.bfloat16, "fp8"),
    "fp8, K/V fp8": Variant(torch.bfloat16, "fp8", kv=True),
    "fp8, attention fp8": Variant(torch.bfloat16, "fp8", attention=True),
    "nvfp4": Variant(torch.bfloat16, "nvfp4"),
    "nvfp4, K/V fp8": Variant(torch.bfloat16, "nvfp4", kv=True),
    "1 step": Variant(torch.float32, steps=1),
    "2 steps": Variant(torch.float32, steps=2),
    "3 steps": Variant(torch.float32, steps=3),
    "8 steps": Variant(torch.float32, steps=8),
}


class Editor:
    """Makes edits in one variant."""

    def __init__(self, artifacts: Path, variant: Variant) -> None:
        self.artifacts, self.variant = artifacts, variant
        self.manifest = Manifest.load(artifacts)
        self.vae = FloatVae(artifacts, self.manifest)
        parts = {}
        if variant.precision is not None:
            name = variant.precision.removesuffix("-scales")
            networks = self.manifest.precisions[name].items()
            parts = {part: load_quantized(artifacts, part, kind) for part, kind in networks}
        own = {
            part: component_weights(artifacts, self.manifest, part)
            for part in ("text_encoder", "transformer")
        }
        net = self.manifest.config.transformer
        scales = None
        if variant.kv or variant.attention:
            scales = attention_scales(net, parts["transformer"].attention, own["transformer"])
        self.kv_scales = [] if scales is None else kv_scales(net, scales)
        if str(variant.precision).endswith("-scales"):
            parts = {}
        self.text, self.transformer = (
            self._ops(MappedWeights(weights, variant.dtype, "cpu"), parts.get(part), part, scales)
            for part, weights in own.items()
        )

    def _ops(self, weights: Any, quantized: Any, part: str, scales: Any) -> TorchOps:
        if quantized is None:
            return TorchOps(weights, self.variant.dtype)
        fp8 = scales if self.variant.attention and part == "transformer" else None
        return QuantizedOps(weights, self.variant.dtype, quantized.linears, fp8)

    def __call__(self, edit: Edit, seed: int) -> Image.Image:
        request = self.request(edit, seed)
        return self.picture(edit.instruction, request, self.keys(request))

    def request(self, edit: Edit, seed: int) -> LoopRequest:
        sample = Sample(edit.instruction, edit.references, *edit.answer.size, seed)
        return prepare_request(sample, self.manifest, self.vae, self.variant.steps)

    @torch.inference_mode()
    def keys(self, request: LoopRequest) -> list[torch.Tensor]:
        """Keys and values of the references."""
        keys = reference_kv(self.transformer, self.manifest, request)
        if self.kv_scales:
            pairs = zip(keys, self.kv_scales, strict=True)
            keys = [round_to_fp8(x, scale).to(x.dtype) for x, scale in pairs]
        return keys

    @torch.inference_mode()
    def picture(
        self, instruction: str, request: LoopRequest, keys: Sequence[torch.Tensor]
    ) -> Image.Image:
        text = encode_prompt(self.text, self.artifacts, self.manifest, instruction)
        *_, latents = run_loop(self.transformer, self.manifest, request, text, keys)
        pixels = self.vae.decode(latents.float().reshape(1, *request.grid, -1).numpy())
        return Image.fromarray(pixels[0])


class PipelineEditor:
    """Makes edits as a user does."""

    def __init__(self, artifacts: Path) -> None:
        self.pipe = KleinKVPipeline.from_pretrained(artifacts, backend="onnxruntime")
        self.pipe.set_progress_bar_config(disable=True)

    def __call__(self, edit: Edit, seed: int) -> Image.Image:
        width, height = edit.answer.size
        images = list(edit.references) or None
        out: Any = self.pipe(edit.instruction, image=images, height=height, width=width, seed=seed)
        picture: Image.Image = out.images[0]
        return picture


def held_out_edits(count: int, seed: int = 11, font: Path | None = None) -> list[Edit]:
    """Edits of every task; of the subjects in the repository, or of all that a font holds out."""
    random = np.random.default_rng(seed)
    subjects = sample_subjects() if font is None else load_subjects(font).held_out
    return [draw_edit(task, subjects, random) for task in TASKS for _ in range(count)]


def score(editor: Callable[[Edit, int], Image.Image], edits: Sequence[Edit]) -> dict[str, Any]:
    values = np.array([psnr(editor(edit, seed), edit.answer) for seed, edit in enumerate(edits)])
    tasks = np.array([edit.meaning.task for edit in edits])
    medians = {task: float(np.median(values[tasks == task])) for task in TASKS}
    return {
        "tasks": medians,
        "median": float(np.median(list(medians.values()))),
        "p10": float(np.quantile(values, 0.1)),
        "above_18": float((values > 18).mean()),
        "above_20": float((values > 20).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fp32", type=Path)
    parser.add_argument("bf16", type=Path)
    parser.add_argument("--count", type=int, default=8, help="edits per task")
    names = [PIPELINE, *VARIANTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--seed", type=int, default=11, help="of the edits that are drawn")
    parser.add_argument("--font", type=Path, help="draw from all subjects that it holds out")
    arguments = parser.parse_args()
    edits = held_out_edits(arguments.count, arguments.seed, arguments.font)
    print(f"{len(edits)} edits of subjects that training never saw, 192x192, dB")
    print(
        f"{'':20}" + "".join(f"{task[:8]:>9}" for task in TASKS) + "   median   p10   >18   >20 dB"
    )
    results = {}
    for name in arguments.only:
        start = time.perf_counter()
        editor: Callable[[Edit, int], Image.Image]
        if name == PIPELINE:
            editor = PipelineEditor(arguments.fp32)
        else:
            variant = VARIANTS[name]
            bf16 = variant.dtype == torch.bfloat16
            editor = Editor(arguments.bf16 if bf16 else arguments.fp32, variant)
        result = score(editor, edits)
        results[name] = result | {"seconds": round(time.perf_counter() - start, 1)}
        row = "".join(f"{value:9.2f}" for value in result["tasks"].values())
        print(
            f"{name:20}{row}{result['median']:9.2f}{result['p10']:6.2f}"
            f"{100 * result['above_18']:6.0f}{100 * result['above_20']:6.0f} %",
            flush=True,
        )
    print(json.dumps({"edits": len(edits), "results": results}))


if __name__ == "__main__":
    main()
