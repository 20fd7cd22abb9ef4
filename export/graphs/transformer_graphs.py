"""The transformer's graphs and the text encoder's, written from their descriptions."""

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from klein_kv.artifacts.attention_scales import AttentionScales, kv_scales
from klein_kv.artifacts.config import ModelConfig, TransformerConfig
from klein_kv.artifacts.numbers import QuantizedLinear
from klein_kv.artifacts.signature import GraphSet, KVFormat, kv_names, make_signature
from klein_kv.artifacts.weights import WeightRef
from klein_kv.export.graphs.onnx_ops import OnnxOps
from klein_kv.export.graphs.quantized_onnx_ops import QuantizedOnnxOps
from klein_kv.networks.kv_float8 import dequantize_references, quantize_references
from klein_kv.networks.text_encoder import encode_text
from klein_kv.networks.transformer import (
    StepInputs,
    denoise,
    denoise_with_references,
    encode_references,
)

__all__ = ["quantized_transformer_graph", "text_encoder_graph", "transformer_graph"]


def transformer_graph(
    graph: str,
    config: ModelConfig,
    dtype: str,
    weights: Mapping[str, WeightRef],
    kv_dtype: str | None = None,
) -> ir.Model:
    """Writes `first_step`, `cached_step`, `encode_references` or `plain_step`.

    Args:
        graph: which of them.
        config: the checkpoint's configuration.
        dtype: type of activations and weights.
        weights: where the transformer's tensors lie.
        kv_dtype: type that keys and values are handed on in; None for `dtype`.

    Returns:
        The model; its weights are external data in the safetensors files, and no weight is read.
    """
    ops = OnnxOps(make_signature(graph, config, dtype, kv_dtype), dtype, weights)
    codec = _DynamicFloat8(ops) if kv_dtype == KVFormat.FP8_PER_HEAD else _AsComputed()
    return _write_transformer(ops, graph, config.transformer, kv_dtype, codec)


def quantized_transformer_graph(
    graph: str,
    config: ModelConfig,
    graphs: GraphSet,
    weights: Mapping[str, WeightRef],
    quantized: Mapping[str, QuantizedLinear],
    scales: Mapping[str, AttentionScales],
) -> ir.Model:
    """The same with quantized linear layers.

    Args:
        graph: which of them.
        config: the checkpoint's configuration.
        graphs: the set that the graph belongs to: types of activations, of reference keys and
            values, and of attention.
        weights: where the transformer's tensors lie.
        quantized: quantized layers by weight name; the others are as in `weights`.
        scales: by block; used where keys and values, or attention, are float8.

    Returns:
        The model; numbers and block scales are external data, scales are constants.

    Raises:
        ArtifactError: nvfp4 layers and float32 activations.
    """
    dtype, kv_dtype = graphs.dtype, graphs.kv_dtype
    ops = QuantizedOnnxOps(
        make_signature(graph, config, dtype, kv_dtype),
        dtype,
        weights,
        quantized,
        None if graphs.attention is None else scales,
    )
    codec = _AsComputed()
    if kv_dtype == KVFormat.FP8_CONSTANT:
        codec = _StaticFloat8(ops, config.transformer, scales)
    return _write_transformer(ops, graph, config.transformer, kv_dtype, codec)


class _AsComputed:
    """How reference keys and values leave and enter a graph: as they are."""

    def pack(self, kv: Sequence[ir.Value]) -> list[ir.Value]:
        """Tensors of `signature.kv_names` from keys and values."""
        return list(kv)

    def unpack(self, packed: Sequence[ir.Value]) -> list[ir.Value]:
        """Keys and values from what `pack` returned."""
        return list(packed)


class _DynamicFloat8(_AsComputed):
    """In float8 with scales that follow from the values; see `klein_kv.networks.kv_float8`."""

    def __init__(self, ops: OnnxOps) -> None:
        self._ops = ops

    def pack(self, kv: Sequence[ir.Value]) -> list[ir.Value]:
        return quantize_references(self._ops, kv)

    def unpack(self, packed: Sequence[ir.Value]) -> list[ir.Value]:
        return dequantize_references(self._ops, packed)


class _StaticFloat8(_AsComputed):
    """In float8 with constant scales; see `klein_kv.artifacts.attention_scales`."""

    def __init__(
        self, ops: QuantizedOnnxOps, net: TransformerConfig, scales: Mapping[str, AttentionScales]
    ) -> None:
        self._ops = ops
        self._scales = kv_scales(net, scales)

    def pack(self, kv: Sequence[ir.Value]) -> list[ir.Value]:
        pairs = zip(kv, self._scales, strict=True)
        return [self._ops.pack_kv(tensor, scale) for tensor, scale in pairs]

    def unpack(self, packed: Sequence[ir.Value]) -> list[ir.Value]:
        pairs = zip(packed, self._scales, strict=True)
        return [self._ops.unpack_kv(tensor, scale) for tensor, scale in pairs]


def _write_transformer(
    ops: OnnxOps, graph: str, net: TransformerConfig, kv_dtype: str | None, codec: _AsComputed
) -> ir.Model:
    inputs = ops.inputs
    if graph == "encode_references":
        kv = encode_references(ops, net, inputs["ref_hidden_states"], inputs["ref_ids"])
        doc = "Reference tokens to per-block keys (after RoPE) and values."
        return ops.model(codec.pack(kv), doc)
    step = StepInputs(
        inputs["hidden_states"],
        inputs["encoder_hidden_states"],
        inputs["timestep"],
        inputs["sigma_step"],
        inputs["img_ids"],
        inputs["txt_ids"],
    )
    if graph == "plain_step":
        tokens, ids = inputs["ref_hidden_states"], inputs["ref_ids"]
        latents = list(denoise_with_references(ops, net, step, tokens, ids))
        return ops.model(latents, "One denoising step in which the references take part.")
    if graph == "cached_step":
        packed = [inputs[name] for name in kv_names(net.num_blocks, kv_dtype)]
    else:
        packed = codec.pack(
            encode_references(ops, net, inputs["ref_hidden_states"], inputs["ref_ids"])
        )
    outputs = list(denoise(ops, net, step, codec.unpack(packed)))
    if graph == "first_step":
        return ops.model(outputs + packed, "encode_references, then one denoising step.")
    return ops.model(outputs, "One denoising step on given reference keys and values.")


def text_encoder_graph(
    config: ModelConfig,
    dtype: str,
    weights: Mapping[str, WeightRef],
    quantized: Mapping[str, QuantizedLinear] | None = None,
) -> ir.Model:
    """Writes the text encoder up to its last tapped block; no weight is read.

    Args:
        config: the checkpoint's configuration.
        dtype: type of activations and weights.
        weights: where the text encoder's tensors lie.
        quantized: quantized layers by weight name.

    Raises:
        ArtifactError: nvfp4 layers and float32 activations.
    """
    signature = make_signature("text_encoder", config, dtype)
    ops = OnnxOps(signature, dtype, weights)
    if quantized is not None:
        ops = QuantizedOnnxOps(signature, dtype, weights, quantized)
    out = encode_text(
        ops, config.text_encoder, ops.inputs["input_ids"], ops.inputs["attention_mask"]
    )
    return ops.model([out], "Prompt tokens to the tapped hidden states, side by side.")
