"""The denoiser's blocks, and the pieces that they share.

A block is a function of tensors alone, told apart from the others of its kind by the name that its
weights begin with, so that `Ops.block` may compile it once for all of them. Source of the
arithmetic: diffusers, `models/transformers/transformer_flux2.py`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from klein_kv.artifacts.config import TransformerConfig
from klein_kv.artifacts.signature import MAX_POSITION
from klein_kv.networks.ops import Ops

__all__ = [
    "IMAGE",
    "TEXT",
    "TIME",
    "Modulation",
    "Network",
    "Rope",
    "double_block",
    "last_single_block",
    "reference_double_block",
    "reference_single_block",
    "rope_tables",
    "single_block",
    "timestep_frequencies",
]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Modulation(Generic[T]):
    """Vectors [D] of one adaptive layer norm; `scale` already holds 1 + scale."""

    shift: T
    scale: T
    gate: T


@dataclass(frozen=True, slots=True)
class Rope(Generic[T]):
    """Rotation of one token sequence: cosines and sines [B, S, head_dim / 2], float32."""

    cos: T
    sin: T


TIME = "time_guidance_embed.timestep_embedder"


@dataclass(frozen=True, slots=True)
class StreamNames:
    """Parameter names of one stream of a double block, below `transformer_blocks.{i}`."""

    qkv: tuple[str, str, str]
    norms: tuple[str, str]
    out: str
    ff: str


IMAGE = StreamNames(("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0", "ff")
TEXT = StreamNames(
    ("add_q_proj", "add_k_proj", "add_v_proj"),
    ("norm_added_q", "norm_added_k"),
    "to_add_out",
    "ff_context",
)


def reference_double_block(
    ops: Ops[T],
    block: str,
    config: TransformerConfig,
    hidden: T,
    seq: T,
    mods: Sequence[Modulation[T]],
    rope: Rope[T],
    last: bool,
) -> tuple[T, T, T]:
    """A double block on the reference stream: rows after it, k and v.

    Of the last block k and v are all that is ever read.
    """
    net = Network(ops, config)
    norm = net.modulate(hidden, mods[0])
    q, k, v = net.double_qkv(norm, block, IMAGE, seq, rope, with_q=not last)
    if not last:
        attended = ops.rows(ops.attention(q, k, v))
        hidden = net.double_out(hidden, attended, block, IMAGE, mods)
    return hidden, ops.compact(k), ops.compact(v)


def reference_single_block(
    ops: Ops[T],
    block: str,
    config: TransformerConfig,
    hidden: T,
    seq: T,
    mod: Modulation[T],
    rope: Rope[T],
    last: bool,
) -> tuple[T, T, T]:
    """The same for a single block."""
    net = Network(ops, config)
    norm = net.modulate(hidden, mod)
    dim = config.inner_dim
    project = net.single_projection(norm, block, (dim, 3 * dim) if last else None)
    k, v = net.single_kv(project, block, seq, rope)
    if not last:
        q = net.single_q(project, block, seq, rope)
        attended = ops.rows(ops.attention(q, k, v))
        hidden = net.single_out(hidden, project, attended, block, mod)
    return hidden, ops.compact(k), ops.compact(v)


def double_block(
    ops: Ops[T],
    block: str,
    config: TransformerConfig,
    rows: tuple[T, T],
    like: tuple[T, T],
    mods: tuple[Sequence[Modulation[T]], Sequence[Modulation[T]]],
    ropes: tuple[Rope[T], Rope[T]],
    kv: tuple[T, ...],
) -> tuple[T, T]:
    """A double block: rows of image and text after it.

    `rows`, `like` (tensors [B, S, ...] of their batch and length), `mods` and `ropes` are of image
    and text; `kv` is the references' keys and values of this block, or nothing.
    """
    net = Network(ops, config)
    image, text = rows
    img_seq, txt_seq = like
    image_mods, text_mods = mods
    image_norm, text_norm = net.modulate(image, image_mods[0]), net.modulate(text, text_mods[0])
    q_img, k_img, v_img = net.double_qkv(image_norm, block, IMAGE, img_seq, ropes[0])
    q_txt, k_txt, v_txt = net.double_qkv(text_norm, block, TEXT, txt_seq, ropes[1])
    q = ops.concat([q_txt, q_img], 1)
    attended = ops.joint_attention(q, [k_txt, k_img], [v_txt, v_img], kv, img_seq)
    text_out, image_out = ops.split_tokens(attended, txt_seq)
    image = net.double_out(image, ops.rows(image_out), block, IMAGE, image_mods)
    text = net.double_out(text, ops.rows(text_out), block, TEXT, text_mods)
    return image, ops.saturate(text)


def single_block(
    ops: Ops[T],
    block: str,
    config: TransformerConfig,
    joint: T,
    like: T,
    mod: Modulation[T],
    rope: Rope[T],
    kv: tuple[T, ...],
) -> T:
    """A single block: rows of text and image after it; arguments as of `double_block`."""
    net = Network(ops, config)
    norm = net.modulate(joint, mod)
    project = net.single_projection(norm, block)
    k, v = net.single_kv(project, block, like, rope)
    q = net.single_q(project, block, like, rope)
    attended = ops.rows(ops.joint_attention(q, [k], [v], kv, like))
    return net.single_out(joint, project, attended, block, mod)


def last_single_block(
    ops: Ops[T],
    block: str,
    config: TransformerConfig,
    joint: T,
    like: T,
    mod: Modulation[T],
    ropes: tuple[Rope[T], Rope[T]],
    kv: tuple[T, ...],
    text: T,
    image: T | None,
) -> T:
    """The block after which only the image is read: rows of the image after it.

    Of all other tokens keys and values are computed alone. `joint` holds rows of text [B, T, F],
    image and, with plain weights, references; then `image` is a tensor [B, S, F]. `ropes` are of
    the text, and of what comes after it.
    """
    net, dim, mlp = Network(ops, config), config.inner_dim, config.mlp_hidden_dim

    def project(rows: T, features: tuple[int, int]) -> Callable[[int, int], T]:
        return net.single_projection(rows, block, features)

    seqs = ops.split_tokens(ops.sequence(joint, like), text)
    rows = [ops.rows(seq) for seq in seqs]
    norms = [net.modulate(part, mod) for part in rows]
    pairs = [
        net.single_kv(project(norm, (dim, 3 * dim)), block, seq, rope)
        for norm, seq, rope in zip(norms, seqs, ropes, strict=True)
    ]
    (_, image_seq), (_, image_rows), (_, norm), (_, rope) = seqs, rows, norms, ropes
    if image is not None:
        norm = ops.rows(ops.split_tokens(ops.sequence(norm, image_seq), image)[0])
        rope = Rope(*(ops.split_tokens(x, image)[0] for x in (rope.cos, rope.sin)))
        image_seq, _ = ops.split_tokens(image_seq, image)
        image_rows = ops.rows(image_seq)
    q = net.single_q(project(norm, (0, dim)), block, image_seq, rope)
    attended = ops.joint_attention(q, [k for k, _ in pairs], [v for _, v in pairs], kv, like)
    feed_forward = project(norm, (3 * dim, 3 * dim + 2 * mlp))
    return net.single_out(image_rows, feed_forward, ops.rows(attended), block, mod)


class Network(Generic[T]):
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
        x = ops.silu(ops.linear(x, f"{TIME}.linear_1.weight"))
        # Every modulation begins with this SiLU; taken once here.
        return ops.silu(ops.linear(x, f"{TIME}.linear_2.weight"))

    def modulation(self, temb: T, name: str, sets: int) -> list[Modulation[T]]:
        """Shift, scale and gate vectors of one kind of block, `sets` norms each."""
        ops = self.ops
        parts = ops.split_features(ops.linear(temb, f"{name}.linear.weight"), 3 * sets)
        return [
            Modulation(parts[3 * i], self._one_plus(parts[3 * i + 1]), parts[3 * i + 2])
            for i in range(sets)
        ]

    def _one_plus(self, x: T) -> T:
        ops = self.ops
        return ops.add(x, ops.to_model_dtype(ops.constant(np.ones(1, np.float32))))

    def modulate(self, rows: T, mod: Modulation[T]) -> T:
        """Layer norm without affine parameters, then (1 + scale) * x + shift."""
        return self.ops.layer_norm(rows, mod.scale, mod.shift, self.config.eps)

    def rope(self, ids: T, like: T) -> Rope[T]:
        """Cosines and sines at these positions, for every image of the batch of `like`."""
        ops = self.ops
        cos, sin = (ops.rope_table(ids, table) for table in rope_tables(self.config))
        return Rope(ops.expand_batch(cos, like), ops.expand_batch(sin, like))

    def _head_norm_rope(self, rows: T, weight: str, like: T, rope: Rope[T]) -> T:
        ops = self.ops
        x = ops.heads(rows, like, self.config.num_attention_heads)
        return ops.norm_rope(x, f"{weight}.weight", self.config.eps, rope.cos, rope.sin, True)

    def double_qkv(
        self, norm: T, block: str, names: StreamNames, like: T, rope: Rope[T], with_q: bool = True
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
        self, rows: T, attended: T, block: str, names: StreamNames, mods: Sequence[Modulation[T]]
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

        `rows` is the range of output features that will be asked for; None is all.
        """
        whole = 3 * self.config.inner_dim + 2 * self.config.mlp_hidden_dim
        weight = f"{block}.attn.to_qkv_mlp_proj.weight"
        return self.ops.projection(norm, weight, rows or (0, whole))

    def single_kv(
        self, project: Callable[[int, int], T], block: str, like: T, rope: Rope[T]
    ) -> tuple[T, T]:
        """k (after RoPE) and v of a single block: the second and third part of its projection."""
        ops, dim = self.ops, self.config.inner_dim
        k = self._head_norm_rope(project(dim, 2 * dim), f"{block}.attn.norm_k", like, rope)
        return k, ops.heads(project(2 * dim, 3 * dim), like, self.config.num_attention_heads)

    def single_q(self, project: Callable[[int, int], T], block: str, like: T, rope: Rope[T]) -> T:
        """q of a single block, after RoPE: the first part of its projection."""
        query = project(0, self.config.inner_dim)
        return self._head_norm_rope(query, f"{block}.attn.norm_q", like, rope)

    def single_out(
        self, rows: T, project: Callable[[int, int], T], attended: T, block: str, mod: Modulation[T]
    ) -> T:
        """SwiGLU beside the attention, one output projection over both, gated."""
        ops, dim, mlp = self.ops, self.config.inner_dim, self.config.mlp_hidden_dim
        gate = project(3 * dim, 3 * dim + mlp)
        up = project(3 * dim + mlp, 3 * dim + 2 * mlp)
        hidden = ops.concat([attended, ops.mul(ops.silu(gate), up)], 1)
        out = ops.linear(hidden, f"{block}.attn.to_out.weight")
        return ops.saturate(ops.add(rows, ops.mul(out, mod.gate)))

    def output(self, rows: T, temb: T, hidden_states: T, sigma_step: T) -> tuple[T, T]:
        """noise_pred and latents after the step: final norm and projection, Euler in float32.

        Source: diffusers `AdaLayerNormContinuous` (scale before shift) and
        `FlowMatchEulerDiscreteScheduler.step`, whose product of step and prediction is rounded to
        the model's dtype.
        """
        ops = self.ops
        scale, shift = ops.split_features(ops.linear(temb, "norm_out.linear.weight"), 2)
        rows = ops.layer_norm(rows, self._one_plus(scale), shift, self.config.eps)
        noise_pred = ops.sequence(ops.linear(rows, "proj_out.weight"), hidden_states)
        step = ops.to_model_dtype(ops.mul(ops.to_float32(noise_pred), sigma_step))
        latents = ops.add(ops.to_float32(hidden_states), ops.to_float32(step))
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
