"""The VAE as a list of layers: what computes them, what their weights are, the memory they take.

What diffusers' pipeline does around the VAE is part of the two networks: pixels come and go as
uint8 in image order, latents as the transformer's tokens in grid order (2x2 patches, normalised
with the BatchNorm statistics).

Source: diffusers, `AutoencoderKLFlux2`, `Encoder` and `Decoder` of autoencoders/vae.py;
`Flux2KleinKVPipeline._encode_vae_image`, `_patchify_latents` and the end of `__call__`;
`VaeImageProcessor.preprocess` and `postprocess`.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np

from klein_kv.artifacts.config import VaeConfig
from klein_kv.networks.ops import ImageOps

__all__ = ["vae_decoder", "vae_encoder", "vae_parameters", "vae_scratch"]

T = TypeVar("T")

_EPS = 1e-6
_LAST, _FIRST = (0, 2, 3, 1), (0, 3, 1, 2)  # where channels go
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


class _Layer(NamedTuple):
    """One step: "conv", "down", "up", "residual", "attention" or "out" (norm, then convolution).

    Level 0 has the size of the image, each further level half of it.
    """

    kind: str
    name: str
    inner: int
    outer: int
    level: int
    kernel: int = 3


def _encoder_layers(config: VaeConfig) -> Iterator[_Layer]:
    channels, last = config.block_out_channels, config.num_levels - 1
    yield _Layer("conv", "encoder.conv_in", 3, channels[0], 0)
    for level, (before, width) in enumerate(pairwise((channels[0], *channels))):
        block = f"encoder.down_blocks.{level}"
        yield from _residuals(block, config.layers_per_block, before, width, level)
        if level < last:
            yield _Layer("down", f"{block}.downsamplers.0.conv", width, width, level)
    yield from _middle("encoder", channels[-1], last)
    moments = 2 * config.latent_channels
    yield _Layer("out", "encoder", channels[-1], moments, last)
    yield _Layer("conv", "quant_conv", moments, moments, last, kernel=1)


def _decoder_layers(config: VaeConfig) -> Iterator[_Layer]:
    channels, last = config.decoder_block_out_channels, config.num_levels - 1
    latents = config.latent_channels
    yield _Layer("conv", "post_quant_conv", latents, latents, last, kernel=1)
    yield _Layer("conv", "decoder.conv_in", latents, channels[-1], last)
    yield from _middle("decoder", channels[-1], last)
    for i, (before, width) in enumerate(pairwise((channels[-1], *channels[::-1]))):
        block = f"decoder.up_blocks.{i}"
        yield from _residuals(block, config.layers_per_block + 1, before, width, last - i)
        if i < last:
            yield _Layer("up", f"{block}.upsamplers.0.conv", width, width, last - i)
    yield _Layer("out", "decoder", channels[0], 3, 0)


def _residuals(block: str, count: int, before: int, width: int, level: int) -> Iterator[_Layer]:
    for i in range(count):
        yield _Layer("residual", f"{block}.resnets.{i}", width if i else before, width, level)


def _middle(part: str, width: int, level: int) -> Iterator[_Layer]:
    first, second = _residuals(f"{part}.mid_block", 2, width, width, level)
    yield first
    yield _Layer("attention", f"{part}.mid_block.attentions.0", width, width, level)
    yield second


def vae_parameters(config: VaeConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that are read, by diffusers' names."""
    shapes: dict[str, tuple[int, ...]] = {}
    layers = (*_encoder_layers(config), *_decoder_layers(config))
    for kind, name, inner, outer, _, kernel in layers:
        if kind == "residual":
            shapes |= _norm(f"{name}.norm1", inner) | _conv(f"{name}.conv1", inner, outer)
            shapes |= _norm(f"{name}.norm2", outer) | _conv(f"{name}.conv2", outer, outer)
            if inner != outer:
                shapes |= _conv(f"{name}.conv_shortcut", inner, outer, 1)
        elif kind == "attention":
            shapes |= _norm(f"{name}.group_norm", inner)
            for part in _ATTENTION:
                shapes[f"{name}.{part}.weight"] = (inner, inner)
                shapes[f"{name}.{part}.bias"] = (inner,)
        elif kind == "out":
            shapes |= _norm(f"{name}.conv_norm_out", inner)
            shapes |= _conv(f"{name}.conv_out", inner, outer)
        else:
            shapes |= _conv(name, inner, outer, kernel)
    statistics = (config.token_channels,)
    return shapes | {"bn.running_mean": statistics, "bn.running_var": statistics}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _conv(name: str, inner: int, outer: int, kernel: int = 3) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outer, inner, kernel, kernel), f"{name}.bias": (outer,)}


def vae_scratch(config: VaeConfig, graph: str, *, batch: int, height: int, width: int) -> int:
    """Numbers that the widest place of a graph holds at once.

    That is the first convolution of a residual block: its input, kept for the sum, the same after
    norm and activation, and its output. Engines of one size take within 2 % of it
    (TensorRT-RTX 1.7.1, klein's VAE at 1024x1024), ONNX Runtime more.
    """
    layers = _encoder_layers(config) if graph == "vae_encoder" else _decoder_layers(config)
    return max(
        (2 * layer.inner + layer.outer) * (batch * height * width >> 2 * layer.level)
        for layer in layers
        if layer.kind == "residual"
    )


def vae_encoder(ops: ImageOps[T], config: VaeConfig, image: T) -> T:
    """uint8 [1, H, W, 3] -> normalised tokens [1, h, w, C]."""
    # TensorRT does nothing but cast uint8: the cast comes first here, and last in the decoder.
    pixels = ops.permute(ops.to_float32(image), _FIRST)
    zero_to_two = ops.mul(ops.div(pixels, _scalar(ops, 255)), _scalar(ops, 2))
    x = ops.to_model_dtype(ops.add(zero_to_two, _scalar(ops, -1)))
    for layer in _encoder_layers(config):
        x = _apply(ops, config, layer, x)
    # The mode of the latent distribution is its mean, the first half of the moments.
    z = ops.patchify(x, config.latent_channels)
    mean, std = ops.statistics("bn", config.batch_norm_eps)
    minus = ops.mul(mean, ops.to_model_dtype(_scalar(ops, -1)))
    return ops.div(ops.add(z, minus), std)


def vae_decoder(ops: ImageOps[T], config: VaeConfig, latents: T) -> tuple[T, T]:
    """Tokens [B, h, w, C] -> uint8 [B, H, W, 3] and the same values as [B, 3, H, W] in 0..1."""
    mean, std = ops.statistics("bn", config.batch_norm_eps)
    x = ops.unpatchify(ops.add(ops.mul(latents, std), mean), config.latent_channels)
    for layer in _decoder_layers(config):
        x = _apply(ops, config, layer, x)
    half = ops.to_model_dtype(_scalar(ops, 0.5))
    sample = ops.clip(ops.add(ops.mul(x, half), half), 0, 1)
    wide = ops.mul(ops.to_float32(sample), _scalar(ops, 255))
    return ops.to_uint8(ops.permute(wide, _LAST)), sample


def _scalar(ops: ImageOps[T], value: float) -> T:
    return ops.constant(np.array(value, np.float32))


def _apply(ops: ImageOps[T], config: VaeConfig, layer: _Layer, x: T) -> T:
    def activated(x: T, name: str) -> T:
        return ops.silu(ops.group_norm(x, name, config.norm_num_groups, _EPS))

    name = layer.name
    match layer.kind:
        case "residual":
            y = ops.conv2d(activated(x, f"{name}.norm1"), f"{name}.conv1")
            y = ops.conv2d(activated(y, f"{name}.norm2"), f"{name}.conv2")
            kept = x if layer.inner == layer.outer else ops.conv2d(x, f"{name}.conv_shortcut")
            return ops.add(kept, y)
        case "attention":
            y = ops.group_norm(x, f"{name}.group_norm", config.norm_num_groups, _EPS)
            cells = ops.permute(y, _LAST)
            q, k, v = (ops.affine(cells, f"{name}.{part}") for part in _ATTENTION[:3])
            y = ops.affine(ops.grid_attention(q, k, v), f"{name}.{_ATTENTION[3]}")
            return ops.add(ops.permute(y, _FIRST), x)
        case "out":
            return ops.conv2d(activated(x, f"{name}.conv_norm_out"), f"{name}.conv_out")
        case "up":
            return ops.conv2d(ops.upsample(x), name)
        case "down":
            return ops.conv2d(x, name, stride=2)
        case _:
            return ops.conv2d(x, name)
