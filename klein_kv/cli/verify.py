"""`klein-kv verify`: artifacts against diffusers or float32 artifacts, or a precision's quality."""

import argparse
from pathlib import Path

from klein_kv.cli.arguments import AddVerb, Result, add_backend, add_samples
from klein_kv.errors import RequestError

__all__ = ["add_verify"]


def add_verify(add: AddVerb) -> None:
    """Adds `klein-kv verify`."""
    about = "Compare artifacts with diffusers or with fp32 artifacts, or a precision with fp32."
    sub = add("verify", _verify, about)
    sub.add_argument("artifacts", type=Path, metavar="ARTIFACTS")
    sub.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", nargs="?")
    sub.add_argument(
        "--against",
        type=Path,
        metavar="FP32_ARTIFACTS",
        help="compare with these on the CPU, without diffusers, and run the loop",
    )
    add_backend(sub)
    sub.add_argument(
        "--precision",
        help="fp8, nvfp4 or fp8-weight-only: measure its quality, or what --against compares",
    )
    sub.add_argument("--kv-dtype", choices=("fp8",), help="and reference K/V in fp8")
    sub.add_argument("--attention", choices=("fp8",), help="and attention and K/V in fp8")
    sub.add_argument("--out", type=Path, metavar="REPORT", help="--against: write the report here")
    add_samples(sub, 3)


def _verify(args: argparse.Namespace) -> Result:
    if args.against is not None:
        return _verify_against(args)
    if args.out is not None:
        raise RequestError("--out names a report, which only --against writes; leave it out")
    if args.precision is not None:
        return _verify_precision(args)
    if args.checkpoint is None:
        raise RequestError(
            "say what to compare with: a CHECKPOINT, --against FP32_ARTIFACTS, or --precision fp8 "
            "or nvfp4"
        )
    from klein_kv.export.checks.verify import text_from_rows, verify_artifacts

    where = {"backend": args.backend, "device": args.device, "threads": args.threads}
    rows = verify_artifacts(args.artifacts, args.checkpoint, **where)
    good = all(row.ok for row in rows)
    verdict = "parity holds" if good else "parity does NOT hold"
    text = f"against diffusers\n{text_from_rows(rows)}\n{verdict}"
    return {"ok": good, "rows": [row.to_dict() for row in rows]}, text, 0 if good else 1


def _verify_against(args: argparse.Namespace) -> Result:
    from klein_kv.export.checks.against import verify_against

    if args.checkpoint is not None:
        raise RequestError("both CHECKPOINT and --against are given, expected one of them")
    report = verify_against(
        args.artifacts,
        args.against,
        out=args.out,
        backend=args.backend,
        device=args.device,
        threads=args.threads,
        precision=args.precision,
        kv_dtype=args.kv_dtype,
        attention=args.attention,
    )
    return report.to_dict(), report.to_text(), 0 if report.ok else 1


def _verify_precision(args: argparse.Namespace) -> Result:
    from klein_kv.export.checks.quality import dict_from_report, measure_quality, text_from_report
    from klein_kv.export.checks.samples import make_samples

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
