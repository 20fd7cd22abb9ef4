"""What a graph asks to be computed in low precision; `engines.plan.applied` looks for it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

__all__ = ["QuantizedNodes", "find_quantized"]

_SHAPE_ONLY = ("Reshape", "Transpose")
_FLOAT8, _FLOAT4 = 17, 23


@dataclass(frozen=True, slots=True)
class QuantizedNodes:
    """What a graph asks to be computed in low precision: products, and attentions on float8.

    A product, by its node, is "fp8" or "nvfp4" where weight and input are both quantized.
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
