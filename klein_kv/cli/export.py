"""`klein-kv fixture`, `export` and `quantize`: a checkpoint, its graphs, smaller weights."""

import argparse
from pathlib import Path

from klein_kv.artifacts.config import DTYPES
from klein_kv.cli.arguments import AddVerb, Result, add_checkpoint, add_lora, add_samples, layers
from klein_kv.errors import RequestError

__all__ = ["add_export", "add_fixture", "add_quantize"]


def add_fixture(add: AddVerb) -> None:
    """Adds `klein-kv fixture`."""
    sub = add("fixture", _fixture, "Make a small checkpoint, trained or random.")
    sub.add_argument("out", type=Path, metavar="OUT")
    sub.add_argument("--size", default="tiny", help="pocket (trained), tiny, small or 9b-shapes")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--dtype", choices=DTYPES, help="default fp32; 9b-shapes bf16")


def _fixture(args: argparse.Namespace) -> Result:
    from klein_kv.export.checkpoints.fixture import make_fixture

    dtype = DTYPES[args.dtype] if args.dtype else None
    make_fixture(args.out, args.size, args.seed, dtype)
    value = {"checkpoint": str(args.out), "size": args.size, "seed": args.seed}
    return value, f"checkpoint ({args.size}, seed {args.seed}): {args.out}", 0


def add_export(add: AddVerb) -> None:
    """Adds `klein-kv export`."""
    sub = add("export", _export, "Turn a checkpoint into ONNX graphs.")
    add_checkpoint(sub)
    sub.add_argument("--revision", help="Hugging Face: branch, tag or commit")
    sub.add_argument("--dtype", choices=DTYPES, help="default: the transformer's own")
    sub.add_argument(
        "--text-layers",
        type=layers,
        metavar="I,J,...",
        help="hidden states of the text encoder to read (default 9,18,27)",
    )
    add_lora(sub, "an adapter to merge into the artifacts for good")


def _export(args: argparse.Namespace) -> Result:
    from klein_kv.artifacts.config import DEFAULT_TEXT_LAYERS
    from klein_kv.export.exporter import export_checkpoint

    done = export_checkpoint(
        args.checkpoint,
        args.artifacts,
        base=args.base,
        revision=args.revision,
        variant=args.variant,
        dtype=DTYPES[args.dtype] if args.dtype else None,
        text_layers=args.text_layers or DEFAULT_TEXT_LAYERS,
        adapters=args.lora,
        allow_zeros=args.allow_zeros,
    )
    value = {
        "artifacts": str(done.artifacts),
        "dtype": done.dtype,
        "nodes": done.nodes,
        "seconds": round(done.seconds, 3),
        "bytes_written": done.bytes_written,
    }
    text = (
        f"{len(done.nodes)} graphs in {done.dtype}, {done.seconds:.1f} s, "
        f"{done.bytes_written / 1e6:.1f} MB written: {done.artifacts}"
    )
    return value, text, 0


def add_quantize(add: AddVerb) -> None:
    """Adds `klein-kv quantize`."""
    sub = add("quantize", _quantize, "Add fp8 or nvfp4 weights to an artifact folder.")
    sub.add_argument("artifacts", type=Path, metavar="ARTIFACTS")
    sub.add_argument("--recipe", help="fp8, nvfp4, fp8-weight-only, or a .toml file")
    sub.add_argument(
        "--from", type=Path, metavar="FILE", dest="source", help="BFL's fp8 or nvfp4 file, as it is"
    )
    add_samples(sub, 8)
    sub.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")


def _quantize(args: argparse.Namespace) -> Result:
    from klein_kv.export.checks.samples import make_samples
    from klein_kv.export.quantization.quantization_recipe import QuantizationRecipe
    from klein_kv.export.quantization.quantize import quantize_artifacts

    if args.recipe is None and args.source is None:
        raise RequestError("say what to make: --recipe fp8, nvfp4 or fp8-weight-only, or --from")
    done = quantize_artifacts(
        args.artifacts,
        QuantizationRecipe.load(args.recipe or "fp8"),
        make_samples(args.samples, images=args.images, prompts=args.prompts, size=args.size),
        source=args.source,
        device=args.device,
    )
    facts = ("precision", "layers", "bytes", "bytes_before", "reused")
    value = {
        "artifacts": str(done.artifacts),
        "precision": done.precision,
        "seconds": round(done.seconds, 3),
        "components": {
            component: {name: getattr(part, name) for name in facts}
            for component, part in done.parts.items()
        },
    }
    lines = [
        f"{component:14} {part.precision:16} {part.layers:4} layers {part.bytes / 1e9:8.3f} GB, "
        f"{part.bytes / part.bytes_before:.3f} of what they were"
        + (" (there already)" if part.reused else "")
        for component, part in done.parts.items()
    ]
    lines.append(f"{done.precision}: {done.seconds:.1f} s")
    return value, "\n".join(lines), 0
