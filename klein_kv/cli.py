"""`klein-kv`: one function per verb.

Results go to standard output (a text, or one JSON document with `--json`), progress and logs to
standard error. Exit codes: 0 done, 1 failed with one line that says why, 2 wrong usage,
130 interrupted.
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from klein_kv import __version__
from klein_kv.config import DTYPES
from klein_kv.errors import KleinKVError, RequestError

__all__ = ["main"]

_log = logging.getLogger(__name__)
_EXTRA_OF = {"export": "export", "fixture": "export", "verify": "export,cpu", "build": "rtx"}


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
    except KeyboardInterrupt:
        print(f"klein-kv {args.verb}: interrupted", file=sys.stderr)
        return 130
    value, text, code = result
    print(json.dumps(value, indent=2) if args.json else text)
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

    sub = verb("build", _build, "Build TensorRT engines from the ONNX graphs; needs no GPU.")
    sub.add_argument("artifacts", type=Path, metavar="ARTIFACTS")
    sub.add_argument("--target", help="rtx5090, rtx4090, ... or smNN (default: the recipe's)")
    sub.add_argument("--recipe", help="name or .toml file of sizes to build for")
    sub.add_argument("--weights", choices=("shared", "embedded"), help="default: the recipe's")
    sub.add_argument("--graph", action="append", metavar="GRAPH", help="only this one (repeatable)")
    sub.add_argument("--backend", default="auto", help="tensorrt_rtx or tensorrt")
    sub.add_argument("--force", action="store_true", help="build even what has not changed")

    sub = verb("plan", _plan, "Tell what fits into a GPU's memory before anything is loaded.")
    sub.add_argument("artifacts", type=Path, metavar="ARTIFACTS")
    sub.add_argument("--gpu", default="rtx5090")
    sub.add_argument("--size", type=_size, default=(1024, 1024), metavar="WxH")
    sub.add_argument("--refs", type=int, help="reference images (default: 0 to 4, a line each)")
    sub.add_argument("--precision", help="bf16, fp8 or nvfp4 (default: all three)")
    sub.add_argument("--batch", type=int, default=1)
    sub.add_argument("--engines", type=Path, help="folder of engines whose scratch counts")

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
    sub.add_argument("--backend", default="auto")
    sub.add_argument("--device", help="cpu, cuda or cuda:N (default: the backend's own)")
    sub.add_argument("--threads", type=int, help="CPU threads")
    sub.add_argument("--no-metadata", action="store_true", help="leave prompt and seed out")

    sub = verb("verify", _verify, "Compare an artifact folder with diffusers.")
    sub.add_argument("artifacts", type=Path, metavar="ARTIFACTS")
    sub.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    sub.add_argument("--threads", type=int, help="CPU threads")

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
        help="the report, to be attached to an issue; it names no files and no user",
    )
    sub.add_argument("--no-tiny", action="store_true", help="leave the tiny random model out")
    sub.add_argument("--threads", type=int, help="CPU threads")

    verb("doctor", _doctor, "Show versions, devices, and what is missing.")
    return parser


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


def _generate(args: argparse.Namespace) -> Result:
    from klein_kv.runtime.images import load_image
    from klein_kv.runtime.metadata import ImageParameters, save_png
    from klein_kv.runtime.noise import random_seed
    from klein_kv.runtime.pipeline import KleinKVPipeline

    if not args.prompt.strip():
        raise RequestError("the prompt is empty, expected a text after -p")
    if args.out.suffix.lower() != ".png":
        raise RequestError(f"output is {args.out}, expected a name that ends in .png")
    if not args.out.absolute().parent.is_dir():
        raise RequestError(f"folder {args.out.absolute().parent} does not exist; make it first")
    images = [load_image(path) for path in args.reference]
    seed = random_seed() if args.seed is None else args.seed
    pipe = KleinKVPipeline.from_pretrained(
        args.artifacts, backend=args.backend, device=args.device, threads=args.threads
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
            model_digest=pipe.manifest.model_digest,
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
    from klein_kv.export.verify import verify_artifacts

    rows = verify_artifacts(args.artifacts, args.checkpoint, threads=args.threads)
    good = all(row.ok for row in rows)
    value = {
        "ok": good,
        "rows": [
            {
                "name": row.name,
                "max_abs": row.max_abs,
                "mean_abs": row.mean_abs,
                "cosine": row.cosine,
                "tolerance": row.tolerance,
                "ok": row.ok,
            }
            for row in rows
        ],
    }
    lines = [f"{'against diffusers in float32':40} {'max abs':>10} {'mean abs':>10} {'cosine':>12}"]
    for row in rows:
        mark = "" if row.ok else f"  FAILED, tolerance {row.tolerance:g}"
        lines.append(
            f"{row.name:40} {row.max_abs:10.2e} {row.mean_abs:10.2e} {row.cosine:12.9f}{mark}"
        )
    lines.append("parity holds" if good else "parity does NOT hold")
    return value, "\n".join(lines), 0 if good else 1


def _build(args: argparse.Namespace) -> Result:
    from klein_kv.engines.build import build_artifacts

    records = build_artifacts(
        args.artifacts,
        target=args.target,
        recipe=args.recipe,
        weights=args.weights,
        graphs=args.graph,
        module=args.backend,
        force=args.force,
    )
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


def _plan(args: argparse.Namespace) -> Result:
    from klein_kv.runtime.memory_plan import Request, plan_artifacts, text_from_plans

    width, height = args.size
    counts = range(5) if args.refs is None else [args.refs]
    plans = plan_artifacts(
        args.artifacts,
        args.gpu,
        [Request(height, width, count, batch=args.batch) for count in counts],
        ["bf16", "fp8", "nvfp4"] if args.precision is None else [args.precision],
        args.engines,
    )
    value = {"plans": [plan.to_dict() for plan in plans]}
    return value, text_from_plans(plans), 0 if any(plan.fits for plan in plans) else 1


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
