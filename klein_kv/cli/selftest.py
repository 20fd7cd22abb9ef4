"""`klein-kv selftest`: a report on artifacts, engines and the machine."""

import argparse
from pathlib import Path

from klein_kv.cli.arguments import AddVerb, Result

__all__ = ["add_selftest"]


def add_selftest(add: AddVerb) -> None:
    """Adds `klein-kv selftest`."""
    sub = add("selftest", _selftest, "Check artifacts and engines on this machine, and report.")
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
