"""What engines are built for: GPUs by name, or compute capabilities as `smNN`."""

import importlib
import re
from dataclasses import dataclass
from typing import Any

from klein_kv.errors import BackendError, BuildError

__all__ = [
    "GPUS",
    "LEAST_SM",
    "TARGETS",
    "Gpu",
    "Target",
    "check_precision",
    "compute_capability",
    "find_target",
    "local_sm",
]


@dataclass(frozen=True, slots=True)
class Gpu:
    """Figures that kernel plans are priced with: bandwidth in 1e9 B/s, memory in 1e9 B.

    `tflops` is the peak dense tensor throughput with float32 accumulation, 1e12 FLOP/s, by type of
    the operands ("bf16", "fp16", "fp8", "fp4"); a type that is absent has no figure.
    """

    name: str
    tflops: dict[str, float]
    bandwidth: float
    memory: float


GPUS = {
    # NVIDIA's figures for the GeForce RTX 5090 (RTX Blackwell GPU Architecture whitepaper).
    "rtx5090": Gpu(
        "GeForce RTX 5090",
        {"bf16": 209.5, "fp16": 209.5, "fp8": 419.0, "fp4": 1676.0},
        1792,
        32,
    ),
    # Derived from NVIDIA's "1801 AI TOPS" (FP4 with sparsity): dense FP4 is half of it, and FP8 and
    # BF16 a quarter and an eighth of dense FP4, as on the RTX 5090 (3352 AI TOPS). Memory:
    # notebookcheck.net, "Nvidia GeForce RTX 5080".
    "rtx5080": Gpu(
        "GeForce RTX 5080",
        {"bf16": 112.6, "fp16": 112.6, "fp8": 225.1, "fp4": 900.5},
        960,
        16,
    ),
    # hmc-tech.com and waredb.com, "GeForce RTX 4090": tensor FP16 and FP8 with FP32 accumulation.
    "rtx4090": Gpu("GeForce RTX 4090", {"bf16": 165.2, "fp16": 165.2, "fp8": 330.3}, 1008, 24),
    # 142 TFLOP/s is the dense FP16 figure with FP16 accumulation (Tom's Hardware's table of the
    # RTX 3090); with FP32 accumulation GeForce cards run at half of it.
    "rtx3090": Gpu("GeForce RTX 3090", {"bf16": 71.0, "fp16": 71.0}, 936, 24),
}
"""GPUs with figures; other targets build as well and have no price."""

TARGETS = {
    **dict.fromkeys(("rtx5090", "rtx5080", "rtx5070ti", "rtx5070", "rtx5060ti"), 120),
    "rtx-pro-6000": 120,  # Workstation, Max-Q and server editions have different clocks: no figures
    "dgx-spark": 121,
    **dict.fromkeys(("rtx4090", "rtx4080", "rtx4070", "l40s", "rtx6000-ada"), 89),
    **dict.fromkeys(("rtx3090", "rtx3080", "a6000", "a10"), 86),
    "a100": 80,
}
"""Compute capabilities without the dot, by target (https://developer.nvidia.com/cuda-gpus)."""

# The GPU whose figures stand for a bare `smNN`.
_TYPICAL = {120: "rtx5090", 89: "rtx4090", 86: "rtx3090"}


@dataclass(frozen=True, slots=True)
class Target:
    """What one set of engines is built for; `sm` is the compute capability: 120 is 12.0."""

    name: str
    sm: int
    gpu: Gpu | None = None


LEAST_SM = {"bf16": 80, "fp8": 89, "nvfp4": 100}
"""First compute capability that multiplies them: Ampere, Ada, Blackwell (Model Optimizer)."""


def find_target(name: str) -> Target:
    """A target by name (`rtx5090`), or by compute capability (`sm120`); else a `BuildError`."""
    key = name.lower()
    if key in TARGETS:
        return Target(key, TARGETS[key], GPUS.get(key))
    if match := re.fullmatch(r"sm_?(\d{2,3})", key):
        sm = int(match[1])
        return Target(f"sm{sm}", sm, GPUS.get(_TYPICAL.get(sm, "")))
    raise BuildError(
        f"unknown target {name!r}; expected one of {', '.join(TARGETS)}, or a compute capability "
        "such as sm120"
    )


def check_precision(precision: str, target: Target) -> None:
    """Refuses, with a `BuildError`, a precision that the target's GPUs do not compute."""
    least = LEAST_SM.get(precision, 0)
    if target.sm < least:
        choices = [name for name, sm in LEAST_SM.items() if sm <= target.sm] or ["fp16"]
        raise BuildError(
            f"precision is {precision!r}, which takes compute capability {least / 10:.1f}, and "
            f"{target.name} has {target.sm / 10:.1f}; choose {' or '.join(choices)}"
        )


def compute_capability(trt: Any, target: Target) -> Any | None:
    """The library's own constant for a target, or None for a library that has none.

    `tensorrt` has none: it builds for the GPU of the machine it runs on. A `BuildError` tells of a
    capability that the library does not know, or that this GPU has not; a `BackendError` of none.
    """
    if not hasattr(trt, "ComputeCapability"):
        if (sm := local_sm()) != target.sm:
            raise BuildError(
                f"target {target.name} has compute capability {target.sm / 10:.1f}, the GPU of "
                f"this machine has {sm / 10:.1f}: {trt.__name__} builds for the machine's own GPU; "
                f"build with --target sm{sm} here, or with tensorrt_rtx, which needs no GPU"
            )
        return None
    known = trt.ComputeCapability.__members__
    if f"SM{target.sm}" not in known:
        names = sorted((name for name in known if name[:2] == "SM"), key=lambda name: int(name[2:]))
        raise BuildError(
            f"target {target.name}: {trt.__name__} {trt.__version__} cannot build for compute "
            f"capability {target.sm / 10:.1f}; it knows {', '.join(names)}"
        )
    return known[f"SM{target.sm}"]


def local_sm() -> int:
    """Compute capability of this machine's first GPU, without the dot, or a `BackendError`."""
    try:
        cudart = importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise BackendError(
            "finding this machine's GPU needs cuda-python; install it: "
            "pip install 'klein-kv[tensorrt]'"
        ) from error
    status, properties = cudart.cudaGetDeviceProperties(0)
    if status != cudart.cudaError_t.cudaSuccess:
        raise BackendError(
            f"no usable NVIDIA GPU (CUDA says {status.name}); tensorrt builds on the GPU it builds "
            "for, tensorrt_rtx builds without one: pip install 'klein-kv[rtx]'"
        )
    return int(properties.major) * 10 + int(properties.minor)
