"""The handful of operations that klein's networks are written in.

`transformer.py`, `text_encoder.py` and `vae.py` describe the networks once, over these protocols.
`torch_ops.TorchOps` computes them, `klein_kv.export.graphs` (OnnxOps, ImageOnnxOps, MergeOnnxOps)
writes ONNX nodes: what is exported and what is tested against diffusers cannot drift apart.

In transformers activations are *rows* wherever attention does not need more: a matrix [batch *
tokens, features], which one product multiplies with a weight in its own [out, in] layout.
"""

from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["ImageOps", "MergeOps", "Ops"]

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")


class Ops(Protocol[T]):
    """Operations on tensors of type `T`; weights are named as in the checkpoint."""

    def block(
        self,
        function: "Callable[Concatenate[Ops[T], str, P], R]",
        name: str,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """`function(self, name, ...)`: one block, whose weights' names begin with `name`."""

    def constant(self, value: NDArray[Any]) -> T:
        """A tensor known at export; equal values are stored once."""

    def linear(self, rows: T, weight: str, part: tuple[int, int] | None = None) -> T:
        """`rows @ weight.T`, [N, in] and [out, in]; of a `part`, that range of output features."""

    def projection(
        self, rows: T, weight: str, features: tuple[int, int]
    ) -> Callable[[int, int], T]:
        """Parts of one linear layer, by their range of output features; `features` is all of them.

        Computed at once, but written to graphs one by one.
        """

    def embedding(self, ids: T, weight: str) -> T:
        """Rows of a weight: ids [B, T] -> [B * T, features]."""

    def layer_norm(self, rows: T, weight: T, bias: T, eps: float) -> T:
        """Layer normalisation over features, times `weight` [D], plus `bias` [D]."""

    def rms_norm(self, x: T, weight: str, eps: float) -> T:
        """RMS normalisation over the last axis in float32, times a checkpoint weight."""

    def timestep_embedding(self, timestep: T, frequencies: NDArray[np.float32]) -> T:
        """[cos, sin] of `timestep * frequencies` in float32, then the model's dtype: [1, 2 * F]."""

    def rope_table(self, ids: T, tables: Sequence[NDArray[np.float32]]) -> T:
        """Rows of one position table per axis, side by side: ids [S, axes] -> [1, S, features]."""

    def sequence_positions(self, like: T) -> T:
        """0, 1, 2, ... for the tokens of `like` [B, T]: int64 [T, 1]."""

    def norm_rope(self, x: T, weight: str, eps: float, cos: T, sin: T, interleaved: bool) -> T:
        """RMS norm of every head of x [B, S, H, D], then RoPE in float32; cos, sin [B, S, D / 2].

        `interleaved` rotates neighbouring features, else the two halves of a head.
        """

    def attention(self, q: T, k: T, v: T, mask: T | None = None) -> T:
        """Softmax attention: q [B, S, H, D]; k, v [B, K, Hkv, D] -> [B, S, H * D].

        Query heads share key heads in groups where there are fewer. A query that may see no key
        (padding on the left) gets zeros, as from torch's `scaled_dot_product_attention`.
        """

    def joint_attention(
        self, q: T, k: Sequence[T], v: Sequence[T], references: Sequence[T], like: T
    ) -> T:
        """Softmax attention of q [B, S, H, D] to `references` and own keys: [B, S, H * D].

        k and v [B, K, H, D] come in parts; those of the references [1, R, H, D], or nothing, are
        shared by every image of the batch of `like`.
        """

    def causal_mask(self, attention_mask: T) -> T:
        """Mask [B, 1, T, T] of a causal decoder over right- or left-padded text [B, T]."""

    def quantize_kv(self, x: T) -> tuple[T, T]:
        """Keys or values [1, R, H, D] as float8 e4m3, and their float32 scales [1, 1, H, 1].

        A scale is the head's largest magnitude / 448, at least the smallest normal float32.
        """

    def dequantize_kv(self, values: T, scale: T) -> T:
        """values * scale in float32, rounded to the model's dtype: [1, R, H, D]."""

    def heads(self, rows: T, like: T, num_heads: int) -> T:
        """[B * S, H * D] -> [B, S, H, D], with B and S those of `like` [B, S, ...]."""

    def rows(self, x: T) -> T:
        """[B, S, ...] -> [B * S, ...] flattened to a matrix."""

    def sequence(self, rows: T, like: T) -> T:
        """[B * S, F] -> [B, S, F], with B and S those of `like` [B, S, ...]."""

    def expand_batch(self, x: T, like: T) -> T:
        """Repeats a batch-1 tensor to the batch of `like`."""

    def concat(self, parts: Sequence[T], axis: int) -> T:
        """Concatenation."""

    def compact(self, x: T) -> T:
        """x in memory no larger than itself, for what outlives what it was a part of."""

    def split_tokens(self, x: T, at: T) -> tuple[T, T]:
        """Splits [B, A + S, F] after A tokens, with A that of `at` [B, A, F]."""

    def split_features(self, x: T, parts: int) -> list[T]:
        """Equal pieces of a [1, parts * D] row as vectors [D]."""

    def add(self, a: T, b: T) -> T:
        """a + b with broadcasting."""

    def mul(self, a: T, b: T) -> T:
        """a * b with broadcasting."""

    def silu(self, x: T) -> T:
        """x * sigmoid(x)."""

    def saturate(self, x: T) -> T:
        """Clips float16 to its finite range; does nothing in other types."""

    def to_float32(self, x: T) -> T:
        """Casts up; does nothing to float32."""

    def to_model_dtype(self, x: T) -> T:
        """Casts to the model's dtype; does nothing in float32."""


class ImageOps(Ops[T], Protocol[T]):
    """What the VAE needs besides: operations on images [B, C, H, W].

    `name` is a layer's, which has a weight and a bias.
    """

    def conv2d(self, x: T, name: str, stride: int = 1) -> T:
        """Convolution with a kernel of 3x3 or 1x1 that keeps the size, or halves it.

        With stride 2 the zeros around the image are at its right and lower edges alone.
        """

    def group_norm(self, x: T, name: str, groups: int, eps: float) -> T:
        """Group normalisation, scaled and shifted by channel."""

    def upsample(self, x: T) -> T:
        """Every pixel four times: [B, C, H, W] -> [B, C, 2 * H, 2 * W]."""

    def affine(self, x: T, name: str) -> T:
        """`x @ weight.T + bias` over the last axis."""

    def grid_attention(self, q: T, k: T, v: T) -> T:
        """Softmax attention of one head between all cells of a grid [B, h, w, C]."""

    def statistics(self, name: str, eps: float) -> tuple[T, T]:
        """Mean and standard deviation of a BatchNorm layer's channels: [C]."""

    def patchify(self, x: T, channels: int) -> T:
        """Cells of 2x2 pixels in the first channels: [B, ..., 2 * h, 2 * w] -> [B, h, w, C * 4]."""

    def unpatchify(self, x: T, channels: int) -> T:
        """Back: [B, h, w, C * 4] -> [B, C, 2 * h, 2 * w]."""

    def permute(self, x: T, axes: tuple[int, ...]) -> T:
        """x with its axes in another order."""

    def div(self, a: T, b: T) -> T:
        """a / b with broadcasting."""

    def clip(self, x: T, low: float, high: float) -> T:
        """x, but at least `low` and at most `high`."""

    def to_uint8(self, x: T) -> T:
        """Rounds float32 to whole numbers, halves to even ones, and casts."""


class MergeOps(Ops[T], Protocol[T]):
    """What a merge of weights needs besides: operations on float32 matrices."""

    def product(self, a: T, b: T) -> T:
        """a @ b."""

    def largest(self, x: T, least: T) -> T:
        """The largest magnitude of x, but at least `least` [1]: [1]."""

    def round_to_float8(self, x: T, scale: T) -> T:
        """x / scale [1] as float8 e4m3; magnitudes over 448 become 448."""
