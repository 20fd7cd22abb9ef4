"""`klein-kv inspect` and `klein-kv doctor`: what lies there, and what the machine has."""

import argparse
from pathlib import Path

from klein_kv.cli.arguments import AddVerb, Result
from klein_kv.errors import RequestError

__all__ = ["add_doctor", "add_inspect"]


def add_inspect(add: AddVerb) -> None:
    """Adds `klein-kv inspect`."""
    sub = add("inspect", _inspect, "Show what artifacts or engines hold, and check their files.")
    sub.add_argument("folder", type=Path, metavar="ARTIFACTS[/engines/NAME]")
    sub.add_argument("--gpu", help="engines: price the kernel plans for this GPU")
    sub.add_argument("--html", type=Path, metavar="PAGE", help="engines: write one page of plans")
    sub.add_argument("--compare", type=Path, metavar="ENGINES", help="engines: a second build")
    sub.add_argument(
        "--polygraphy", action="store_true", help="print commands that compare a graph's outputs"
    )


def _inspect(args: argparse.Namespace) -> Result:
    from klein_kv.inspection import inspect_artifacts, polygraphy_commands

    if (args.folder / "engine.json").exists():
        from klein_kv.engines.plan.inspection import inspect_engines

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


def add_doctor(add: AddVerb) -> None:
    """Adds `klein-kv doctor`."""
    add("doctor", _doctor, "Show versions, devices, and what is missing.")


def _doctor(_args: argparse.Namespace) -> Result:
    from klein_kv.inspection import examine_machine

    value, text = examine_machine()
    return value, text, 0 if value["ready"] else 1
