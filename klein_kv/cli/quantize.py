"""`klein-kv quantize`: fp8 and nvfp4 weights beside the others."""

import argparse
from pathlib import Path

from klein_kv.cli.arguments import AddVerb, Result, add_samples
from klein_kv.errors import RequestError

__all__ = ["add_quantize"]


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
