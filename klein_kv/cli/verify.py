"""`klein-kv verify`: artifacts against diffusers, or a precision against float32."""

import argparse
from pathlib import Path

from klein_kv.cli.arguments import AddVerb, Result, add_samples
from klein_kv.errors import RequestError

__all__ = ["add_verify"]


def add_verify(add: AddVerb) -> None:
    """Adds `klein-kv verify`."""
    sub = add("verify", _verify, "Compare artifacts with diffusers, or a precision with fp32.")
    sub.add_argument("artifacts", type=Path, metavar="ARTIFACTS")
    sub.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", nargs="?")
    sub.add_argument("--backend", default="auto", help="auto, onnxruntime, tensorrt or torch")
    sub.add_argument("--device", help="cpu, cuda or cuda:N (default: the backend's own)")
    sub.add_argument("--threads", type=int, help="CPU threads")
    sub.add_argument("--precision", help="measure fp8, nvfp4 or fp8-weight-only instead")
    sub.add_argument("--kv-dtype", choices=("fp8",), help="and reference K/V in fp8")
    sub.add_argument("--attention", choices=("fp8",), help="and attention and K/V in fp8")
    add_samples(sub, 3)


def _verify(args: argparse.Namespace) -> Result:
    if args.precision is not None:
        return _verify_precision(args)
    from klein_kv.export.checks.verify import verify_artifacts

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
    from klein_kv.export.checks.quality import measure_quality
    from klein_kv.export.checks.quality_text import dict_from_report, text_from_report
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
