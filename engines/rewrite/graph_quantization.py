"""What of a graph is quantized, and whether an engine's kernels are.

TensorRT takes Q/DQ nodes as a permission, not as an order: where it finds no kernel it dequantizes
and multiplies in 16 bits, without a word. So what the graph asks for is counted before a build, and
looked for in the kernel plan afterwards.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from klein_kv.engines.plan.kernel_plan import KernelPlan
from klein_kv.engines.plan.kernel_price import product_format
from klein_kv.errors import BuildError

if TYPE_CHECKING:
    import onnx

__all__ = ["QuantizedNodes", "check_applied", "find_quantized"]

_SHAPE_ONLY = ("Reshape", "Transpose")
_FLOAT8, _FLOAT4 = 17, 23


@dataclass(frozen=True, slots=True)
class QuantizedNodes:
    """What a graph asks to be computed in low precision.

    Attributes:
        products: node -> "fp8" or "nvfp4", where weight and input are both quantized.
        attentions: attention nodes on float8 queries, keys and values.
    """

    products: Mapping[str, str]
    attentions: tuple[str, ...]


def find_quantized(model: "onnx.ModelProto") -> QuantizedNodes:
    """Finds products and attentions whose operands are all dequantized numbers."""
    made = {output: node for node in model.graph.node for output in node.output}
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}

    def source(name: str) -> "onnx.NodeProto | None":
        """The DequantizeLinear that a tensor comes from, if it comes from one."""
        node = made.get(name)
        while node is not None and node.op_type in _SHAPE_ONLY:
            node = made.get(node.input[0])
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    products, attentions = {}, []
    for node in model.graph.node:
        if node.op_type == "Gemm":
            numbers = source(node.input[1])
            kind = {_FLOAT8: "fp8", _FLOAT4: "nvfp4"}.get(
                types.get(numbers.input[0], 0) if numbers is not None else 0
            )
            if kind is not None and source(node.input[0]) is not None:
                products[node.name] = kind
        elif node.op_type == "Attention" and all(source(name) for name in node.input[:3]):
            attentions.append(node.name)
    return QuantizedNodes(products, tuple(attentions))


def check_applied(graph: str, engine: str, nodes: QuantizedNodes, plan: KernelPlan) -> None:
    """Refuses an engine that does not compute in low precision what the graph asks for.

    Args:
        graph: the graph's name, for the message.
        engine: which build, for the message.
        nodes: what `find_quantized` gave.
        plan: what the builder reported.

    Raises:
        BuildError: with the layers that fell back.
    """
    native: dict[str, str] = {}
    for kernel in plan.kernels:
        if (kind := product_format(kernel)) is not None:
            native |= dict.fromkeys(kernel.onnx_layers, kind)
    missing = [name for name, kind in nodes.products.items() if native.get(name) != kind]
    missing += [name for name in nodes.attentions if native.get(name) != "fp8"]
    if missing:
        wanted = len(nodes.products) + len(nodes.attentions)
        raise BuildError(
            f"{graph}: quantization was not applied: for {engine}, {len(missing)} of {wanted} "
            f"quantized products and attentions are no kernels of low precision: "
            f"{', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}. Sizes may be too "
            "small or odd for such kernels, or the GPU has none: keep these layers in an override "
            "of the quantization recipe, or build another precision"
        )
