"""`klein-kv build`: engines from graphs."""

import argparse
from pathlib import Path

from klein_kv.cli.arguments import AddVerb, Result, size
from klein_kv.errors import RequestError

__all__ = ["add_build"]


def add_build(add: AddVerb) -> None:
    """Adds `klein-kv build`."""
    sub = add("build", _build, "Build TensorRT engines from the ONNX graphs; needs no GPU.")
    sub.add_argument("artifacts", type=Path, metavar="ARTIFACTS")
    sub.add_argument("--target", help="rtx5090, rtx4090, ... or smNN (default: the recipe's)")
    sub.add_argument("--recipe", help="name or .toml file of sizes to build for")
    sub.add_argument("--size", type=size, metavar="WxH", help="instead: this one output size")
    sub.add_argument("--refs", type=int, default=1, help="with --size: reference images")
    sub.add_argument(
        "--ref-size", type=size, metavar="WxH", default=(1024, 1024), help="with --size: of each"
    )
    sub.add_argument(
        "--limit", type=float, metavar="GB", help="with --size: what such engines may take (2)"
    )
    sub.add_argument("--precision", help="bf16, fp16, or what `klein-kv quantize` made: fp8, nvfp4")
    sub.add_argument("--attention", choices=("fp8",), help="attention in fp8 too (one shape)")
    sub.add_argument("--weights", choices=("shared", "embedded"), help="default: the recipe's")
    sub.add_argument("--graph", action="append", metavar="GRAPH", help="only this one (repeatable)")
    sub.add_argument("--backend", default="auto", help="tensorrt_rtx or tensorrt")
    sub.add_argument(
        "--kv-dtype", choices=("fp8",), help="keys and values in eight bits, with a loss"
    )
    sub.add_argument("--force", action="store_true", help="build even what has not changed")


def _build(args: argparse.Namespace) -> Result:
    from klein_kv.artifacts.signature import KVFormat
    from klein_kv.engines.build import build_artifacts
    from klein_kv.engines.sizes.recipe import Size
    from klein_kv.engines.sizes.shape_engines import DEFAULT_LIMIT, build_shape, shape_recipe

    options = {
        "target": args.target,
        "graphs": args.graph,
        "module": args.backend,
        "force": args.force,
        "kv_dtype": KVFormat.FP8_PER_HEAD if args.kv_dtype == "fp8" else None,
        "precision": args.precision,
        "attention": args.attention,
    }
    if args.size is None:
        records = build_artifacts(
            args.artifacts, recipe=args.recipe, weights=args.weights, **options
        )
    elif args.recipe is not None or args.weights is not None:
        raise RequestError(
            "--size is a recipe of its own, with shared weights; leave --recipe and --weights out"
        )
    else:
        shape = shape_recipe(Size(*args.size), args.refs, Size(*args.ref_size))
        limit = DEFAULT_LIMIT if args.limit is None else int(args.limit * 1e9)
        records = build_shape(args.artifacts, shape, limit=limit, **options)
    facts = ("graph", "file", "bytes", "scratch_bytes", "peak_rss")
    value = {
        "engines": [
            {name: getattr(record, name) for name in facts}
            | {
                "seconds": round(record.seconds, 3),
                "weights": "shared" if record.weights else "embedded",
            }
            for record in records
        ]
    }
    lines = [
        f"{r.graph:18} {r.bytes / 1e6:8.2f} MB {r.seconds:7.1f} s "
        f"{r.scratch_bytes / 1e9:6.2f} GB scratch"
        for r in records
    ]
    return value, "\n".join(lines), 0
