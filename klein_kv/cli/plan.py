"""`klein-kv plan`: what edits need of a GPU."""

import argparse
from pathlib import Path

from klein_kv.cli.arguments import AddVerb, Result, gigabytes, size

__all__ = ["add_plan"]


def add_plan(add: AddVerb) -> None:
    """Adds `klein-kv plan`."""
    sub = add("plan", _plan, "Tell what edits need of a GPU before anything is loaded.")
    sub.add_argument("artifacts", type=Path, metavar="ARTIFACTS")
    sub.add_argument("--gpu", default="rtx5090")
    sub.add_argument("--memory", type=gigabytes, metavar="GB", help="default: the GPU's")
    sub.add_argument("--size", type=size, default=(1024, 1024), metavar="WxH")
    sub.add_argument("--refs", type=int, help="reference images (default: 0 to 4, a line each)")
    sub.add_argument("--ref-size", type=size, default=(1024, 1024), metavar="WxH")
    sub.add_argument("--precision", help="bf16, fp8 or nvfp4 (default: all three)")
    sub.add_argument("--text-precision", help="of the text encoder: bf16 or fp8")
    sub.add_argument("--kv-dtype", choices=("bf16", "fp8"), default="bf16")
    sub.add_argument("--attention", choices=("fp8",), help="default: bf16")
    sub.add_argument("--batch", type=int, default=1)
    sub.add_argument("--engines", type=Path, help="folder of engines (default: the best suited)")


def _plan(args: argparse.Namespace) -> Result:
    from klein_kv.runtime.planning.edit_plan import PlanOptions, plan_artifacts
    from klein_kv.runtime.planning.plan_text import text_from_plans

    options = PlanOptions(
        gpu=args.gpu,
        size=args.size,
        references=tuple(range(5)) if args.refs is None else (args.refs,),
        reference_size=args.ref_size,
        precisions=None if args.precision is None else (args.precision,),
        text_precision=args.text_precision,
        kv_dtype=args.kv_dtype,
        attention=args.attention,
        batch=args.batch,
        memory=args.memory,
        engines=args.engines,
    )
    plans = plan_artifacts(args.artifacts, options)
    fits = any(edit.first.fits for edit in plans.edits)
    return plans.to_dict(), text_from_plans(plans), 0 if fits else 1
