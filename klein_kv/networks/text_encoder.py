"""The Qwen3 text encoder up to the last hidden state that klein reads.

Source of the arithmetic: transformers, `models/qwen3/modeling_qwen3.py`; what is read of it:
diffusers, `Flux2KleinKVPipeline._get_qwen3_prompt_embeds`. Blocks after the last tapped hidden
state, and the language-model head, do not exist here.
"""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from klein_kv.artifacts.config import TextEncoderConfig
from klein_kv.artifacts.signature import MAX_POSITION
from klein_kv.networks.ops import Ops

__all__ = ["encode_text", "text_encoder_parameters"]

T = TypeVar("T")


def text_encoder_parameters(config: TextEncoderConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that are read, as transformers' Qwen3 saves them."""
    dim, head, mlp = config.hidden_size, config.head_dim, config.intermediate_size
    q_dim, kv_dim = config.num_attention_heads * head, config.num_key_value_heads * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, dim)}
    for i in range(config.num_exported_layers):
        block = f"model.layers.{i}"
        shapes |= {
            f"{block}.input_layernorm.weight": (dim,),
            f"{block}.self_attn.q_proj.weight": (q_dim, dim),
            f"{block}.self_attn.k_proj.weight": (kv_dim, dim),
            f"{block}.self_attn.v_proj.weight": (kv_dim, dim),
            f"{block}.self_attn.o_proj.weight": (dim, q_dim),
            f"{block}.self_attn.q_norm.weight": (head,),
            f"{block}.self_attn.k_norm.weight": (head,),
            f"{block}.post_attention_layernorm.weight": (dim,),
            f"{block}.mlp.gate_proj.weight": (mlp, dim),
            f"{block}.mlp.up_proj.weight": (mlp, dim),
            f"{block}.mlp.down_proj.weight": (dim, mlp),
        }
    if config.num_hidden_layers in config.layers:
        shapes["model.norm.weight"] = (dim,)
    return shapes


def encode_text(ops: Ops[T], config: TextEncoderConfig, input_ids: T, attention_mask: T) -> T:
    """Runs the decoder blocks and joins the tapped hidden states: [B, T, taps * hidden_size].

    `input_ids` and `attention_mask` (1 where a token is, 0 where padding is) are int64 [B, T].
    Hidden state 0 is the embedding; the last of the whole model comes after its final norm.
    """
    eps = config.rms_norm_eps
    hidden = ops.embedding(input_ids, "model.embed_tokens.weight")
    mask = ops.causal_mask(attention_mask)
    positions = ops.sequence_positions(input_ids)
    cos, sin = (
        ops.expand_batch(ops.rope_table(positions, [table]), input_ids)
        for table in text_rope_tables(config)
    )
    cos, sin = (ops.to_float32(ops.to_model_dtype(x)) for x in (cos, sin))
    states = {0: hidden}
    for i in range(config.num_exported_layers):
        block = f"model.layers.{i}"
        attn = f"{block}.self_attn"
        norm = ops.rms_norm(hidden, f"{block}.input_layernorm.weight", eps)
        q, k, v = (ops.linear(norm, f"{attn}.{x}_proj.weight") for x in "qkv")
        q = ops.heads(q, input_ids, config.num_attention_heads)
        k, v = (ops.heads(x, input_ids, config.num_key_value_heads) for x in (k, v))
        q = ops.norm_rope(q, f"{attn}.q_norm.weight", eps, cos, sin, False)
        k = ops.norm_rope(k, f"{attn}.k_norm.weight", eps, cos, sin, False)
        attended = ops.rows(ops.attention(q, k, v, mask))
        hidden = ops.add(hidden, ops.linear(attended, f"{attn}.o_proj.weight"))
        norm = ops.rms_norm(hidden, f"{block}.post_attention_layernorm.weight", eps)
        gate = ops.silu(ops.linear(norm, f"{block}.mlp.gate_proj.weight"))
        up = ops.linear(norm, f"{block}.mlp.up_proj.weight")
        hidden = ops.add(hidden, ops.linear(ops.mul(gate, up), f"{block}.mlp.down_proj.weight"))
        states[i + 1] = hidden
    last = config.num_hidden_layers
    if last in config.layers:
        states[last] = ops.rms_norm(states[last], "model.norm.weight", eps)
    return ops.sequence(ops.concat([states[layer] for layer in config.layers], 1), input_ids)


def text_rope_tables(config: TextEncoderConfig) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines [MAX_POSITION, head_dim / 2]; angles in float32, as in transformers."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    inverse = (1.0 / np.float64(config.rope_theta) ** exponents.astype(np.float64)).astype(
        np.float32
    )
    angles = np.outer(np.arange(MAX_POSITION, dtype=np.float32), inverse).astype(np.float64)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
