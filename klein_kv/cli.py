"""`klein-kv`: one function per verb.

Results go to standard output (a text, or one JSON document with `--json`), progress and logs to
standard error. Exit codes: 0 done, 1 failed with one line that says why, 2 wrong usage,
130 interrupted.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from klein_kv import __version__
from klein_kv.config import DTYPES
from klein_kv.errors import KleinKVError, RequestError

__all__ = ["main"]

_log = logging.getLogger(__name__)
_EXTRA_OF = {
    "export": "export",
    "fixture": "export",
    "quantize": "export,cpu",
    "verify": "export,cpu",
    "build": "rtx",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments without the program's name; None takes the process's.

    Returns:
        The exit code.
    """
    args = _parser().parse_args(argv)
    level = logging.WARNING if args.quiet else logging.INFO
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("klein_kv").setLevel(level)
    try:
        result = args.run(args)
    except KleinKVError as error:
        print(f"klein-kv {args.verb}: error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        extra = _EXTRA_OF.get(args.verb, "cpu")
        print(
            f"klein-kv {args.verb}: error: {error.name} is not installed; install it with "
            f"pip install 'klein-kv[{extra}]'",
            file=sys.stderr,
        )
        return 1
    except MemoryError:
        print(
            f"klein-kv {args.verb}: error: out of memory; use a smaller size or fewer references",
            file=sys.stderr,
        )
        return 1
    except OSError as error:  # where nothing below knew better: folders that cannot be written
        print(f"klein-kv {args.verb}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"klein-kv {args.verb}: interrupted", file=sys.stderr)
        return 130
    value, text, code = result
    try:
        print(json.dumps(value, indent=2) if args.json else text, flush=True)
    except BrokenPipeError:  # of `| head`; what is left must not go there at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return int(code)


Result = tuple[dict[str, Any], str, int]
"""What a verb gives: the JSON document, the text, the exit code."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="klein-kv", description="Export, build and run FLUX.2 [klein] 9B-KV."
    )
    parser.add_argument("--version", action="version", version=f"klein-kv {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Callable[[argparse.Namespace], Result], about: str) -> Any:
        sub = verbs.add_parser(name, help=about, description=about)
        sub.add_argument("--json", action="store_true", help="print one JSON document")
        sub.add_argument("-q", "--quiet", action="store_true", help="warnings only")
        sub.set_defaults(run=run)
        return sub

    sub = verb("fixture", _fixture, "Make a random checkpoint in diffusers layout.")
    sub.add_argument("out", type=Path, metavar="OUT")
    sub.add_argument("--size", default="tiny", help="tiny, small or 9b-shapes (sparse files)")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--dtype", choices=DTYPES, help="default fp32; 9b-shapes bf16")

    sub = verb("export", _export, "Turn a checkpoint into ONNX graphs.")
    sub.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="folder in diffusers layout, .safetensors file, or Hugging Face repository",
    )
    sub.add_argument("artifacts", type=Path, metavar="ARTIFACTS")
    sub.add_argument("--base", metavar="FOLDER|REPOSITORY", help="single file: the other parts")
    sub.add_argument("--revision", help="Hugging Face: branch, tag or commit")
    sub.add_argument("--dtype", choices=DTYPES, help="default: the transformer's own")
    sub.add_argument("--variant", choices=("kv", "plain"), help="default: what CHECKPOINT says")
    sub.add_argument(
        "--text-layers",
        type=_layers,
        metavar="I,J,...",
        help="hidden states of the text encoder to read (default 9,18,27)",
    )

    sub = verb("quantize", _quantize, "Add fp8 or nvfp4 weights to an artifact folder.")
    sub.add_argument("artifacts", type=Path, metavar="ARTIFACTS")
    sub.add_argument("--recipe", help="fp8, nvfp4, fp8-weight-only, or a .toml file")
    sub.add_argument(
        "--from", type=Path, metavar="FILE", dest="source", help="BFL's fp8 or nvfp4 file, as it is"
    )
    _add_samples(sub, 8)
    sub.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")

    sub = verb("build", _build, "Build TensorRT engines from the ONNX graphs; needs no GPU.")
    sub.add_argument("artifacts", type=Path, metavar="ARTIFACTS")
    sub.add_argument("--target", help="rtx5090, rtx4090, ... or smNN (default: the recipe's)")
    sub.add_argument("--recipe", help="name or .toml file of sizes to build for")
    sub.add_argument("--size", type=_size, metavar="WxH", help="instead: this one output size")
    sub.add_argument("--refs", type=int, default=1, help="with --size: reference images")
    sub.add_argument(
        "--ref-size", type=_size, metavar="WxH", default=(1024, 1024), help="with --size: of each"
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

    sub = verb("plan", _plan, "Tell what edits need of a GPU before anything is loaded.")
    sub.add_argument("artifacts", type=Path, metavar="ARTIFACTS")
    sub.add_argument("--gpu", default="rtx5090")
    sub.add_argument("--memory", type=_gigabytes, metavar="GB", help="default: the GPU's")
    sub.add_argument("--size", type=_size, default=(1024, 1024), metavar="WxH")
    sub.add_argument("--refs", type=int, help="reference images (default: 0 to 4, a line each)")
    sub.add_argument("--ref-size", type=_size, default=(1024, 1024), metavar="WxH")
    sub.add_argument("--precision", help="bf16, fp8 or nvfp4 (default: all three)")
    sub.add_argument("--text-precision", help="of the text encoder: bf16 or fp8")
    sub.add_argument("--kv-dtype", choices=("bf16", "fp8"), default="bf16")
    sub.add_argument("--attention", choices=("fp8",), help="default: bf16")
    sub.add_argument("--batch", type=int, default=1)
    sub.add_argument("--steps", type=int, default=4)
    sub.add_argument("--engines", type=Path, help="folder of engines (default: the best suited)")

    sub = verb("generate", _generate, "Make an image from a prompt and reference images.")
    sub.add_argument("artifacts", type=Path, metavar="ARTIFACTS")
    sub.add_argument("-p", "--prompt", required=True)
    sub.add_argument("-r", "--reference", action="append", type=Path, default=[], metavar="IMAGE")
    sub.add_argument("-o", "--out", type=Path, default=Path("out.png"), metavar="OUT.png")
    sub.add_argument("--height", type=int, help="default: the first reference's, else 1024")
    sub.add_argument("--width", type=int)
    sub.add_argument("--steps", type=int, default=4)
    sub.add_argument("--seed", type=int, help="default: a new one, written into the image")
    sub.add_argument("--num-images", type=int, default=1)
    sub.add_argument("--backend", default="auto", help="auto, onnxruntime, tensorrt or torch")
    sub.add_argument("--device", help="cpu, cuda or cuda:N (default: the backend's own)")
    sub.add_argument("--threads", type=int, help="CPU threads")
    sub.add_argument("--precision", help="a quantized one: fp8, nvfp4 or fp8-weight-only")
    sub.add_argument("--kv-dtype", choices=("fp8",), help="reference K/V in fp8")
    sub.add_argument("--attention", choices=("fp8",), help="attention and reference K/V in fp8")
    sub.add_argument("--no-metadata", action="store_true", help="leave prompt and seed out")

    sub = verb("verify", _verify, "Compare artifacts with diffusers, or a precision with fp32.")
    sub.add_argument("artifacts", type=Path, metavar="ARTIFACTS")
    sub.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", nargs="?")
    sub.add_argument("--backend", default="auto", help="auto, onnxruntime, tensorrt or torch")
    sub.add_argument("--device", help="cpu, cuda or cuda:N (default: the backend's own)")
    sub.add_argument("--threads", type=int, help="CPU threads")
    sub.add_argument("--precision", help="measure fp8, nvfp4 or fp8-weight-only instead")
    sub.add_argument("--kv-dtype", choices=("fp8",), help="and reference K/V in fp8")
    sub.add_argument("--attention", choices=("fp8",), help="and attention and K/V in fp8")
    _add_samples(sub, 3)

    sub = verb("inspect", _inspect, "Show what artifacts or engines hold, and check their files.")
    sub.add_argument("folder", type=Path, metavar="ARTIFACTS[/engines/NAME]")
    sub.add_argument("--gpu", help="engines: price the kernel plans for this GPU")
    sub.add_argument("--html", type=Path, metavar="PAGE", help="engines: write one page of plans")
    sub.add_argument("--compare", type=Path, metavar="ENGINES", help="engines: a second build")
    sub.add_argument(
        "--polygraphy", action="store_true", help="print commands that compare a graph's outputs"
    )

    sub = verb("selftest", _selftest, "Check artifacts and engines on this machine, and report.")
    sub.add_argument("artifacts", type=Path, metavar="ARTIFACTS")
    sub.add_argument("--backend", default="auto")
    sub.add_argument("--device", help="cpu, cuda or cuda:N (default: the backend's own)")
    sub.add_argument("--engines", type=Path, metavar="DIR", help="default: those of ARTIFACTS")
    sub.add_argument(
        "--reference-artifacts",
        type=Path,
        metavar="FP32_ARTIFACTS",
        help="the same checkpoint in fp32, for a CPU to compare with",
    )
    sub.add_argument(
        "--out",
        type=Path,
        default=Path("klein-kv-selftest.json"),
        metavar="REPORT.json",
        help="the report, to be attached to a bug report; it names no files and no user",
    )
    sub.add_argument("--no-tiny", action="store_true", help="leave the tiny random model out")
    sub.add_argument("--threads", type=int, help="CPU threads")

    verb("doctor", _doctor, "Show versions, devices, and what is missing.")
    return parser


def _add_samples(sub: Any, count: int) -> None:
    sub.add_argument("--samples", type=int, default=count, help=f"requests to run ({count})")
    sub.add_argument("--images", type=Path, metavar="DIR", help="their references")
    sub.add_argument("--prompts", type=Path, metavar="FILE", help="their prompts, one per line")
    sub.add_argument("--size", type=_size, metavar="WxH", help="their output (512x512)")


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of layers, expected for example 9,18,27"
        ) from None


def _fixture(args: argparse.Namespace) -> Result:
    from klein_kv.export.fixture import make_fixture

    dtype = DTYPES[args.dtype] if args.dtype else None
    make_fixture(args.out, args.size, args.seed, dtype)
    value = {"checkpoint": str(args.out), "size": args.size, "seed": args.seed}
    return value, f"random checkpoint ({args.size}, seed {args.seed}): {args.out}", 0


def _export(args: argparse.Namespace) -> Result:
    from klein_kv.config import DEFAULT_TEXT_LAYERS
    from klein_kv.export.exporter import export_checkpoint

    done = export_checkpoint(
        args.checkpoint,
        args.artifacts,
        base=args.base,
        revision=args.revision,
        variant=args.variant,
        dtype=DTYPES[args.dtype] if args.dtype else None,
        text_layers=args.text_layers or DEFAULT_TEXT_LAYERS,
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


def _quantize(args: argparse.Namespace) -> Result:
    from klein_kv.export.quantization_recipe import QuantizationRecipe
    from klein_kv.export.quantize import quantize_artifacts
    from klein_kv.export.samples import make_samples

    if args.recipe is None and args.source is None:
        raise RequestError("say what to make: --recipe fp8, nvfp4 or fp8-weight-only, or --from")
    done = quantize_artifacts(
        args.artifacts,
        QuantizationRecipe.load(args.recipe or "fp8"),
        make_samples(args.samples, images=args.images, prompts=args.prompts, size=args.size),
        source=args.source,
        device=args.device,
    )
    value = {
        "artifacts": str(done.artifacts),
        "precision": done.precision,
        "seconds": round(done.seconds, 3),
        "components": {
            component: {
                "precision": part.precision,
                "layers": part.layers,
                "bytes": part.bytes,
                "bytes_before": part.bytes_before,
                "reused": part.reused,
            }
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


def _generate(args: argparse.Namespace) -> Result:
    from klein_kv.runtime.images import load_image
    from klein_kv.runtime.metadata import ImageParameters, save_png
    from klein_kv.runtime.noise import random_seed
    from klein_kv.runtime.pipeline import KleinKVPipeline

    if not args.prompt.strip():
        raise RequestError("the prompt is empty, expected a text after -p")
    if args.out.suffix.lower() != ".png":
        raise RequestError(f"output is {args.out}, expected a name that ends in .png")
    if args.out.is_dir():
        raise RequestError(f"output {args.out} is a folder, expected the name of a file")
    if not args.out.absolute().parent.is_dir():
        raise RequestError(f"folder {args.out.absolute().parent} does not exist; make it first")
    images = [load_image(path) for path in args.reference]
    seed = random_seed() if args.seed is None else args.seed
    pipe = KleinKVPipeline.from_pretrained(
        args.artifacts,
        backend=args.backend,
        device=args.device,
        threads=args.threads,
        kv_dtype=args.kv_dtype,
        precision=args.precision,
        attention=args.attention,
    )
    result = pipe(
        prompt=args.prompt,
        image=images or None,
        height=args.height,
        width=args.width,
        num_inference_steps=args.steps,
        num_images_per_prompt=args.num_images,
        seed=seed,
    )
    assert not isinstance(result, tuple)  # noqa: S101 - return_dict is True
    _log.info("%s", pipe.timings.to_text())
    paths = _numbered(args.out, len(result.images))
    for image, path in zip(result.images, paths, strict=True):
        parameters = ImageParameters(
            prompt=args.prompt,
            seed=seed,
            steps=args.steps,
            width=image.width,
            height=image.height,
            references=len(images),
            model=pipe.manifest.model_id,
            model_digest=pipe.manifest.graphs_digest(pipe.graphs),
        )
        save_png(image, path, None if args.no_metadata else parameters)
    value = {
        "images": [str(path) for path in paths],
        "seed": seed,
        "width": result.images[0].width,
        "height": result.images[0].height,
        "timings": pipe.timings.to_dict(),
    }
    return value, "\n".join(str(path) for path in paths), 0


def _numbered(path: Path, count: int) -> list[Path]:
    """OUT.png for one image; OUT-1.png, OUT-2.png, ... for several."""
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{i + 1}{path.suffix}") for i in range(count)]


def _verify(args: argparse.Namespace) -> Result:
    if args.precision is not None:
        return _verify_precision(args)
    from klein_kv.export.verify import verify_artifacts

    if args.checkpoint is None:
        raise RequestError("say what to compare with: a CHECKPOINT, or --precision fp8 or nvfp4")
    rows = verify_artifacts(
        args.artifacts,
        args.checkpoint,
        backend=args.backend,
        device=args.device,
        threads=args.threads,
    )
    good = all(row.ok for row in rows)
    value = {
        "ok": good,
        "rows": [
            {
                "name": row.name,
                "relative": row.relative,
                "max_abs": row.max_abs,
                "mean_abs": row.mean_abs,
                "cosine": row.cosine,
                "tolerance": row.tolerance,
                "ok": row.ok,
            }
            for row in rows
        ],
    }
    lines = [
        f"{'against diffusers':40} {'relative':>10} {'max abs':>10} {'mean abs':>10} {'cosine':>12}"
    ]
    for row in rows:
        mark = "" if row.ok else f"  FAILED, tolerance {row.tolerance:g}"
        lines.append(
            f"{row.name:40} {row.relative:10.2e} {row.max_abs:10.2e} {row.mean_abs:10.2e} "
            f"{row.cosine:12.9f}{mark}"
        )
    lines.append("parity holds" if good else "parity does NOT hold")
    return value, "\n".join(lines), 0 if good else 1


def _verify_precision(args: argparse.Namespace) -> Result:
    from klein_kv.export.quality import measure_quality
    from klein_kv.export.quality_text import dict_from_report, text_from_report
    from klein_kv.export.samples import make_samples

    report = measure_quality(
        args.artifacts,
        args.precision,
        make_samples(
            args.samples, images=args.images, prompts=args.prompts, size=args.size, seed=1000
        ),
        checkpoint=args.checkpoint,
        kv=args.kv_dtype is not None,
        attention=args.attention is not None,
        device=args.device,
    )
    return dict_from_report(report), text_from_report(report), 1 if report.failed else 0


def _build(args: argparse.Namespace) -> Result:
    from klein_kv.engines.build import build_artifacts
    from klein_kv.engines.recipe import Size
    from klein_kv.engines.shape_engines import DEFAULT_LIMIT, build_shape, shape_recipe
    from klein_kv.signature import KV_FLOAT8

    options = {
        "target": args.target,
        "graphs": args.graph,
        "module": args.backend,
        "force": args.force,
        "kv_dtype": KV_FLOAT8 if args.kv_dtype == "fp8" else None,
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
    value = {
        "engines": [
            {
                "graph": record.graph,
                "file": record.file,
                "bytes": record.bytes,
                "seconds": round(record.seconds, 3),
                "scratch_bytes": record.scratch_bytes,
                "peak_rss": record.peak_rss,
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


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is no size, expected for example 1024x1024")
    return int(width), int(height)


def _gigabytes(text: str) -> int:
    try:
        return int(float(text) * 1e9)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of gigabytes, expected for example 24"
        ) from None


def _plan(args: argparse.Namespace) -> Result:
    from klein_kv.runtime.edit_plan import PlanOptions, plan_artifacts
    from klein_kv.runtime.plan_text import text_from_plans

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
        steps=args.steps,
        memory=args.memory,
        engines=args.engines,
    )
    plans = plan_artifacts(args.artifacts, options)
    fits = any(edit.first.fits for edit in plans.edits)
    return plans.to_dict(), text_from_plans(plans), 0 if fits else 1


def _inspect(args: argparse.Namespace) -> Result:
    from klein_kv.inspection import inspect_artifacts, polygraphy_commands

    if (args.folder / "engine.json").exists():
        from klein_kv.engines.inspection import inspect_engines

        value, text = inspect_engines(args.folder, args.gpu, args.html, args.compare)
        return value, text, 0
    if args.gpu or args.html or args.compare:
        raise RequestError(
            f"{args.folder} holds no engines; expected a folder below ARTIFACTS/engines"
        )
    if args.polygraphy:
        value, text = polygraphy_commands(args.folder)
        return value, text, 0
    value, text = inspect_artifacts(args.folder)
    return value, text, 0


def _selftest(args: argparse.Namespace) -> Result:
    from klein_kv.selftest import run_selftest

    report = run_selftest(
        args.artifacts,
        backend=args.backend,
        device=args.device,
        engines=args.engines,
        reference_artifacts=args.reference_artifacts,
        threads=args.threads,
        tiny=not args.no_tiny,
        out=args.out,
    )
    text = f"{report.to_text()}\nreport: {args.out}"
    return report.to_dict(), text, 0 if report.ok else 1


def _doctor(_args: argparse.Namespace) -> Result:
    from klein_kv.inspection import examine_machine

    value, text = examine_machine()
    return value, text, 0 if value["ready"] else 1


if __name__ == "__main__":
    sys.exit(main())
