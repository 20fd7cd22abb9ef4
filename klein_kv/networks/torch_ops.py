"""`Ops` computed by PyTorch: the reference for the exported graphs, and the torch backend."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from klein_kv.artifacts.numbers import FP8_MAX
from klein_kv.networks.kv_float8 import SMALLEST_SCALE
from klein_kv.networks.ops import Ops

__all__ = ["TorchOps"]

_SMALL = 4096
_KIND = "block"


P = ParamSpec("P")
R = TypeVar("R")

Block = Callable[..., Any]


class TorchOps:
    """Runs the networks on weights that lie on the device to compute on.

    `compile_blocks` runs blocks through `torch.compile`: each kind of block is compiled once, for
    all blocks of that kind and all graphs, and once more, for any size, when a second size comes.
    `device` is that of the weights; it is named where there are none.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype,
        compile_blocks: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.weights = weights
        self.dtype = dtype
        self._compile = compile_blocks
        self._device = device
        self._constants: dict[object, tuple[NDArray[Any], Tensor]] = {}
        self._blocks: dict[str, TorchOps] = {}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._device or next(iter(self.weights.values())).device

    def block(
        self,
        function: "Callable[Concatenate[Ops[Tensor], str, P], R]",
        name: str,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        if not self._compile:
            return function(self, name, *args, **kwargs)
        if name not in self._blocks:
            # To the compiler all blocks of a kind have one name: weights are arguments then.
            own = {
                _KIND + key.removeprefix(name): tensor
                for key, tensor in self.weights.items()
                if key.startswith(f"{name}.")
            }
            self._blocks[name] = TorchOps(own, self.dtype)
        result: R = _compiled(function)(self._blocks[name], _KIND, *args, **kwargs)
        return result

    def constant(self, value: NDArray[Any]) -> Tensor:
        # Large constants are module-level tables that come again at every call: no need to read
        # them. What `id` names is kept, so that nothing else gets that id.
        content = value.tobytes() if value.nbytes <= _SMALL else id(value)
        key = (value.dtype.str, value.shape, content)
        if key not in self._constants:
            self._constants[key] = value, torch.from_numpy(value.copy()).to(self.device)
        return self._constants[key][1]

    def linear(self, rows: Tensor, weight: str, part: tuple[int, int] | None = None) -> Tensor:
        w = self.weights[weight]
        return F.linear(rows, w if part is None else w[part[0] : part[1]])

    def projection(
        self, rows: Tensor, weight: str, features: tuple[int, int]
    ) -> Callable[[int, int], Tensor]:
        first = features[0]
        whole = self.linear(rows, weight, features)
        return lambda start, stop: whole[:, start - first : stop - first]

    def embedding(self, ids: Tensor, weight: str) -> Tensor:
        return F.embedding(ids, self.weights[weight]).flatten(0, 1)

    def layer_norm(self, rows: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return F.layer_norm(rows, rows.shape[-1:], weight, bias, eps)

    def rms_norm(self, x: Tensor, weight: str, eps: float) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weights[weight], eps)

    def timestep_embedding(self, timestep: Tensor, frequencies: NDArray[np.float32]) -> Tensor:
        angles = timestep[:, None].float() * self.constant(frequencies)[None]
        return torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.dtype)

    def rope_table(self, ids: Tensor, tables: Sequence[NDArray[np.float32]]) -> Tensor:
        columns = [self.constant(table)[ids[:, axis]] for axis, table in enumerate(tables)]
        return torch.cat(columns, dim=-1)[None]

    def sequence_positions(self, like: Tensor) -> Tensor:
        return torch.arange(like.shape[1], device=self.device)[:, None]

    def norm_rope(
        self, x: Tensor, weight: str, eps: float, cos: Tensor, sin: Tensor, interleaved: bool
    ) -> Tensor:
        x = self.rms_norm(x, weight, eps)
        cos, sin, y = cos[:, :, None], sin[:, :, None], x.float()
        if interleaved:
            a, b = y.view(*y.shape[:-1], -1, 2).unbind(-1)
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        else:
            a, b = y.chunk(2, dim=-1)
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        return turned.to(x.dtype)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(2)

    def joint_attention(
        self,
        q: Tensor,
        k: Sequence[Tensor],
        v: Sequence[Tensor],
        references: Sequence[Tensor],
        like: Tensor,
    ) -> Tensor:
        if references:
            k_ref, v_ref = (self.expand_batch(x, like) for x in references)
            k, v = [k_ref, *k], [v_ref, *v]
        keys, values = (x[0] if len(x) == 1 else self.concat(x, 1) for x in (k, v))
        return self.attention(q, keys, values)

    def causal_mask(self, attention_mask: Tensor) -> Tensor:
        length = attention_mask.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.device).tril()
        return causal & attention_mask.bool()[:, None, None]

    def quantize_kv(self, x: Tensor) -> tuple[Tensor, Tensor]:
        wide = x.float()
        largest = wide.abs().amax((1, 3), keepdim=True) if x.shape[1] else wide.new_zeros(1)
        scale = largest.clip(min=SMALLEST_SCALE * FP8_MAX) / FP8_MAX
        scale = scale.expand(1, 1, x.shape[2], 1)
        return (wide / scale).clip(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale

    def dequantize_kv(self, values: Tensor, scale: Tensor) -> Tensor:
        return (values.float() * scale).to(self.dtype)

    def heads(self, rows: Tensor, like: Tensor, num_heads: int) -> Tensor:
        return rows.view(like.shape[0], like.shape[1], num_heads, -1)

    def rows(self, x: Tensor) -> Tensor:
        return x.flatten(2).flatten(0, 1) if x.ndim > 2 else x

    def sequence(self, rows: Tensor, like: Tensor) -> Tensor:
        return rows.view(like.shape[0], like.shape[1], -1)

    def expand_batch(self, x: Tensor, like: Tensor) -> Tensor:
        return x.expand(like.shape[0], *x.shape[1:])

    def concat(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        return torch.cat(list(parts), dim=axis)

    def compact(self, x: Tensor) -> Tensor:
        return x.contiguous()

    def split_tokens(self, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        count = at.shape[1]
        return x[:, :count], x[:, count:]

    def split_features(self, x: Tensor, parts: int) -> list[Tensor]:
        return list(x.flatten().chunk(parts))

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b

    def silu(self, x: Tensor) -> Tensor:
        return F.silu(x)

    def saturate(self, x: Tensor) -> Tensor:
        return x.clip(-65504, 65504) if x.dtype == torch.float16 else x

    def to_float32(self, x: Tensor) -> Tensor:
        return x.float()

    def to_model_dtype(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)

    def conv2d(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight, bias = self._layer(name)
        if stride == 1:
            return F.conv2d(x, weight, bias, padding="same")
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, bias, stride)

    def group_norm(self, x: Tensor, name: str, groups: int, eps: float) -> Tensor:
        return F.group_norm(x, groups, *self._layer(name), eps)

    def upsample(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")

    def affine(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, *self._layer(name))

    def grid_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = q.shape
        q, k, v = (x.flatten(1, 2)[:, None] for x in (q, k, v))  # [B, 1, h * w, C]
        return F.scaled_dot_product_attention(q, k, v).view(shape)

    def statistics(self, name: str, eps: float) -> tuple[Tensor, Tensor]:
        mean, variance = (self.weights[f"{name}.running_{x}"] for x in ("mean", "var"))
        return mean, torch.sqrt(variance + eps)

    def patchify(self, x: Tensor, channels: int) -> Tensor:
        return F.pixel_unshuffle(x[:, :channels], 2).permute(0, 2, 3, 1)

    def unpatchify(self, x: Tensor, channels: int) -> Tensor:
        cells = x.reshape(*x.shape[:3], channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return cells.flatten(4, 5).flatten(2, 3)

    def permute(self, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        return x.permute(axes)

    def div(self, a: Tensor, b: Tensor) -> Tensor:
        return a / b

    def clip(self, x: Tensor, low: float, high: float) -> Tensor:
        return x.clip(low, high)

    def to_uint8(self, x: Tensor) -> Tensor:
        return x.round().to(torch.uint8)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    def largest(self, x: Tensor, least: Tensor) -> Tensor:
        low, high = x.aminmax()
        return torch.maximum(torch.maximum(high, -low), least)

    def round_to_float8(self, x: Tensor, scale: Tensor) -> Tensor:
        return (x / scale).clip(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)

    def _layer(self, name: str) -> tuple[Tensor, Tensor]:
        return self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]


@functools.cache
def _compiled(function: Block) -> Block:
    compiled: Block = torch.compile(function)
    return compiled
