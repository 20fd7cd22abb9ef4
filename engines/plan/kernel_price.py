"""What a kernel plan costs on a GPU: a model, not a measurement.

Every kernel takes as long as its arithmetic at peak throughput or its memory traffic at peak
bandwidth, whichever is longer, and kernels run one after the other. Real kernels reach neither
peak; launches, caches and overlapping streams are left out. What the price shows well is time that
no multiplication needs: copies, transposes, elementwise passes.
"""

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from klein_kv.artifacts.engines.targets import Gpu
from klein_kv.artifacts.quantized_weights import BLOCK_SCALES
from klein_kv.engines.plan.applied import find_product, product_format
from klein_kv.engines.plan.kernel_plan import Kernel, KernelPlan, Operand
from klein_kv.errors import BuildError

__all__ = ["PlanPrice", "price_plan"]

_PRECISION = {"BFloat16": "bf16", "Half": "fp16", "FP8": "fp8", "FP4": "fp4", "FP4E2M1": "fp4"}
_PARTIAL = ("Slic", "Gath")  # in the name of a kernel that reads only a part of an operand


class KernelPrice(NamedTuple):
    """One kernel: `flops` of matrix products, bytes it moves, seconds by the model."""

    flops: int
    bytes: int
    seconds: float
    ideal_seconds: float


@dataclass(frozen=True, slots=True)
class PlanPrice:
    """A whole engine."""

    graph: str
    engine: str
    gpu: str  # name of the GPU that it is priced for
    kernels: int
    attention_kernels: int  # fused attentions among them
    flops: int  # of matrix products, attention and convolutions: all that is necessary
    bytes: int  # memory traffic of all kernels
    seconds: float
    ideal_seconds: float  # `flops` at peak throughput
    # Plan time over ideal time; 1 is a plan of multiplications alone, None one without any.
    ratio: float | None
    scratch_bytes: int  # activation memory
    weight_copies: tuple[str, ...]  # kernels that write a whole weight anew at every run
    # kernels that write a modulation per token instead of one vector
    blended_modulations: tuple[str, ...]
    native_products: dict[str, int]  # matrix products on low-precision numbers, by format
    float8_attentions: int  # fused attention kernels on float8 numbers
    # nvfp4 weights whose block scales are brought into another order per run
    block_scale_moves: int


def price_plan(plan: KernelPlan, gpu: Gpu) -> PlanPrice:
    """Prices every kernel; a `BuildError` without concrete sizes, or figures of the GPU."""
    if not plan.kernels:
        raise BuildError(
            f"there is no kernel plan of {plan.graph}: its builder reported none ({plan.engine})"
        )
    if not plan.known:
        raise BuildError(
            f"the kernel plan of {plan.graph} has no concrete sizes, because its engine takes "
            "dynamic shapes; build a recipe of one shape, such as static-1024-4ref, to price it"
        )
    prices = [price_kernel(kernel, gpu) for kernel in plan.kernels]
    attentions = [kernel for kernel in plan.kernels if kernel.is_attention]
    formats = [product_format(kernel) for kernel in plan.kernels if not kernel.is_attention]
    seconds, ideal = sum(x.seconds for x in prices), sum(x.ideal_seconds for x in prices)
    return PlanPrice(
        graph=plan.graph,
        engine=plan.engine,
        gpu=gpu.name,
        kernels=len(prices),
        attention_kernels=len(attentions),
        flops=sum(x.flops for x in prices),
        bytes=sum(x.bytes for x in prices),
        seconds=seconds,
        ideal_seconds=ideal,
        ratio=seconds / ideal if ideal else None,
        scratch_bytes=plan.scratch_bytes,
        weight_copies=tuple(k.name for k in plan.kernels if copies_weight(k, plan.weights)),
        blended_modulations=tuple(k.name for k in plan.kernels if blends_modulation(k)),
        native_products=dict(Counter(name for name in formats if name is not None)),
        float8_attentions=sum(product_format(kernel) == "fp8" for kernel in attentions),
        block_scale_moves=sum(moves_block_scales(kernel) for kernel in plan.kernels),
    )


def price_kernel(kernel: Kernel, gpu: Gpu) -> KernelPrice:
    """Prices one kernel; a `BuildError` if the GPU has no figure for its type."""
    flops, dtype = _matrix_flops(kernel)
    moved = _bytes_read(kernel, exact=flops > 0) + sum(x.nbytes for x in kernel.outputs)
    ideal = 0.0
    if flops:
        precision = _PRECISION.get(dtype, dtype)
        if precision not in gpu.tflops:
            raise BuildError(
                f"no throughput of {gpu.name} for {precision} is known (kernel {kernel.name}); "
                f"known: {', '.join(gpu.tflops)}"
            )
        ideal = flops / (gpu.tflops[precision] * 1e12)
    return KernelPrice(flops, moved, max(ideal, moved / (gpu.bandwidth * 1e9)), ideal)


def copies_weight(kernel: Kernel, weights: Collection[str]) -> bool:
    """Whether a kernel that multiplies nothing writes a weight anew: transposed, cast or copied.

    A gather reads rows of a weight (the token embedding) and writes less than it. Block scales are
    not counted; see `moves_block_scales`.
    """
    if _matrix_flops(kernel)[0]:
        return False
    largest = max((operand.elements for operand in kernel.outputs), default=0)
    return any(
        operand.name in weights
        and not operand.name.endswith(BLOCK_SCALES)
        and sum(dim > 1 for dim in operand.dims) > 1
        and largest >= operand.elements
        for operand in kernel.inputs
    )


def moves_block_scales(kernel: Kernel) -> bool:
    """Whether a kernel brings the block scales of an nvfp4 weight into the order of its product.

    TensorRT-RTX 1.7.1 does so at every run, in two kernels per weight; the second, which reads what
    the first wrote, is not counted. No input takes them in that order.
    """
    reads = any(operand.name.endswith(BLOCK_SCALES) for operand in kernel.inputs)
    return reads and not _matrix_flops(kernel)[0]


def blends_modulation(kernel: Kernel) -> bool:
    """Whether a kernel of the modulation writes more than a few vectors: [tokens, dim]."""
    modulation = bool(kernel.onnx_layers) and all("modulation" in x for x in kernel.onnx_layers)
    return modulation and any(
        len(operand.dims) > 1 and prod(operand.dims[:-1]) > 16 and operand.dims[-1] > 1
        for operand in kernel.outputs
    )


def _matrix_flops(kernel: Kernel) -> tuple[int, str]:
    """Two per multiply-add of a product, attention or convolution, and the operands' type."""
    if kernel.is_attention:
        q, k = kernel.inputs[0], kernel.inputs[1]
        # q [..., S, D], k [..., D, K]: scores, then the product with v.
        return 4 * q.elements * k.dims[-1], q.dtype
    if kernel.kind == "correlation":
        kernels = [c for c in kernel.constants if len(c.dims) == 4 and c.elements > 1]
        if not kernels or not kernel.outputs:
            return 0, ""
        weight = max(kernels, key=lambda operand: operand.elements)
        channels = kernel.outputs[0].dims[1]  # [B, C, H, W] whatever the strides say
        return 2 * kernel.outputs[0].elements * (weight.elements // channels), weight.dtype
    if kernel.kind in ("gemm", "runtime_fusion") or "Fc" in kernel.operation:
        product = find_product(kernel)
        if product is not None:
            a, b, out = product
            # The narrower operand sets the rate: FP8 and FP4 products name both.
            return 2 * out.elements * a.dims[-1], b.dtype
    return 0, ""


def _bytes_read(kernel: Kernel, exact: bool) -> int:
    """Bytes of the inputs, through slices and gathers only what is used of them.

    The builder names an operand whole even where a kernel reads a slice: of it no more than fits in
    the largest output, beside what is copied whole. One that is listed twice is read in two slices.
    """
    inputs = [*kernel.inputs, *kernel.constants]
    if exact or not any(word in kernel.operation for word in _PARTIAL):
        return sum(operand.nbytes for operand in _distinct(inputs))
    room = max((operand.elements for operand in kernel.outputs), default=0)
    sliced = [operand for operand in inputs if operand.elements > room]
    whole = [operand for operand in inputs if operand.elements <= room]
    if "Conc" in kernel.operation:
        # What is concatenated whole leaves that much less room for the slices.
        shared = sum(x.elements for x in _distinct(whole) if x.elements * 16 > room)
        room = room - shared if shared < room else room
    listed = Counter(operand.name for operand in sliced)
    total = sum(operand.nbytes for operand in _distinct(whole))
    for operand in _distinct(sliced):
        used = min(operand.elements, listed[operand.name] * room)
        total += operand.nbytes * used // operand.elements
    return total


def _distinct(operands: Iterable[Operand]) -> list[Operand]:
    return list({operand.name: operand for operand in operands}.values())
