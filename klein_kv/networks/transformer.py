"""The FLUX.2 [klein] KV denoiser as two streams.

Source of the arithmetic: diffusers, `models/transformers/transformer_flux2.py`. There one sequence
[text, references, image] runs through every block, with modulations blended per token. But
reference tokens attend to reference tokens only, and are always modulated at timestep 0; so the
network falls apart into two functions, exactly:

    encode_references(ref_hidden_states, ref_ids)           -> k_ref[i], v_ref[i] of every block
    denoise(latents, text, timestep, ids, k_ref[], v_ref[]) -> noise_pred, next latents

Here a modulation is one vector, nothing is computed on the reference stream after the last block's
keys and values, and of text tokens the last block computes those alone. Keys are ordered
[references, text, image]; attention does not care.

Plain klein weights know no such stream: their reference tokens take part in every step like the
image's own, which `denoise_with_references` writes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from klein_kv.artifacts.attention_scales import block_names
from klein_kv.artifacts.config import TransformerConfig
from klein_kv.networks.blocks import (
    IMAGE,
    TEXT,
    TIME,
    Network,
    Rope,
    double_block,
    last_single_block,
    reference_double_block,
    reference_single_block,
    single_block,
)
from klein_kv.networks.ops import Ops

__all__ = [
    "StepInputs",
    "denoise",
    "denoise_with_references",
    "encode_references",
    "transformer_parameters",
]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StepInputs(Generic[T]):
    """Inputs of one denoising step; shapes are those of `signature.make_signature`."""

    hidden_states: T
    encoder_hidden_states: T
    timestep: T
    sigma_step: T
    img_ids: T
    txt_ids: T


def transformer_parameters(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors, as diffusers' `Flux2Transformer2DModel` saves them."""
    dim, mlp, head = config.inner_dim, config.mlp_hidden_dim, config.attention_head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.weight": (dim, config.in_channels),
        "context_embedder.weight": (dim, config.joint_attention_dim),
        f"{TIME}.linear_1.weight": (dim, config.timestep_guidance_channels),
        f"{TIME}.linear_2.weight": (dim, dim),
        "double_stream_modulation_img.linear.weight": (6 * dim, dim),
        "double_stream_modulation_txt.linear.weight": (6 * dim, dim),
        "single_stream_modulation.linear.weight": (3 * dim, dim),
        "norm_out.linear.weight": (2 * dim, dim),
        "proj_out.weight": (config.out_channels, dim),
    }
    for i in range(config.num_layers):
        block = f"transformer_blocks.{i}"
        for name in (*IMAGE.qkv, *TEXT.qkv, IMAGE.out, TEXT.out):
            shapes[f"{block}.attn.{name}.weight"] = (dim, dim)
        for name in (*IMAGE.norms, *TEXT.norms):
            shapes[f"{block}.attn.{name}.weight"] = (head,)
        for name in (IMAGE.ff, TEXT.ff):
            shapes[f"{block}.{name}.linear_in.weight"] = (2 * mlp, dim)
            shapes[f"{block}.{name}.linear_out.weight"] = (dim, mlp)
    for i in range(config.num_single_layers):
        block = f"single_transformer_blocks.{i}.attn"
        shapes[f"{block}.to_qkv_mlp_proj.weight"] = (3 * dim + 2 * mlp, dim)
        shapes[f"{block}.to_out.weight"] = (dim, dim + mlp)
        shapes[f"{block}.norm_q.weight"] = shapes[f"{block}.norm_k.weight"] = (head,)
    return shapes


def encode_references(
    ops: Ops[T], config: TransformerConfig, ref_hidden_states: T, ref_ids: T
) -> list[T]:
    """Runs the reference stream on VAE tokens [1, R, C] at positions (T, H, W, L), int64 [R, 4].

    Gives k (after RoPE) and v of every block in the order of `signature.kv_names`: [1, R, H, D].
    """
    net = Network(ops, config)
    zero = ops.constant(np.zeros(1, np.float32))
    temb = net.time_embedding(zero)
    double = net.modulation(temb, "double_stream_modulation_img", 2)
    (single,) = net.modulation(temb, "single_stream_modulation", 1)
    rope = net.rope(ref_ids, ref_hidden_states)
    seq = ref_hidden_states
    hidden = ops.linear(ops.rows(seq), "x_embedder.weight")
    kv: list[T] = []
    for i, block in enumerate(block_names(config)):
        last = i == config.num_blocks - 1
        if i < config.num_layers:
            hidden, k, v = ops.block(
                reference_double_block, block, config, hidden, seq, double, rope, last
            )
        else:
            hidden, k, v = ops.block(
                reference_single_block, block, config, hidden, seq, single, rope, last
            )
        kv += [k, v]
    return kv


def denoise(
    ops: Ops[T], config: TransformerConfig, inputs: StepInputs[T], kv: Sequence[T]
) -> tuple[T, T]:
    """Runs one step: velocity prediction and Euler update, noise_pred and latents [B, S, C].

    `kv` is what `encode_references` gave, of batch 1 and shared by every image of the batch; R may
    be 0, or nothing given at all.
    """
    net = Network(ops, config)
    temb = net.time_embedding(inputs.timestep)
    image = _run_blocks(net, inputs, temb, inputs.hidden_states, inputs.img_ids, kv, None)
    return net.output(image, temb, inputs.hidden_states, inputs.sigma_step)


def denoise_with_references(
    ops: Ops[T], config: TransformerConfig, inputs: StepInputs[T], ref_hidden_states: T, ref_ids: T
) -> tuple[T, T]:
    """Runs one step of plain klein weights: every token attends to every other.

    Reference tokens [1, R, C], R may be 0, are shared by every image of the batch. Source:
    diffusers `Flux2KleinPipeline.__call__`, which appends them to the latents at every step.
    """
    net = Network(ops, config)
    temb = net.time_embedding(inputs.timestep)
    latents = inputs.hidden_states
    tokens = ops.concat([latents, ops.expand_batch(ref_hidden_states, latents)], 1)
    ids = ops.concat([inputs.img_ids, ref_ids], 0)
    image = _run_blocks(net, inputs, temb, tokens, ids, (), latents)
    return net.output(image, temb, inputs.hidden_states, inputs.sigma_step)


def _run_blocks(
    net: "Network[T]",
    inputs: StepInputs[T],
    temb: T,
    img_seq: T,
    img_ids: T,
    kv: Sequence[T],
    image: T | None,
) -> T:
    """All blocks on text and image tokens; rows of the image [B * S, D] after them.

    `img_seq` [B, S, C] holds references too with plain weights; `image` is then the image alone.
    """
    ops, config = net.ops, net.config
    image_mods = net.modulation(temb, "double_stream_modulation_img", 2)
    text_mods = net.modulation(temb, "double_stream_modulation_txt", 2)
    (single,) = net.modulation(temb, "single_stream_modulation", 1)
    txt_seq = inputs.encoder_hidden_states
    img_rope, txt_rope = net.rope(img_ids, img_seq), net.rope(inputs.txt_ids, txt_seq)
    img_rows = ops.linear(ops.rows(img_seq), "x_embedder.weight")
    txt_rows = ops.linear(ops.rows(txt_seq), "context_embedder.weight")
    mods, like, ropes = (image_mods, text_mods), (img_seq, txt_seq), (img_rope, txt_rope)
    names = block_names(config)
    cached = [tuple(kv[2 * i : 2 * i + 2]) for i in range(len(names))]
    rows = img_rows, txt_rows
    for i in range(config.num_layers):
        rows = ops.block(double_block, names[i], config, rows, like, mods, ropes, cached[i])
    img_rows, txt_rows = rows
    joint_seq = ops.concat([ops.sequence(txt_rows, txt_seq), ops.sequence(img_rows, img_seq)], 1)
    joint = ops.rows(joint_seq)
    rope = Rope(
        ops.concat([txt_rope.cos, img_rope.cos], 1), ops.concat([txt_rope.sin, img_rope.sin], 1)
    )
    for i in range(config.num_layers, len(names) - 1):
        joint = ops.block(single_block, names[i], config, joint, joint_seq, single, rope, cached[i])
    return ops.block(
        last_single_block,
        names[-1],
        config,
        joint,
        joint_seq,
        single,
        (txt_rope, img_rope),
        cached[-1],
        txt_seq,
        image,
    )
