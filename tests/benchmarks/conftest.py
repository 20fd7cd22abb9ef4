"""The GPU suite, run once on the CPU at tiny size, as a user runs it."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# Last: a script there is called like a package that the packaging test needs.
sys.path.append(str(BENCHMARKS))


@dataclass(frozen=True, slots=True)
class SuiteRun:
    """A finished run of the suite: what it wrote, and what it printed."""

    path: Path
    stdout: str
    stderr: str

    @property
    def document(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.path.read_text())
        return document


def run_suite(folder: Path, *options: str, before: str = "") -> SuiteRun:
    """Runs the script in a process of its own; `before` is Python that it begins with."""
    path = folder / "result.json"
    code = f"import runpy, sys\n{before}\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    script = str(BENCHMARKS / "gpu_suite.py")
    code = f"import sys; sys.argv = sys.argv[1:]; sys.path[0] = {str(BENCHMARKS)!r}\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", code, script, "--out", str(path), *options],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return SuiteRun(path, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def suite_run(tmp_path_factory: pytest.TempPathFactory) -> SuiteRun:
    """Two cells, with and without references, on one thread."""
    return run_suite(
        tmp_path_factory.mktemp("suite"),
        "--device=cpu",
        "--size=tiny",
        "--outputs=128",
        "--references=2,0",
        "--rounds=3",
        before="import torch; torch.set_num_threads(1)",
    )
