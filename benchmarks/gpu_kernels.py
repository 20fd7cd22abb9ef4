"""Where a step's time goes: the device's peak, a step's parts, a run's kernels."""

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from gpu_timing import median_seconds, synchronize, timed, with_spread

from klein_kv.config import TransformerConfig
from klein_kv.model import StepInputs, denoise, encode_references, transformer_parameters
from klein_kv.torch_ops import TorchOps

__all__ = [
    "Part",
    "attention_backends",
    "kernel_classes",
    "matmul_peak",
    "parts_of_step",
    "step_parts",
]

# What a kernel is, by pieces of its name; the first that fits. torch.compile's kernels name all the
# operations that they touch; nvjet is cuBLAS on Hopper.
_CLASSES = (
    ("matmul", ("triton_tem",)),
    ("compiled", ("triton_",)),
    ("attention", ("flash", "fmha", "attention", "sdpa", "softmax")),
    ("matmul", ("gemm", "nvjet", "cutlass", "xmma", "cublas", "::mm", "addmm", "linear")),
    ("copy", ("memcpy", "memset", "copy_", "cat", "clone")),
)
_TOP_KERNELS = 12


@dataclass(frozen=True, slots=True)
class Part:
    """One matrix product or attention.

    Attributes:
        kind: "linear" or "attention".
        shape: (rows, in, out), or (batch, heads, queries, keys, head size).
    """

    kind: str
    shape: tuple[int, ...]

    @property
    def flops(self) -> int:
        """Operations, two per multiply-add."""
        if self.kind == "linear":
            rows, inner, out = self.shape
            return 2 * rows * inner * out
        batch, heads, queries, keys, size = self.shape
        return 4 * batch * heads * queries * keys * size

    def runner(self, device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
        """A function that computes it on random numbers."""

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device).to(dtype)

        if self.kind == "linear":
            rows, inner, out = self.shape
            x, weight = normal(rows, inner), normal(out, inner)
            return lambda: F.linear(x, weight)
        batch, heads, queries, keys, size = self.shape
        # Heads next to features, as the model has them.
        q = normal(batch, queries, heads, size).transpose(1, 2)
        k, v = (normal(batch, keys, heads, size).transpose(1, 2) for _ in range(2))
        return lambda: F.scaled_dot_product_attention(q, k, v)


class _CountingOps(TorchOps):
    """Counts matrix products and attentions; on the device "meta" nothing is computed."""

    def __init__(self, net: TransformerConfig) -> None:
        with torch.device("meta"):
            weights = {
                name: torch.empty(shape) for name, shape in transformer_parameters(net).items()
            }
        super().__init__(weights, torch.float32)
        self.parts: Counter[Part] = Counter()

    def linear(
        self, rows: torch.Tensor, weight: str, part: tuple[int, int] | None = None
    ) -> torch.Tensor:
        result = super().linear(rows, weight, part)
        self.parts[Part("linear", (*rows.shape, result.shape[1]))] += 1
        return result

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        batch, queries, heads, size = q.shape
        self.parts[Part("attention", (batch, heads, queries, k.shape[1], size))] += 1
        return super().attention(q, k, v, mask)


def parts_of_step(
    graph: str,
    net: TransformerConfig,
    *,
    batch: int,
    image_tokens: int,
    text_tokens: int,
    ref_tokens: int,
) -> Counter[Part]:
    """What `klein_kv.model` multiplies in `cached_step` or `encode_references`.

    Args:
        graph: one of the two.
        net: the network's shape.
        batch: images made at once.
        image_tokens: S.
        text_tokens: T.
        ref_tokens: R.
    """
    ops = _CountingOps(net)

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def ids(count: int) -> torch.Tensor:
        return meta(count, 4, dtype=torch.int64)

    if graph == "encode_references":
        encode_references(ops, net, meta(1, ref_tokens, net.in_channels), ids(ref_tokens))
        return ops.parts
    inputs = StepInputs(
        meta(batch, image_tokens, net.in_channels),
        meta(batch, text_tokens, net.joint_attention_dim),
        meta(1),
        meta(1),
        ids(image_tokens),
        ids(text_tokens),
    )
    kv = [meta(1, ref_tokens, net.num_attention_heads, net.attention_head_dim)] * (
        2 * net.num_blocks
    )
    denoise(ops, net, inputs, kv)
    return ops.parts


def step_parts(
    graph: str, net: TransformerConfig, sizes: dict[str, int], device: torch.device
) -> dict[str, Any]:
    """Seconds of a step's matrix products and attentions, each timed alone in bfloat16.

    Their sum is what a step takes at least with these kernels; what it takes longer goes to norms,
    RoPE, activations, copies and launches.
    """
    seconds = {"linear": 0.0, "attention": 0.0}
    flops = {"linear": 0, "attention": 0}
    rows = []
    for part, count in parts_of_step(graph, net, **sizes).items():
        one = median_seconds(part.runner(device, torch.bfloat16), device, repeats=7, warm_up=2)
        seconds[part.kind] += count * one
        flops[part.kind] += count * part.flops
        rows.append(
            {"kind": part.kind, "shape": part.shape, "count": count, "seconds": one,
             "tflops_per_second": part.flops / one / 1e12}
        )  # fmt: skip
    return {
        "graph": graph,
        **sizes,
        "linear_seconds": seconds["linear"],
        "attention_seconds": seconds["attention"],
        "linear_tflops_per_second": flops["linear"] / seconds["linear"] / 1e12,
        "attention_tflops_per_second": flops["attention"] / seconds["attention"] / 1e12,
        "parts": sorted(rows, key=lambda row: -row["count"] * row["seconds"]),
    }


def matmul_peak(side: int, device: torch.device) -> dict[str, Any]:
    """TFLOP/s of square bfloat16 matrix products on random numbers, long enough to warm a GPU."""
    part = Part("linear", (side, side, side))
    samples = timed(part.runner(device, torch.bfloat16), device, repeats=50, warm_up=10)
    return {
        "shape": part.shape,
        "seconds": samples,
        "tflops_per_second": part.flops / statistics.median(samples) / 1e12,
        "spread_tflops_per_second": with_spread([part.flops / x / 1e12 for x in samples]),
    }


def attention_backends(
    net: TransformerConfig, sizes: dict[str, int], device: torch.device
) -> list[dict[str, Any]]:
    """The attention of a cached step with each of torch's kernels for it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    queries = sizes["image_tokens"] + sizes["text_tokens"]
    part = Part(
        "attention",
        (
            1,
            net.num_attention_heads,
            queries,
            queries + sizes["ref_tokens"],
            net.attention_head_dim,
        ),
    )
    run = part.runner(device, torch.bfloat16)
    rows: list[dict[str, Any]] = []
    for name in ("default", "FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
        row: dict[str, Any] = {"backend": name, "shape": part.shape}
        try:
            if name == "default":
                one = median_seconds(run, device, repeats=7, warm_up=2)
            else:
                with sdpa_kernel(getattr(SDPBackend, name)):
                    one = median_seconds(run, device, repeats=7, warm_up=2)
            row |= {"seconds": one, "tflops_per_second": part.flops / one / 1e12}
        except (AttributeError, RuntimeError) as error:  # not for this device, type or shape
            row["reason"] = f"{type(error).__name__}: {str(error)[:200]}"
        rows.append(row)
    return rows


def kernel_classes(run: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Seconds of a run by kind of kernel, from torch's profiler, and the longest kernels."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        run()
        synchronize(device)
    seconds: Counter[str] = Counter()
    rows = []
    for event in profiler.key_averages():
        spent = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
        if spent <= 0:
            continue
        kind = kernel_class(event.key)
        seconds[kind] += spent
        rows.append(
            {"kernel": event.key[:160], "kind": kind, "count": event.count, "seconds": spent}
        )
    rows.sort(key=lambda row: -row["seconds"])
    return {"seconds": dict(seconds.most_common()), "longest": rows[:_TOP_KERNELS]}


def kernel_class(name: str) -> str:
    """ "attention", "matmul", "copy", "compiled" or "other"."""
    name = name.lower()
    return next((kind for kind, parts in _CLASSES if any(part in name for part in parts)), "other")
