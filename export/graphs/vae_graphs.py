"""The VAE's two graphs, traced from the modules of `klein_kv.networks.vae` on fake tensors."""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from klein_kv.artifacts.config import ModelConfig
from klein_kv.artifacts.signature import make_signature
from klein_kv.artifacts.weights import WeightRef
from klein_kv.errors import CheckpointError
from klein_kv.export.graphs.onnx_ops import OPSET, external_tensor
from klein_kv.networks.vae import VaeDecoder, VaeEncoder, build_vae

__all__ = ["vae_graph", "vae_parameters"]

_MICROSOFT = "com.microsoft"


def vae_parameters(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a VAE's tensors, by its `vae/config.json` and diffusers' module."""
    with torch.device("meta"):
        state = build_vae(config, torch.float32).state_dict()
    return {name: tuple(value.shape) for name, value in state.items()}


def vae_graph(
    graph: str,
    config: ModelConfig,
    vae_config: Mapping[str, Any],
    dtype: str,
    weights: Mapping[str, WeightRef],
) -> ir.Model:
    """Traces `vae_encoder` or `vae_decoder`; no weight is read.

    Args:
        graph: which of the two.
        config: the checkpoint's configuration.
        vae_config: its `vae/config.json`.
        dtype: type of activations and weights.
        weights: where the VAE's tensors lie.
    """
    unit = config.vae.multiple_of
    height, width = (torch.export.Dim(f"grid_{side}", min=2) for side in ("height", "width"))
    # The dimensions traced with must differ from each other and from 0 and 1.
    with FakeTensorMode():
        vae = build_vae(vae_config, getattr(torch, dtype))
        if graph == "vae_encoder":
            module: torch.nn.Module = VaeEncoder(vae)
            example = torch.zeros(1, 3 * unit, 4 * unit, 3, dtype=torch.uint8)
            axes: dict[int, Any] = {1: unit * height, 2: unit * width}
        else:
            module = VaeDecoder(vae)
            shape = (2, 3, 4, config.transformer.in_channels)
            example = torch.zeros(shape, dtype=getattr(torch, dtype))
            # diffusers' `Upsample2D` makes 64 images and more contiguous, which the graph need not:
            # without the bound torch traces, finds that condition, and traces again with the bound.
            axes = {0: torch.export.Dim("batch", max=63), 1: height, 2: width}
        with _quiet():
            program = torch.onnx.export(
                module.eval(),
                (example,),
                dynamo=True,
                optimize=False,
                opset_version=OPSET,
                dynamic_shapes=(axes,),
                verbose=False,
            )
    if program is None:
        raise CheckpointError(f"{graph}: torch.onnx returned nothing")
    model = program.model
    if dtype == "float32":
        _use_multi_head_attention(model)
    if dtype == "bfloat16":
        _resize_as_float32(model.graph)
    _apply_signature(model, graph, config, dtype)
    _point_at_weights(model.graph, weights)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences what the exporter says of absent torchvision and of its own future."""
    logger = logging.getLogger("torch.onnx._internal.exporter")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def _apply_signature(model: ir.Model, graph: str, config: ModelConfig, dtype: str) -> None:
    signature = make_signature(graph, config, dtype)
    model.graph.name = graph
    for values, specs in (
        (model.graph.inputs, signature.inputs),
        (model.graph.outputs, signature.outputs),
    ):
        for value, spec in zip(values, specs, strict=True):
            value.name = spec.name
            value.shape = ir.Shape(spec.shape)
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None  # traced symbols are not the signature's


def _point_at_weights(graph: ir.Graph, weights: Mapping[str, WeightRef]) -> None:
    for name in list(graph.initializers):
        value = graph.initializers[name]
        source = name.removeprefix("vae.")
        if not value.uses():
            del graph.initializers[name]
        elif source in weights:
            del graph.initializers[name]
            value.name = source
            value.const_value = external_tensor(source, weights[source])
            graph.initializers[source] = value


def _resize_as_float32(graph: ir.Graph) -> None:
    """Casts around `Resize` (nearest, so exact): ONNX Runtime has no bfloat16 kernel for it."""
    for node in [node for node in graph if node.op_type == "Resize"]:
        wide = ir.node("Cast", [node.inputs[0]], attributes={"to": ir.DataType.FLOAT})
        resized = ir.node("Resize", [wide.outputs[0], *node.inputs[1:]], node.attributes)
        back = ir.node("Cast", resized.outputs, attributes={"to": ir.DataType.BFLOAT16})
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], [wide, resized, back], node.outputs, back.outputs
        )


def _use_multi_head_attention(model: ir.Model) -> None:
    """Replaces `Attention` by ONNX Runtime's operator, which never holds the score matrix."""
    graph = model.graph
    graph.opset_imports[_MICROSOFT] = 1
    flat = ir.Value(
        name="sequence_shape", const_value=ir.tensor(np.array([0, 0, -1]), name="sequence_shape")
    )
    for node in [node for node in graph if node.op_type == "Attention"]:
        query = node.inputs[0]
        heads = None if query is None or query.shape is None else query.shape[1]
        if not isinstance(heads, int):
            raise CheckpointError("vae: attention without a known number of heads")
        new: list[ir.Node] = []
        sequences = []
        for value in node.inputs[:3]:
            new.append(ir.node("Transpose", [value], attributes={"perm": [0, 2, 1, 3]}))
            new.append(ir.node("Reshape", [new[-1].outputs[0], flat]))
            sequences.append(new[-1].outputs[0])
        attributes = {"num_heads": heads}
        new.append(ir.node("MultiHeadAttention", sequences, attributes, domain=_MICROSOFT))
        shape = ir.tensor(np.array([0, 0, heads, -1]), name=f"{node.name}_heads")
        split = ir.Value(name=shape.name, const_value=shape)
        graph.register_initializer(split)
        new.append(ir.node("Reshape", [new[-1].outputs[0], split]))
        new.append(ir.node("Transpose", [new[-1].outputs[0]], attributes={"perm": [0, 2, 1, 3]}))
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], new, node.outputs, new[-1].outputs
        )
    if flat.uses():
        graph.register_initializer(flat)
