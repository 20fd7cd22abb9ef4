"""Was quantization applied? What a graph asks to be computed in low precision, kernel by kernel.

TensorRT takes Q/DQ nodes as a permission, not as an order: where it finds no kernel it dequantizes
and multiplies in 16 bits, without a word. So what the graph asks for is looked for in the kernel
plan.
"""

from klein_kv.engines.plan.kernel_plan import Kernel, KernelPlan, Operand
from klein_kv.engines.rewrite.graph_quantization import QuantizedNodes
from klein_kv.errors import BuildError

__all__ = ["check_applied", "find_product", "product_format"]

_FORMATS = {"FP8": "fp8", "FP4": "nvfp4", "FP4E2M1": "nvfp4"}


def check_applied(nodes: QuantizedNodes, plan: KernelPlan) -> None:
    """Refuses, with a `BuildError`, an engine without the low precision that its graph asks for."""
    native: dict[str, str] = {}
    for kernel in plan.kernels:
        if (kind := product_format(kernel)) is not None:
            native |= dict.fromkeys(kernel.onnx_layers, kind)
    missing = [name for name, kind in nodes.products.items() if native.get(name) != kind]
    missing += [name for name in nodes.attentions if native.get(name) != "fp8"]
    if missing:
        wanted = len(nodes.products) + len(nodes.attentions)
        raise BuildError(
            f"{plan.graph}: quantization was not applied: for {plan.engine}, {len(missing)} of "
            f"{wanted} quantized products and attentions are no kernels of low precision: "
            f"{', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}. Sizes may be too "
            "small or odd for such kernels, or the GPU has none: keep these layers in an override "
            "of the quantization recipe, or build another precision"
        )


def product_format(kernel: Kernel) -> str | None:
    """Format of a product or an attention on low-precision numbers: "fp8", "nvfp4", or None."""
    if kernel.is_attention:
        return "fp8" if [x.dtype for x in kernel.inputs[:3]] == ["FP8"] * 3 else None
    if kernel.kind not in ("gemm", "runtime_fusion"):
        return None
    product = find_product(kernel)
    formats = {_FORMATS.get(x.dtype) for x in product[:2]} if product is not None else set()
    return formats.pop() if len(formats) == 1 else None


def find_product(kernel: Kernel) -> tuple[Operand, Operand, Operand] | None:
    """Finds [.., M, K] x [.., K, N] = [.., M, N] among the operands of a kernel."""
    operands = [x for x in (*kernel.inputs, *kernel.constants) if len(x.dims) >= 2]
    for out in kernel.outputs:
        for a in operands:
            for b in operands:
                if a is not b and (
                    (a.dims[-1], a.dims[-2], b.dims[-1]) == (b.dims[-2], *out.dims[-2:])
                ):
                    return a, b, out
    return None
