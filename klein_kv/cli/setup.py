"""`klein-kv setup`: from a checkpoint to engines that fit a GPU, in one go."""

import argparse
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from klein_kv.cli.arguments import AddVerb, Result, add_checkpoint, size
from klein_kv.errors import ArtifactError

__all__ = ["add_setup"]

_log = logging.getLogger(__name__)
_PRECISIONS = ("bf16", "fp8", "nvfp4")


def add_setup(add: AddVerb) -> None:
    """Adds `klein-kv setup`."""
    sub = add("setup", _setup, "Export, quantize, build and plan in one go, for one GPU.")
    add_checkpoint(sub)
    sub.add_argument("--gpu", default="rtx5090", help="rtx5090, rtx4090, ... or smNN")
    sub.add_argument(
        "--precision",
        choices=_PRECISIONS,
        help="default: bf16 where the GPU keeps all of it, else fp8 where it computes that",
    )
    sub.add_argument(
        "--size", type=size, metavar="WxH", help="also engines for this one output size: faster"
    )
    sub.add_argument("--refs", type=int, default=1, help="with --size: reference images")
    sub.add_argument("--samples", type=int, default=8, help="requests to calibrate with (8)")
    sub.add_argument("--images", type=Path, metavar="DIR", help="references to calibrate with")
    sub.add_argument("--prompts", type=Path, metavar="FILE", help="prompts to calibrate with")


def _setup(args: argparse.Namespace) -> Result:
    from klein_kv.artifacts.engines.targets import check_precision, find_target
    from klein_kv.artifacts.manifest import Manifest
    from klein_kv.runtime.planning.edit_plan import PlanOptions, plan_artifacts
    from klein_kv.runtime.planning.plan_text import text_from_plans

    target = find_target(args.gpu)
    check_precision(args.precision or "bf16", target)  # both refuse before any work
    seconds: dict[str, float] = {}

    def stage(name: str, work: Callable[[], str]) -> None:
        start = time.perf_counter()
        outcome = work()
        seconds[name] = round(time.perf_counter() - start, 2)
        _log.info("%-8s %7.1f s  %s", name, seconds[name], outcome)

    stage("export", lambda: _export(args))
    precision = args.precision or _suited(args, target)
    if precision != "bf16":
        stage("quantize", lambda: _quantize(args, precision))
    stage("build", lambda: _build(args, target.name, precision))

    manifest = Manifest.load(args.artifacts, check_files=False)
    value: dict[str, Any] = {
        "artifacts": str(args.artifacts),
        "target": target.name,
        "precision": precision,
        "seconds": seconds,
    }
    options = "" if precision == "bf16" else f', precision="{precision}"'
    line = f'KleinKVPipeline.from_pretrained("{args.artifacts}", device="cuda:0"{options})'
    value["python"] = line
    text = f"use it with\n\n    from klein_kv import KleinKVPipeline\n    pipe = {line}\n"
    if target.gpu is not None:
        width, height = args.size or (1024, 1024)
        plans = plan_artifacts(
            args.artifacts,
            PlanOptions(gpu=args.gpu, size=(width, height), precisions=(precision,)),
        )
        value["plan"] = plans.to_dict()
        text = f"{text_from_plans(plans)}\n\n{text}"
    _log.info("%s is set up for %s", manifest.model_id, target.name)
    return value, text.rstrip(), 0


def _export(args: argparse.Namespace) -> str:
    from klein_kv.artifacts.manifest import MANIFEST, Manifest
    from klein_kv.export.exporter import export_checkpoint

    if (args.artifacts / MANIFEST).exists():
        manifest = Manifest.load(args.artifacts)
        if manifest.dtype != "bfloat16" or args.variant not in (None, manifest.variant):
            raise ArtifactError(
                f"{args.artifacts} holds {manifest.variant} weights in {manifest.dtype}, expected "
                f"{args.variant or manifest.variant} in bfloat16; choose another folder"
            )
        return "there already"
    done = export_checkpoint(
        args.checkpoint,
        args.artifacts,
        base=args.base,
        variant=args.variant,
        dtype="bfloat16",
        allow_zeros=args.allow_zeros,
    )
    return f"{len(done.nodes)} graphs, {done.bytes_written / 1e6:.1f} MB written"


def _suited(args: argparse.Namespace, target: Any) -> str:
    """bf16 where all weights stay beside four references, else fp8 where the GPU computes it."""
    from klein_kv.artifacts.engines.targets import LEAST_SM
    from klein_kv.runtime.planning.edit_plan import PlanOptions, plan_artifacts

    if target.sm < LEAST_SM["fp8"]:
        return "bf16"
    if target.gpu is None:
        return "fp8"
    options = PlanOptions(gpu=args.gpu, references=(4,), precisions=("bf16",))
    (edit,) = plan_artifacts(args.artifacts, options).edits
    return "bf16" if edit.first.all_fits else "fp8"


def _quantize(args: argparse.Namespace, precision: str) -> str:
    from klein_kv.export.checks.samples import make_samples
    from klein_kv.export.quantization.quantization_recipe import QuantizationRecipe
    from klein_kv.export.quantization.quantize import quantize_artifacts

    samples = make_samples(args.samples, images=args.images, prompts=args.prompts)
    done = quantize_artifacts(args.artifacts, QuantizationRecipe.load(precision), samples)
    if all(part.reused for part in done.parts.values()):
        return "there already"
    return ", ".join(f"{c} {part.bytes / 1e9:.2f} GB" for c, part in done.parts.items())


def _build(args: argparse.Namespace, target: str, precision: str) -> str:
    from klein_kv.engines.build import build_artifacts
    from klein_kv.engines.sizes.recipe import Size
    from klein_kv.engines.sizes.shape_engines import build_shape, shape_recipe

    own = None if precision == "bf16" else precision
    records = build_artifacts(args.artifacts, target=target, precision=own)
    if args.size is not None:
        recipe = shape_recipe(Size(*args.size), args.refs)
        records += build_shape(args.artifacts, recipe, target=target, precision=own)
    return f"{len(records)} engines, {sum(record.bytes for record in records) / 1e6:.1f} MB"
