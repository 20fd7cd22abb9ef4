"""Export and build of the full 9B shapes, on any machine: seconds, memory, bytes, kernel plans.

The checkpoint is sparse (no disk, no real weights); every command runs in a process of its own, so
that its peak memory is its own.

    python benchmarks/build.py [--recipe default --recipe static-1024-4ref] [--work DIR]

The last line on stdout is one JSON document. Plan times in it are a model of an RTX 5090, not
measured.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

KLEIN_KV = Path(sys.executable).with_name("klein-kv")


def run(*argv: object) -> dict[str, Any]:
    """Runs one command with `--json`; adds its wall time and the peak memory of all so far."""
    start = time.perf_counter()
    command = [str(arg) for arg in (KLEIN_KV, *argv, "--json", "-q")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    value: dict[str, Any] = json.loads(done.stdout)
    value["wall_seconds"] = round(time.perf_counter() - start, 2)
    value["largest_child_rss"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"{argv[0]:8} {value['wall_seconds']:7.1f} s", file=sys.stderr)
    return value


def build(artifacts: Path, recipe: str) -> dict[str, Any]:
    """Builds one recipe; prices its plans where they can be."""
    built = run("build", artifacts, "--target", "rtx5090", "--recipe", recipe, "--force")
    suffix = "" if recipe == "default" else f"-{recipe}"
    plans = run("inspect", artifacts / "engines" / f"rtx5090-bf16{suffix}")["plans"]
    built["plans"] = {plan["graph"]: plan for plan in plans}
    return built


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="9b-shapes")
    parser.add_argument("--recipe", action="append", help="default: default, static-1024-4ref")
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        checkpoint, artifacts = work / "checkpoint", work / "artifacts"
        document: dict[str, Any] = {"benchmark": "build", "size": args.size}
        document["fixture"] = run("fixture", checkpoint, "--size", args.size)
        document["export"] = run(
            "export", checkpoint, artifacts, "--dtype", "bf16", "--allow-zeros"
        )
        recipes = args.recipe or ["default", "static-1024-4ref"]
        document["build"] = {recipe: build(artifacts, recipe) for recipe in recipes}
    print(json.dumps(document))


if __name__ == "__main__":
    main()
