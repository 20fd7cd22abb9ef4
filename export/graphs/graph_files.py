"""A graph's two files: the ONNX file, and the table of where its weights lie."""

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from klein_kv.artifacts.attention_scales import attention_scales
from klein_kv.artifacts.config import ModelConfig
from klein_kv.artifacts.quantized_weights import QuantizedComponent
from klein_kv.artifacts.signature import GraphSet, distinct_graphs, quantized_graph_sets
from klein_kv.artifacts.weights import WeightRef, save_graph_weights, weights_file
from klein_kv.export.graphs.onnx_ops import IR_DTYPES
from klein_kv.export.graphs.transformer_graphs import text_encoder_graph, transformer_graph

__all__ = ["save_graph", "save_quantized_graphs"]

_NAMES = {number: name for name, number in IR_DTYPES.items()}


def save_graph(model: ir.Model, path: Path) -> None:
    """Writes a graph, whose external initializers lie beside it, and its `*.weights.json`."""
    table = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            table[name] = WeightRef(
                path.parent / str(tensor.location),
                tensor.offset or 0,
                tensor.length or tensor.nbytes,
                _NAMES[tensor.dtype],
                tuple(tensor.shape.numpy()),
            )
    ir.save(model, path)
    save_graph_weights(path.parent / weights_file(path.name), table)


def save_quantized_graphs(
    folder: Path,
    config: ModelConfig,
    graphs: GraphSet,
    component: str,
    weights: Mapping[str, WeightRef],
    quantized: QuantizedComponent,
) -> None:
    """Writes the graphs of one quantized network, in every form that engines are built from.

    Float32 artifacts get none for nvfp4: only TensorRT runs those, and it wants 16 bits. `graphs`
    are the artifacts' own, `weights` the component's own tensors, in files whose names lie beside
    the graphs.
    """
    formats = {layer.format for layer in quantized.linears.values()}
    if graphs.dtype == "float32" and "nvfp4" in formats:
        return
    name = next(iter(quantized.linears.values())).weight.path.name.removesuffix(".safetensors")
    scales = {}
    if component == "transformer":
        scales = attention_scales(config.transformer, quantized.attention, weights)
    sets = quantized_graph_sets(graphs.variant, graphs.dtype, {component: name})
    for _, graph, there in distinct_graphs(sets):
        path = folder / there.files[graph]
        if path.parent.name != component:
            continue
        if component == "text_encoder":
            model = text_encoder_graph(config, there.dtype, weights, quantized.linears)
        else:
            model = transformer_graph(graph, config, there, weights, quantized.linears, scales)
        save_graph(model, path)
