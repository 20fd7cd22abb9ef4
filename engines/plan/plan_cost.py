"""A kernel plan priced for a GPU. A model, not a measurement.

Every kernel takes as long as its arithmetic at peak throughput or its memory traffic at peak
bandwidth, whichever is longer, and kernels run one after the other. Real kernels reach neither
peak; launches, caches and overlapping streams are left out. What the price shows well is where
time goes that no multiplication needs: copies, transposes, elementwise passes.
"""

import re
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from klein_kv.artifacts.targets import Gpu
from klein_kv.engines.plan.kernel_plan import Kernel, KernelPlan
from klein_kv.engines.plan.kernel_price import (
    KernelCost,
    blends_modulation,
    copies_weight,
    moves_block_scales,
    price_kernel,
    product_format,
)
from klein_kv.errors import BuildError

__all__ = ["MODEL_NOTE", "BlockCost", "CostGroup", "PlanCost", "price_plan"]

MODEL_NOTE = "model (peak throughput and bandwidth), not a measurement"


@dataclass(frozen=True, slots=True)
class BlockCost:
    """All kernels of one transformer block."""

    block: str
    seconds: float
    ideal_seconds: float
    kernels: int


@dataclass(frozen=True, slots=True)
class CostGroup:
    """Equal kernels of all blocks together."""

    operation: str
    shapes: str
    count: int
    bytes: int
    seconds: float
    overhead: float


@dataclass(frozen=True, slots=True)
class PlanCost:
    """A whole engine.

    Attributes:
        graph: the graph's name.
        engine: which build.
        gpu: name of the GPU that it is priced for.
        kernels: number of launches.
        attention_kernels: fused attentions among them.
        flops: of matrix products, attention and convolutions: all that is necessary.
        bytes: memory traffic of all kernels.
        seconds: plan time.
        ideal_seconds: `flops` at peak throughput.
        scratch_bytes: activation memory.
        weight_copies: kernels that write a whole weight anew at every run.
        blended_modulations: kernels that write a modulation per token instead of one vector.
        native_products: matrix products on low-precision numbers, by format.
        float8_attentions: fused attention kernels on float8 numbers.
        block_scale_moves: nvfp4 weights whose block scales are brought into another order per run.
        groups: equal kernels, largest overhead first.
        blocks: in launch order.
    """

    graph: str
    engine: str
    gpu: str
    kernels: int
    attention_kernels: int
    flops: int
    bytes: int
    seconds: float
    ideal_seconds: float
    scratch_bytes: int
    weight_copies: tuple[str, ...]
    blended_modulations: tuple[str, ...]
    native_products: dict[str, int]
    float8_attentions: int
    block_scale_moves: int
    groups: tuple[CostGroup, ...]
    blocks: tuple[BlockCost, ...]

    @property
    def ratio(self) -> float:
        """Plan time over ideal time; 1 is a plan of multiplications alone."""
        return self.seconds / self.ideal_seconds if self.ideal_seconds else float("inf")

    @property
    def other_share(self) -> float:
        """Share of the plan time that is not necessary arithmetic."""
        return 1 - self.ideal_seconds / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "note": MODEL_NOTE,
            **asdict(self),
            "ratio": self.ratio,
            "other_share": self.other_share,
        }


def price_plan(plan: KernelPlan, gpu: Gpu) -> PlanCost:
    """Prices every kernel of a plan.

    Raises:
        BuildError: the plan has no concrete sizes, or the GPU no figure for its type.
    """
    if not plan.kernels:
        raise BuildError(
            f"there is no kernel plan of {plan.graph}: its builder reported none ({plan.engine})"
        )
    if not plan.known:
        raise BuildError(
            f"the kernel plan of {plan.graph} has no concrete sizes, because its engine takes "
            "dynamic shapes; build a recipe of one shape, such as static-1024-4ref, to price it"
        )
    weights = frozenset(plan.weights)
    costs = [price_kernel(kernel, gpu) for kernel in plan.kernels]
    return PlanCost(
        graph=plan.graph,
        engine=plan.engine,
        gpu=gpu.name,
        kernels=len(costs),
        attention_kernels=sum(kernel.is_attention for kernel in plan.kernels),
        flops=sum(cost.flops for cost in costs),
        bytes=sum(cost.bytes for cost in costs),
        seconds=sum(cost.seconds for cost in costs),
        ideal_seconds=sum(cost.ideal_seconds for cost in costs),
        scratch_bytes=plan.scratch_bytes,
        weight_copies=tuple(k.name for k in plan.kernels if copies_weight(k, weights)),
        blended_modulations=tuple(k.name for k in plan.kernels if blends_modulation(k)),
        native_products=dict(
            Counter(
                kind
                for kernel in plan.kernels
                if not kernel.is_attention and (kind := product_format(kernel)) is not None
            )
        ),
        float8_attentions=sum(
            kernel.is_attention and product_format(kernel) == "fp8" for kernel in plan.kernels
        ),
        block_scale_moves=sum(moves_block_scales(kernel) for kernel in plan.kernels),
        groups=tuple(_groups(costs)),
        blocks=tuple(_blocks(costs)),
    )


def _groups(costs: list[KernelCost]) -> list[CostGroup]:
    found: dict[tuple[str, str], list[KernelCost]] = defaultdict(list)
    for cost in costs:
        found[_operation(cost.kernel), _shapes(cost.kernel)].append(cost)
    groups = [
        CostGroup(
            operation,
            shapes,
            len(group),
            sum(cost.bytes for cost in group),
            sum(cost.seconds for cost in group),
            sum(cost.overhead for cost in group),
        )
        for (operation, shapes), group in found.items()
    ]
    return sorted(groups, key=lambda group: (-group.overhead, -group.seconds))


def _operation(kernel: Kernel) -> str:
    return "gemm" if kernel.kind == "gemm" else kernel.operation


def _shapes(kernel: Kernel) -> str:
    big = max(kernel.inputs, key=lambda operand: operand.elements, default=None)
    parts = [operand for operand in (big, *kernel.outputs[:1]) if operand is not None]
    return " -> ".join("x".join(str(dim) for dim in operand.dims) for operand in parts)


def _blocks(costs: list[KernelCost]) -> list[BlockCost]:
    found: dict[str, list[KernelCost]] = {}
    for cost in costs:
        found.setdefault(_block_name(cost.kernel), []).append(cost)
    return [
        BlockCost(
            name,
            sum(cost.seconds for cost in group),
            sum(cost.ideal_seconds for cost in group),
            len(group),
        )
        for name, group in sorted(found.items(), key=lambda item: _block_order(item[0]))
    ]


def _block_name(kernel: Kernel) -> str:
    return kernel.block if re.search(r"\.\d+$", kernel.block) else "other"


def _block_order(name: str) -> tuple[int, str, int]:
    """Double blocks, single blocks, the rest; numbers as numbers."""
    scope, _, number = name.rpartition(".")
    if not scope:
        return (2, name, 0)
    return (int(scope.startswith("single")), scope, int(number))
