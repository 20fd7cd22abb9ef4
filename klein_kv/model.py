"""The FLUX.2 [klein] KV denoiser as two streams.

Source of the arithmetic: diffusers, `models/transformers/transformer_flux2.py`. There one sequence
[text, references, image] runs through every block, with modulations blended per token. But
reference tokens attend to reference tokens only, and are always modulated at timestep 0; so the
network falls apart into two functions, exactly:

    encode_references(ref_hidden_states, ref_ids)           -> k_ref[i], v_ref[i] of every block
    denoise(latents, text, timestep, ids, k_ref[], v_ref[]) -> noise_pred, next latents

Here a modulation is one vector, and nothing is computed on the reference stream after the last
block's keys and values. Keys are ordered [references, text, image]; attention does not care.

Plain klein weights know no such stream: their reference tokens take part in every step like the
image's own, which `denoise_with_references` writes.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from klein_kv.config import TransformerConfig
from klein_kv.ops import Ops
from klein_kv.signature import MAX_POSITION

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


@dataclass(frozen=True, slots=True)
class _Modulation(Generic[T]):
    """Vectors [D] of one adaptive layer norm; `scale` already holds 1 + scale."""

    shift: T
    scale: T
    gate: T


@dataclass(frozen=True, slots=True)
class _Rope(Generic[T]):
    """Rotation of one token sequence: cosines and sines [B, S, head_dim / 2], float32."""

    cos: T
    sin: T


def transformer_parameters(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors, as diffusers' `Flux2Transformer2DModel` saves them."""
    dim, mlp, head = config.inner_dim, config.mlp_hidden_dim, config.attention_head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.weight": (dim, config.in_channels),
        "context_embedder.weight": (dim, config.joint_attention_dim),
        f"{_TIME}.linear_1.weight": (dim, config.timestep_guidance_channels),
        f"{_TIME}.linear_2.weight": (dim, dim),
        "double_stream_modulation_img.linear.weight": (6 * dim, dim),
        "double_stream_modulation_txt.linear.weight": (6 * dim, dim),
        "single_stream_modulation.linear.weight": (3 * dim, dim),
        "norm_out.linear.weight": (2 * dim, dim),
        "proj_out.weight": (config.out_channels, dim),
    }
    for i in range(config.num_layers):
        block = f"transformer_blocks.{i}"
        for name in (*_IMAGE.qkv, *_TEXT.qkv, _IMAGE.out, _TEXT.out):
            shapes[f"{block}.attn.{name}.weight"] = (dim, dim)
        for name in (*_IMAGE.norms, *_TEXT.norms):
            shapes[f"{block}.attn.{name}.weight"] = (head,)
        for name in (_IMAGE.ff, _TEXT.ff):
            shapes[f"{block}.{name}.linear_in.weight"] = (2 * mlp, dim)
            shapes[f"{block}.{name}.linear_out.weight"] = (dim, mlp)
    for i in range(config.num_single_layers):
        block = f"single_transformer_blocks.{i}.attn"
        shapes[f"{block}.to_qkv_mlp_proj.weight"] = (3 * dim + 2 * mlp, dim)
        shapes[f"{block}.to_out.weight"] = (dim, dim + mlp)
        shapes[f"{block}.norm_q.weight"] = shapes[f"{block}.norm_k.weight"] = (head,)
    return shapes


_TIME = "time_guidance_embed.timestep_embedder"


@dataclass(frozen=True, slots=True)
class _StreamNames:
    """Parameter names of one stream of a double block, below `transformer_blocks.{i}`."""

    qkv: tuple[str, str, str]
    norms: tuple[str, str]
    out: str
    ff: str


_IMAGE = _StreamNames(("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0", "ff")
_TEXT = _StreamNames(
    ("add_q_proj", "add_k_proj", "add_v_proj"),
    ("norm_added_q", "norm_added_k"),
    "to_add_out",
    "ff_context",
)


def encode_references(
    ops: Ops[T], config: TransformerConfig, ref_hidden_states: T, ref_ids: T
) -> list[T]:
    """Runs the reference stream.

    Args:
        ops: what computes, or writes the graph.
        config: the network's shape.
        ref_hidden_states: VAE tokens of all references, [1, R, C].
        ref_ids: their positions (T, H, W, L), int64 [R, 4].

    Returns:
        k and v of every block in the order of `signature.kv_names`, each [1, R, H, D], keys after
        RoPE.
    """
    net = _Network(ops, config)
    zero = ops.constant(np.zeros(1, np.float32))
    temb = net.time_embedding(zero)
    double = net.modulation(temb, "double_stream_modulation_img", 2)
    (single,) = net.modulation(temb, "single_stream_modulation", 1)
    rope = net.rope(ref_ids, ref_hidden_states)
    seq = ref_hidden_states
    hidden = ops.linear(ops.rows(seq), "x_embedder.weight")
    kv: list[T] = []
    for i in range(config.num_blocks):
        last = i == config.num_blocks - 1
        if i < config.num_layers:
            block = f"transformer_blocks.{i}"
            hidden, k, v = ops.block(
                _reference_double_block, block, config, hidden, seq, double, rope, last
            )
        else:
            block = f"single_transformer_blocks.{i - config.num_layers}"
            hidden, k, v = ops.block(
                _reference_single_block, block, config, hidden, seq, single, rope, last
            )
        kv += [k, v]
    return kv


def denoise(
    ops: Ops[T], config: TransformerConfig, inputs: StepInputs[T], kv: Sequence[T]
) -> tuple[T, T]:
    """Runs one step: velocity prediction and Euler update.

    Args:
        ops: what computes, or writes the graph.
        config: the network's shape.
        inputs: latents, text, time and positions.
        kv: reference keys and values as `encode_references` returns them, batch 1, shared by every
            image of the batch; R may be 0, or nothing given at all.

    Returns:
        noise_pred [B, S, C] and the latents after the step [B, S, C].
    """
    net = _Network(ops, config)
    temb = net.time_embedding(inputs.timestep)
    image = _run_blocks(net, inputs, temb, inputs.hidden_states, inputs.img_ids, kv)
    return net.output(ops.rows(image), temb, inputs)


def denoise_with_references(
    ops: Ops[T],
    config: TransformerConfig,
    inputs: StepInputs[T],
    ref_hidden_states: T,
    ref_ids: T,
) -> tuple[T, T]:
    """Runs one step of plain klein weights: every token attends to every other.

    Source: diffusers `Flux2KleinPipeline.__call__`, which appends the reference tokens to the
    latents at every step and drops what is predicted for them.

    Args:
        ops: what computes, or writes the graph.
        config: the network's shape.
        inputs: latents, text, time and positions.
        ref_hidden_states: VAE tokens of all references, [1, R, C], shared by every image of the
            batch; R may be 0.
        ref_ids: their positions (T, H, W, L), int64 [R, 4].

    Returns:
        noise_pred [B, S, C] and the latents after the step [B, S, C].
    """
    net = _Network(ops, config)
    temb = net.time_embedding(inputs.timestep)
    latents = inputs.hidden_states
    tokens = ops.concat([latents, ops.expand_batch(ref_hidden_states, latents)], 1)
    ids = ops.concat([inputs.img_ids, ref_ids], 0)
    image, _ = ops.split_tokens(_run_blocks(net, inputs, temb, tokens, ids, ()), latents)
    return net.output(ops.rows(image), temb, inputs)


def _run_blocks(
    net: "_Network[T]",
    inputs: StepInputs[T],
    temb: T,
    img_seq: T,
    img_ids: T,
    kv: Sequence[T],
) -> T:
    """All blocks on text and image tokens [B, S, C]; the image tokens [B, S, D] after them.

    Args:
        net: the network.
        inputs: the step's text and its positions.
        temb: the timestep's embedding.
        img_seq: tokens of the image.
        img_ids: their positions.
        kv: reference keys and values of every block, or none.
    """
    ops, config = net.ops, net.config
    image_mods = net.modulation(temb, "double_stream_modulation_img", 2)
    text_mods = net.modulation(temb, "double_stream_modulation_txt", 2)
    (single,) = net.modulation(temb, "single_stream_modulation", 1)
    txt_seq = inputs.encoder_hidden_states
    img_rope, txt_rope = net.rope(img_ids, img_seq), net.rope(inputs.txt_ids, txt_seq)
    image = ops.linear(ops.rows(img_seq), "x_embedder.weight")
    text = ops.linear(ops.rows(txt_seq), "context_embedder.weight")
    mods, like, ropes = (image_mods, text_mods), (img_seq, txt_seq), (img_rope, txt_rope)
    for i in range(config.num_layers):
        image, text = ops.block(
            _double_block,
            f"transformer_blocks.{i}",
            config,
            (image, text),
            like,
            mods,
            ropes,
            tuple(kv[2 * i : 2 * i + 2]),
        )
    joint_seq = ops.concat([ops.sequence(text, txt_seq), ops.sequence(image, img_seq)], 1)
    joint = ops.rows(joint_seq)
    rope = _Rope(
        ops.concat([txt_rope.cos, img_rope.cos], 1), ops.concat([txt_rope.sin, img_rope.sin], 1)
    )
    for i in range(config.num_single_layers):
        at = 2 * (config.num_layers + i)
        joint = ops.block(
            _single_block,
            f"single_transformer_blocks.{i}",
            config,
            joint,
            joint_seq,
            single,
            rope,
            tuple(kv[at : at + 2]),
        )
    _, image_seq = ops.split_tokens(ops.sequence(joint, joint_seq), txt_seq)
    return image_seq


# The blocks: functions of tensors alone, told apart by the name that their weights begin with, so
# that `Ops.block` may compile each once for all blocks of its kind.


def _reference_double_block(
    ops: Ops[T],
    block: str,
    config: TransformerConfig,
    hidden: T,
    seq: T,
    mods: Sequence[_Modulation[T]],
    rope: _Rope[T],
    last: bool,
) -> tuple[T, T, T]:
    """A double block on the reference stream: rows after it, k and v.

    Of the last block k and v are all that is ever read.
    """
    net = _Network(ops, config)
    norm = net.modulate(hidden, mods[0])
    q, k, v = net.double_qkv(norm, block, _IMAGE, seq, rope, with_q=not last)
    if not last:
        attended = ops.rows(ops.attention(q, k, v))
        hidden = net.double_out(hidden, attended, block, _IMAGE, mods)
    return hidden, ops.compact(k), ops.compact(v)


def _reference_single_block(
    ops: Ops[T],
    block: str,
    config: TransformerConfig,
    hidden: T,
    seq: T,
    mod: _Modulation[T],
    rope: _Rope[T],
    last: bool,
) -> tuple[T, T, T]:
    """A single block on the reference stream, alike."""
    net = _Network(ops, config)
    norm = net.modulate(hidden, mod)
    dim = config.inner_dim
    project = net.single_projection(norm, block, (dim, 3 * dim) if last else None)
    q, k, v = net.single_qkv(project, block, seq, rope, with_q=not last)
    if not last:
        attended = ops.rows(ops.attention(q, k, v))
        hidden = net.single_out(hidden, project, attended, block, mod)
    return hidden, ops.compact(k), ops.compact(v)


def _double_block(
    ops: Ops[T],
    block: str,
    config: TransformerConfig,
    rows: tuple[T, T],
    like: tuple[T, T],
    mods: tuple[Sequence[_Modulation[T]], Sequence[_Modulation[T]]],
    ropes: tuple[_Rope[T], _Rope[T]],
    kv: tuple[T, ...],
) -> tuple[T, T]:
    """A double block: rows of image and text after it.

    Args:
        ops: what computes, or writes the graph.
        block: beginning of the names of the block's weights.
        config: the network's shape.
        rows: image and text before it.
        like: tensors [B, S, ...] whose batch and length they have.
        mods: modulations of both.
        ropes: rotations of both.
        kv: the references' keys and values of this block, or nothing.
    """
    net = _Network(ops, config)
    image, text = rows
    img_seq, txt_seq = like
    image_mods, text_mods = mods
    image_norm, text_norm = net.modulate(image, image_mods[0]), net.modulate(text, text_mods[0])
    q_img, k_img, v_img = net.double_qkv(image_norm, block, _IMAGE, img_seq, ropes[0])
    q_txt, k_txt, v_txt = net.double_qkv(text_norm, block, _TEXT, txt_seq, ropes[1])
    ref = [ops.expand_batch(x, img_seq) for x in kv]
    attended = ops.attention(
        ops.concat([q_txt, q_img], 1),
        ops.concat([*ref[:1], k_txt, k_img], 1),
        ops.concat([*ref[1:], v_txt, v_img], 1),
    )
    text_out, image_out = ops.split_tokens(attended, txt_seq)
    image = net.double_out(image, ops.rows(image_out), block, _IMAGE, image_mods)
    text = net.double_out(text, ops.rows(text_out), block, _TEXT, text_mods)
    return image, ops.saturate(text)


def _single_block(
    ops: Ops[T],
    block: str,
    config: TransformerConfig,
    joint: T,
    like: T,
    mod: _Modulation[T],
    rope: _Rope[T],
    kv: tuple[T, ...],
) -> T:
    """A single block: rows of text and image after it; arguments as of `_double_block`."""
    net = _Network(ops, config)
    norm = net.modulate(joint, mod)
    project = net.single_projection(norm, block)
    q, k, v = net.single_qkv(project, block, like, rope)
    if kv:
        k_ref, v_ref = (ops.expand_batch(x, like) for x in kv)
        k, v = ops.concat([k_ref, k], 1), ops.concat([v_ref, v], 1)
    attended = ops.rows(ops.attention(q, k, v))
    return net.single_out(joint, project, attended, block, mod)


class _Network(Generic[T]):
    """The pieces that both functions share."""

    def __init__(self, ops: Ops[T], config: TransformerConfig) -> None:
        self.ops = ops
        self.config = config

    def time_embedding(self, timestep: T) -> T:
        """Sinusoids of the timestep (0 to 1000) through two linear layers: [1, D]."""
        ops = self.ops
        x = ops.timestep_embedding(
            timestep, timestep_frequencies(self.config.timestep_guidance_channels)
        )
        x = ops.silu(ops.linear(x, f"{_TIME}.linear_1.weight"))
        # Every modulation begins with this SiLU; taken once here.
        return ops.silu(ops.linear(x, f"{_TIME}.linear_2.weight"))

    def modulation(self, temb: T, name: str, sets: int) -> list[_Modulation[T]]:
        """Shift, scale and gate vectors of one kind of block, `sets` norms each."""
        ops = self.ops
        parts = ops.split_features(ops.linear(temb, f"{name}.linear.weight"), 3 * sets)
        return [
            _Modulation(parts[3 * i], self._one_plus(parts[3 * i + 1]), parts[3 * i + 2])
            for i in range(sets)
        ]

    def _one_plus(self, x: T) -> T:
        ops = self.ops
        return ops.add(x, ops.to_model_dtype(ops.constant(np.ones(1, np.float32))))

    def modulate(self, rows: T, mod: _Modulation[T]) -> T:
        """Layer norm without affine parameters, then (1 + scale) * x + shift."""
        return self.ops.layer_norm(rows, mod.scale, mod.shift, self.config.eps)

    def rope(self, ids: T, like: T) -> _Rope[T]:
        """Cosines and sines at these positions, for every image of the batch of `like`."""
        ops = self.ops
        cos, sin = (ops.rope_table(ids, table) for table in rope_tables(self.config))
        return _Rope(ops.expand_batch(cos, like), ops.expand_batch(sin, like))

    def _head_norm_rope(self, rows: T, weight: str, like: T, rope: _Rope[T]) -> T:
        ops = self.ops
        x = ops.heads(rows, like, self.config.num_attention_heads)
        return ops.norm_rope(x, f"{weight}.weight", self.config.eps, rope.cos, rope.sin, True)

    def double_qkv(
        self,
        norm: T,
        block: str,
        names: _StreamNames,
        like: T,
        rope: _Rope[T],
        with_q: bool = True,
    ) -> tuple[T, T, T]:
        """q, k (after RoPE) and v of one stream of a double block, each [B, S, H, D]."""
        ops = self.ops
        k = ops.linear(norm, f"{block}.attn.{names.qkv[1]}.weight")
        v = ops.linear(norm, f"{block}.attn.{names.qkv[2]}.weight")
        k = self._head_norm_rope(k, f"{block}.attn.{names.norms[1]}", like, rope)
        v = ops.heads(v, like, self.config.num_attention_heads)
        if not with_q:
            return k, k, v
        q = ops.linear(norm, f"{block}.attn.{names.qkv[0]}.weight")
        return self._head_norm_rope(q, f"{block}.attn.{names.norms[0]}", like, rope), k, v

    def double_out(
        self,
        rows: T,
        attended: T,
        block: str,
        names: _StreamNames,
        mods: Sequence[_Modulation[T]],
    ) -> T:
        """Attention output projection and SwiGLU feed-forward of one stream, both gated."""
        ops, mlp = self.ops, self.config.mlp_hidden_dim
        out = ops.linear(attended, f"{block}.attn.{names.out}.weight")
        rows = ops.add(rows, ops.mul(out, mods[0].gate))
        norm = self.modulate(rows, mods[1])
        weight = f"{block}.{names.ff}.linear_in.weight"
        project = ops.projection(norm, weight, (0, 2 * mlp))
        hidden = ops.mul(ops.silu(project(0, mlp)), project(mlp, 2 * mlp))
        out = ops.linear(hidden, f"{block}.{names.ff}.linear_out.weight")
        return ops.add(rows, ops.mul(out, mods[1].gate))

    def single_projection(
        self, norm: T, block: str, rows: tuple[int, int] | None = None
    ) -> Callable[[int, int], T]:
        """A single block's one projection: q, k, v, then gate and up of the SwiGLU.

        Args:
            norm: its input.
            block: beginning of the weight's name.
            rows: the range of output features that will be asked for; None is all.
        """
        whole = 3 * self.config.inner_dim + 2 * self.config.mlp_hidden_dim
        weight = f"{block}.attn.to_qkv_mlp_proj.weight"
        return self.ops.projection(norm, weight, rows or (0, whole))

    def single_qkv(
        self,
        project: Callable[[int, int], T],
        block: str,
        like: T,
        rope: _Rope[T],
        with_q: bool = True,
    ) -> tuple[T, T, T]:
        """q, k (after RoPE) and v of a single block: the first three parts of its projection."""
        ops, dim = self.ops, self.config.inner_dim
        k = self._head_norm_rope(project(dim, 2 * dim), f"{block}.attn.norm_k", like, rope)
        v = ops.heads(project(2 * dim, 3 * dim), like, self.config.num_attention_heads)
        if not with_q:
            return k, k, v
        return self._head_norm_rope(project(0, dim), f"{block}.attn.norm_q", like, rope), k, v

    def single_out(
        self,
        rows: T,
        project: Callable[[int, int], T],
        attended: T,
        block: str,
        mod: _Modulation[T],
    ) -> T:
        """SwiGLU beside the attention, one output projection over both, gated."""
        ops, dim, mlp = self.ops, self.config.inner_dim, self.config.mlp_hidden_dim
        gate = project(3 * dim, 3 * dim + mlp)
        up = project(3 * dim + mlp, 3 * dim + 2 * mlp)
        hidden = ops.concat([attended, ops.mul(ops.silu(gate), up)], 1)
        out = ops.linear(hidden, f"{block}.attn.to_out.weight")
        return ops.saturate(ops.add(rows, ops.mul(out, mod.gate)))

    def output(self, rows: T, temb: T, inputs: StepInputs[T]) -> tuple[T, T]:
        """Final norm and projection, then the Euler step in float32.

        Source: diffusers `AdaLayerNormContinuous` (scale before shift) and
        `FlowMatchEulerDiscreteScheduler.step`, whose product of step and prediction is rounded to
        the model's dtype.
        """
        ops = self.ops
        scale, shift = ops.split_features(ops.linear(temb, "norm_out.linear.weight"), 2)
        rows = ops.layer_norm(rows, self._one_plus(scale), shift, self.config.eps)
        noise_pred = ops.sequence(ops.linear(rows, "proj_out.weight"), inputs.hidden_states)
        step = ops.to_model_dtype(ops.mul(ops.to_float32(noise_pred), inputs.sigma_step))
        latents = ops.add(ops.to_float32(inputs.hidden_states), ops.to_float32(step))
        return noise_pred, ops.to_model_dtype(latents)


def timestep_frequencies(channels: int) -> NDArray[np.float32]:
    """Frequencies of the sinusoidal timestep embedding (diffusers: `get_timestep_embedding`).

    torch takes the exponential, as in diffusers: its last bit differs from numpy's now and then,
    and times a timestep of 1000 that bit is worth 6e-5.
    """
    import torch

    half = channels // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32) / half
    frequencies: NDArray[np.float32] = torch.exp(exponent).numpy()
    return frequencies


@functools.cache
def rope_tables(config: TransformerConfig) -> tuple[tuple[NDArray[np.float32], ...], ...]:
    """Cosines and sines of every position, one table [MAX_POSITION, axis / 2] per axis.

    Angles are taken in float64 and rounded once (diffusers: `Flux2PosEmbed`), which a graph in
    float32 could not do at run time.
    """
    positions = np.arange(MAX_POSITION, dtype=np.float64)
    cos, sin = [], []
    for axis in config.axes_dims_rope:
        frequencies = 1.0 / config.rope_theta ** (np.arange(0, axis, 2, dtype=np.float64) / axis)
        angles = np.outer(positions, frequencies)
        cos.append(np.cos(angles).astype(np.float32))
        sin.append(np.sin(angles).astype(np.float32))
    for table in (*cos, *sin):
        table.flags.writeable = False
    return tuple(cos), tuple(sin)
