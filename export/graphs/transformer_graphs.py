"""The transformer's graphs and the text encoder's, written from their descriptions."""

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from klein_kv.artifacts.attention_scales import AttentionScales, kv_scales
from klein_kv.artifacts.config import ModelConfig
from klein_kv.artifacts.numbers import QuantizedLinear
from klein_kv.artifacts.signature import GraphSet, KVFormat, kv_names, make_signature
from klein_kv.artifacts.weights import WeightRef
from klein_kv.export.graphs.quantized_onnx_ops import QuantizedOnnxOps
from klein_kv.networks.kv_float8 import dequantize_references, quantize_references
from klein_kv.networks.text_encoder import encode_text
from klein_kv.networks.transformer import (
    StepInputs,
    denoise,
    denoise_with_references,
    encode_references,
)

__all__ = ["text_encoder_graph", "transformer_graph"]


def transformer_graph(
    graph: str,
    config: ModelConfig,
    graphs: GraphSet,
    weights: Mapping[str, WeightRef],
    quantized: Mapping[str, QuantizedLinear] | None = None,
    scales: Mapping[str, AttentionScales] | None = None,
) -> ir.Model:
    """Writes `first_step`, `cached_step`, `encode_references` or `plain_step`.

    Weights, numbers and block scales are external data in the safetensors files, and not read;
    other scales are constants. nvfp4 layers and float32 activations are an `ArtifactError`.

    `graphs` is the set that the graph belongs to, `quantized` its quantized layers by weight name;
    `scales`, by block, are needed where keys and values have constant ones or attention is float8.
    """
    kv_dtype, net = graphs.kv_dtype, config.transformer
    scales = scales or {}
    ops = QuantizedOnnxOps(
        make_signature(graph, config, graphs.dtype, kv_dtype),
        graphs.dtype,
        weights,
        quantized or {},
        None if graphs.attention is None else scales,
    )
    constants = kv_scales(net, scales) if kv_dtype == KVFormat.FP8_CONSTANT else []

    def pack(kv: Sequence[ir.Value]) -> list[ir.Value]:
        """Keys and values as they leave the graph."""
        if kv_dtype == KVFormat.FP8_PER_HEAD:
            return quantize_references(ops, kv)
        if kv_dtype == KVFormat.FP8_CONSTANT:
            return [ops.pack_kv(x, scale) for x, scale in zip(kv, constants, strict=True)]
        return list(kv)

    def unpack(packed: Sequence[ir.Value]) -> list[ir.Value]:
        if kv_dtype == KVFormat.FP8_PER_HEAD:
            return dequantize_references(ops, packed)
        if kv_dtype == KVFormat.FP8_CONSTANT:
            return [ops.unpack_kv(x, scale) for x, scale in zip(packed, constants, strict=True)]
        return list(packed)

    inputs = ops.inputs
    if graph == "cached_step":
        packed = [inputs[name] for name in kv_names(net.num_blocks, kv_dtype)]
    elif graph != "plain_step":
        kv = encode_references(ops, net, inputs["ref_hidden_states"], inputs["ref_ids"])
        packed = pack(kv)
    if graph == "encode_references":
        return ops.model(packed, "Reference tokens to per-block keys (after RoPE) and values.")
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
        outputs = list(denoise_with_references(ops, net, step, tokens, ids))
        return ops.model(outputs, "One denoising step in which the references take part.")
    outputs = list(denoise(ops, net, step, unpack(packed)))
    if graph == "first_step":
        return ops.model(outputs + packed, "encode_references, then one denoising step.")
    return ops.model(outputs, "One denoising step on given reference keys and values.")


def text_encoder_graph(
    config: ModelConfig,
    dtype: str,
    weights: Mapping[str, WeightRef],
    quantized: Mapping[str, QuantizedLinear] | None = None,
) -> ir.Model:
    """Writes the text encoder up to its last tapped block; the rest is as `transformer_graph`'s."""
    signature = make_signature("text_encoder", config, dtype)
    ops = QuantizedOnnxOps(signature, dtype, weights, quantized or {})
    out = encode_text(
        ops, config.text_encoder, ops.inputs["input_ids"], ops.inputs["attention_mask"]
    )
    return ops.model([out], "Prompt tokens to the tapped hidden states, side by side.")
