"""The result file of the GPU suite: what was measured, on what, and what is missing."""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["SCHEMA", "Record", "describe_device", "describe_software"]

SCHEMA = 1
"""Version of the result file's form; `report.py` reads this one."""

_PACKAGES = ("torch", "triton", "diffusers", "transformers", "safetensors", "numpy", "klein-kv")
_ROOT = Path(__file__).resolve().parents[1]


@dataclass(slots=True)
class Record:
    """One result document, written whole after every piece of it.

    Attributes:
        path: the file.
        seconds: until the suite must have ended, from `start`.
        start: when it began, on the monotonic clock.
        document: what the file holds.
    """

    path: Path
    seconds: float
    start: float = field(default_factory=time.monotonic)
    document: dict[str, Any] = field(default_factory=dict)

    @property
    def elapsed(self) -> float:
        """Seconds since the suite began."""
        return time.monotonic() - self.start

    @property
    def left(self) -> float:
        """Seconds until the suite must have ended."""
        return self.seconds - self.elapsed

    def miss(self, what: str, reason: str) -> None:
        """Notes what was not measured, once per `what`."""
        missing = self.document.setdefault("missing", [])
        if not any(entry["what"] == what for entry in missing):
            missing.append({"what": what, "reason": reason})
            self.say(f"missing: {what}: {reason}")

    def save(self) -> None:
        """Writes the file aside, then renames it: a run cut short leaves the last whole one."""
        self.document["elapsed_seconds"] = round(self.elapsed, 1)
        aside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        aside.write_text(json.dumps(self.document, indent=1) + "\n", encoding="utf-8")
        aside.replace(self.path)

    def say(self, text: str) -> None:
        """A line of progress on standard error."""
        print(f"[{self.elapsed:6.1f} s] {text}", file=sys.stderr, flush=True)


def describe_device(device: torch.device) -> dict[str, Any]:
    """The device, in words and numbers."""
    if device.type != "cuda":
        return {
            "kind": device.type,
            "name": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
        }
    found = torch.cuda.get_device_properties(device)
    return {
        "kind": "cuda",
        "name": found.name,
        "memory_bytes": found.total_memory,
        "capability": [found.major, found.minor],
        "multiprocessors": found.multi_processor_count,
        "cores": os.cpu_count(),
        "driver": _nvidia_smi("driver_version"),
        "power_limit": _nvidia_smi("power.limit"),
    }


def describe_software(commit: str | None) -> dict[str, Any]:
    """Versions, and the commit of this checkout.

    Args:
        commit: what the command line says it is, where the checkout came without its history.
    """
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    if torch.backends.cudnn.is_available():
        versions["cudnn"] = str(torch.backends.cudnn.version())
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    found = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no") or ""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["python", *sys.argv],
        "versions": versions,
        "commit": commit or found,
        "changed_files": len(changed.splitlines()) if found else None,
    }


def _git(*arguments: str) -> str | None:
    return _output("git", "-C", str(_ROOT), *arguments)


def _nvidia_smi(query: str) -> str | None:
    text = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    return text.splitlines()[0] if text else None


def _output(program: str, *arguments: str) -> str | None:
    """What a program prints, or None where it is not there or fails."""
    found = shutil.which(program)
    if found is None:
        return None
    try:
        done = subprocess.run(
            [found, *arguments], capture_output=True, text=True, check=False, timeout=20
        )
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
