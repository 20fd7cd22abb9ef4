"""What one kernel of a plan costs: arithmetic, memory traffic, seconds by the roofline model."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from klein_kv.artifacts.quantized_weights import BLOCK_SCALES
from klein_kv.artifacts.targets import Gpu
from klein_kv.engines.plan.kernel_plan import Kernel, Operand
from klein_kv.errors import BuildError

__all__ = [
    "KernelCost",
    "blends_modulation",
    "copies_weight",
    "moves_block_scales",
    "price_kernel",
    "product_format",
]

_PRECISION = {"BFloat16": "bf16", "Half": "fp16", "FP8": "fp8", "FP4": "fp4", "FP4E2M1": "fp4"}
# Words in a kernel's name that read only a part of an operand.
_PARTIAL = re.compile("Slic|Gath")


@dataclass(frozen=True, slots=True)
class KernelCost:
    """One kernel: `flops` of matrix products, bytes it moves, seconds by the model."""

    kernel: Kernel
    flops: int
    bytes: int
    seconds: float
    ideal_seconds: float

    @property
    def overhead(self) -> float:
        """Seconds beyond the necessary arithmetic."""
        return self.seconds - self.ideal_seconds


def price_kernel(kernel: Kernel, gpu: Gpu) -> KernelCost:
    """Prices one kernel.

    Raises:
        BuildError: the GPU has no figure for the type of a matrix product.
    """
    flops, dtype = _matrix_flops(kernel)
    moved = _bytes_read(kernel, exact=flops > 0) + sum(o.nbytes for o in kernel.outputs)
    ideal = 0.0
    if flops:
        precision = _PRECISION.get(dtype, dtype)
        peak = gpu.peak(precision)
        if peak is None:
            raise BuildError(
                f"no throughput of {gpu.name} for {precision} is known (kernel {kernel.name}); "
                f"known: {', '.join(gpu.tflops)}"
            )
        ideal = flops / peak
    return KernelCost(kernel, flops, moved, max(ideal, moved / (gpu.bandwidth * 1e9)), ideal)


def product_format(kernel: Kernel) -> str | None:
    """Format of a product or an attention on low-precision numbers: "fp8", "nvfp4", or None."""
    if kernel.is_attention:
        return "fp8" if [x.dtype for x in kernel.inputs[:3]] == ["FP8"] * 3 else None
    if kernel.kind not in ("gemm", "runtime_fusion"):
        return None
    found = _product(kernel)
    types = {_PRECISION.get(x.dtype) for x in found[:2]} if found is not None else set()
    return {"fp8": "fp8", "fp4": "nvfp4"}.get(str(types.pop())) if len(types) == 1 else None


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
        return _product_flops(kernel)
    return 0, ""


def _product_flops(kernel: Kernel) -> tuple[int, str]:
    found = _product(kernel)
    if found is None:
        return 0, ""
    a, b, out = found
    # The narrower operand sets the rate: FP8 and FP4 products name both.
    return 2 * out.elements * a.dims[-1], b.dtype


def _product(kernel: Kernel) -> tuple[Operand, Operand, Operand] | None:
    """Finds [.., M, K] x [.., K, N] = [.., M, N] among the operands."""
    operands = [o for o in (*kernel.inputs, *kernel.constants) if len(o.dims) >= 2]
    for out in kernel.outputs:
        if len(out.dims) < 2:
            continue
        for a in operands:
            for b in operands:
                if (
                    a is not b
                    and a.dims[-1] == b.dims[-2]
                    and (a.dims[-2], b.dims[-1]) == out.dims[-2:]
                ):
                    return a, b, out
    return None


def _bytes_read(kernel: Kernel, exact: bool) -> int:
    """Bytes of the inputs, through slices and gathers only what is used of them.

    The builder names an operand whole even where a kernel reads a slice. An elementwise kernel
    cannot read more of a sliced operand than fits in its largest output beside what it copies
    whole. A tensor that is listed twice is read through two slices.
    """
    inputs = [*kernel.inputs, *kernel.constants]
    if exact or not _PARTIAL.search(kernel.operation):
        return sum(operand.nbytes for operand in _distinct(inputs))
    room = max((operand.elements for operand in kernel.outputs), default=0)
    sliced = [operand for operand in inputs if operand.elements > room]
    whole = [operand for operand in inputs if operand.elements <= room]
    if "Conc" in kernel.operation:
        # What is concatenated whole leaves that much less room for the slices.
        shared = sum(o.elements for o in _distinct(whole) if o.elements * 16 > room)
        room = room - shared if shared < room else room
    counted = Counter(operand.name for operand in sliced)
    total = sum(operand.nbytes for operand in _distinct(whole))
    for operand in _distinct(sliced):
        used = min(operand.elements, counted[operand.name] * room)
        total += operand.nbytes * used // operand.elements
    return total


def _distinct(operands: Iterable[Operand]) -> list[Operand]:
    return list({operand.name: operand for operand in operands}.values())


def copies_weight(kernel: Kernel, weights: frozenset[str]) -> bool:
    """Whether a kernel that multiplies nothing writes a weight anew: transposed, cast or copied.

    A gather reads rows of a weight (the token embedding) and writes less than it. Block scales are
    not counted; see `moves_block_scales`.
    """
    if kernel.is_attention or _matrix_flops(kernel)[0]:
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

    TensorRT-RTX 1.7.1 does this at every run, in two kernels per weight (the second reads what the
    first wrote and is not counted): one per 16 numbers of the weight. No input takes them in
    that order.
    """
    return not _matrix_flops(kernel)[0] and any(
        operand.name.endswith(BLOCK_SCALES) for operand in kernel.inputs
    )


def blends_modulation(kernel: Kernel) -> bool:
    """Whether a kernel of the modulation writes more than a few vectors: [tokens, dim]."""
    if not any("modulation" in name for name in kernel.onnx_layers):
        return False
    return any(
        len(operand.dims) > 1 and prod(operand.dims[:-1]) > 16 and operand.dims[-1] > 1
        for operand in kernel.outputs
    ) and all("modulation" in name for name in kernel.onnx_layers)
