"""The transformer's graphs and the text encoder's, written from their descriptions."""

from collections.abc import Mapping

import onnx_ir as ir

from klein_kv.config import ModelConfig
from klein_kv.export.onnx_ops import OnnxOps
from klein_kv.kv_float8 import dequantize_references, quantize_references
from klein_kv.model import StepInputs, denoise, denoise_with_references, encode_references
from klein_kv.signature import kv_names, make_signature
from klein_kv.text_model import encode_text
from klein_kv.weights import WeightRef

__all__ = ["text_encoder_graph", "transformer_graph"]


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
    packed = kv_dtype not in (None, dtype)
    ops = OnnxOps(make_signature(graph, config, dtype, kv_dtype), dtype, weights)
    inputs, net = ops.inputs, config.transformer
    if graph == "encode_references":
        kv = encode_references(ops, net, inputs["ref_hidden_states"], inputs["ref_ids"])
        kv = quantize_references(ops, kv) if packed else kv
        return ops.model(kv, "Reference tokens to per-block keys (after RoPE) and values.")
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
        kv = [inputs[name] for name in kv_names(net.num_blocks, kv_dtype)]
    else:
        kv = encode_references(ops, net, inputs["ref_hidden_states"], inputs["ref_ids"])
        kv = quantize_references(ops, kv) if packed else kv
    outputs = list(denoise(ops, net, step, dequantize_references(ops, kv) if packed else kv))
    if graph == "first_step":
        return ops.model(outputs + kv, "encode_references, then one denoising step.")
    return ops.model(outputs, "One denoising step on given reference keys and values.")


def text_encoder_graph(
    config: ModelConfig, dtype: str, weights: Mapping[str, WeightRef]
) -> ir.Model:
    """Writes the text encoder up to its last tapped block; no weight is read."""
    ops = OnnxOps(make_signature("text_encoder", config, dtype), dtype, weights)
    out = encode_text(
        ops, config.text_encoder, ops.inputs["input_ids"], ops.inputs["attention_mask"]
    )
    return ops.model([out], "Prompt tokens to the tapped hidden states, side by side.")
