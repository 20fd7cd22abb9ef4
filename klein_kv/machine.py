"""What this machine has: versions of what klein-kv uses, memory, GPUs."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from typing import Any

import psutil

from klein_kv import __version__

__all__ = ["DISTRIBUTIONS", "examine_machine", "peak_memory", "usable_cpus"]

# Distribution, what it is for, and the extra that brings it.
DISTRIBUTIONS = (
    ("onnxruntime", "runs artifacts on a CPU", "cpu"),
    ("onnxruntime-gpu", "runs artifacts on a CUDA GPU", "cuda"),
    ("tensorrt-rtx-cu13", "builds and runs engines for RTX GPUs", "rtx"),
    ("tensorrt", "builds and runs engines for data-centre GPUs", "tensorrt"),
    ("cuda-python", "device memory and streams for engines", "rtx"),
    ("torch", "runs artifacts on a CPU or a CUDA GPU, export, verify", "torch"),
    ("diffusers", "fixture checkpoints, verify", "export"),
    ("transformers", "export of the tokenizer, verify", "export"),
    ("onnx", "export", "export"),
    ("onnx_ir", "export", "export"),
    ("safetensors", "fixture checkpoints", "export"),
    ("pillow-heif", "reads HEIC images", "heif"),
    ("fastapi", "klein-kv serve", "serve"),
)


def examine_machine() -> dict[str, Any]:
    """Versions, bytes of memory, GPUs with their drivers, and whether a backend is installed."""
    packages = {name: _version(name) for name, _, _ in DISTRIBUTIONS}
    memory = psutil.virtual_memory()
    return {
        "klein_kv": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "memory_bytes": memory.total,
        "memory_available_bytes": memory.available,
        "gpus": _gpus(),
        "packages": packages,
        "ready": any(packages[name] for name in ("onnxruntime", "onnxruntime-gpu", "torch")),
    }


def peak_memory() -> int:
    """The most bytes of memory that this process has had at once."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def usable_cpus() -> int:
    """CPUs that this process may run on; all of them where the system does not say."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    """Name, driver and memory of each GPU, as nvidia-smi tells them."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]
