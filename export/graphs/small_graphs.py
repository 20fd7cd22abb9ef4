"""The graphs beside the networks', which read no weights, written from their descriptions."""

import onnx_ir as ir

from klein_kv.artifacts.config import ModelConfig
from klein_kv.artifacts.signature import make_signature
from klein_kv.export.graphs.onnx_ops import OnnxOps
from klein_kv.networks.latents import blend
from klein_kv.networks.merge import merge_lora

__all__ = ["small_graph"]


class MergeOnnxOps(OnnxOps):
    """`OnnxOps` with the operations on weights."""

    def product(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self._one("MatMul", a, b)

    def largest(self, x: ir.Value, least: ir.Value) -> ir.Value:
        largest = self._one("ReduceMax", self._one("Abs", x), keepdims=0)
        return self._one("Max", largest, least)

    def round_to_float8(self, x: ir.Value, scale: ir.Value) -> ir.Value:
        # The scale is not the operator's: TensorRT takes constants there.
        scaled, float8 = self._one("Div", x, scale), ir.DataType.FLOAT8E4M3FN
        return self._one("QuantizeLinear", scaled, self._float(1), output_dtype=float8)


def small_graph(graph: str, config: ModelConfig, dtype: str) -> ir.Model:
    """Writes a graph of `SMALL_GRAPH_FILES`; `dtype` is the artifacts' floating point type."""
    ops = MergeOnnxOps(make_signature(graph, config, dtype), dtype, {})
    if graph == "blend":
        return ops.model([blend(ops, **ops.inputs)], "Latents where a mask is 1, else an image.")
    return ops.model(merge_lora(ops, **ops.inputs), "Rows of a weight with a LoRA merged in.")
