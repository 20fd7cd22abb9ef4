"""Pocket's denoiser: diffusers' transformer, and a fast forward of it for training.

`forward` computes what `Flux2Transformer2DModel` computes with `kv_cache_mode="extract"` (a test
compares): references at timestep 0, attending to themselves alone. It keeps text, references and
image apart, so that nothing is blended or copied, and lets one token stand for many.
"""

from dataclasses import dataclass

import torch
from diffusers import Flux2Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional

from klein_kv.artifacts.positions import grid_ids, reference_ids

__all__ = ["Positions", "forward", "make_transformer"]

HEAD_DIM = 32
AXES = (4, 12, 12, 4)  # of a head: T, H, W, L
THETA = 100  # pictures are 8 to 16 tokens wide; 2000 would leave most of the axes constant


def make_transformer(text_width: int) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        num_layers=1,
        num_single_layers=7,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=8,
        joint_attention_dim=text_width,
        mlp_ratio=1.5,
        axes_dims_rope=AXES,
        rope_theta=THETA,
        guidance_embeds=False,
    )


@dataclass(frozen=True)
class Positions:
    """Cosines and sines [tokens, HEAD_DIM / 2] of every stream, and the weight of text tokens."""

    text: tuple[Tensor, Tensor]
    references: tuple[Tensor, Tensor]
    image: tuple[Tensor, Tensor]
    bias: Tensor  # [tokens of text, references and image], log of how many tokens each stands for

    @classmethod
    def of(
        cls, text: Tensor, log_count: Tensor, grid: tuple[int, int], references: int
    ) -> "Positions":
        """Of text at positions [tokens], an output of `grid` (height, width) and its references.

        References have the output's grid.
        """
        lines = torch.zeros(len(text), 4, dtype=torch.long)
        lines[:, 3] = text
        image = torch.from_numpy(grid_ids(*grid))
        known = torch.from_numpy(reference_ids([grid] * references)) if references else image[:0]
        bias = torch.cat([log_count, torch.zeros(len(known) + len(image))])
        return cls(_angles(lines), _angles(known), _angles(image), bias)


def _angles(positions: Tensor) -> tuple[Tensor, Tensor]:
    parts = [
        positions[:, axis, None].double()
        / THETA ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
        for axis, size in enumerate(AXES)
    ]
    angles = torch.cat(parts, dim=1)
    return angles.cos().float(), angles.sin().float()


# Pairs that rotate together lie side by side in a head. Split into halves instead they rotate by
# whole vectors; the rows of q and k are put in that order once per call.
_HALVES = torch.cat([torch.arange(0, HEAD_DIM, 2), torch.arange(1, HEAD_DIM, 2)])


def _rotated(heads: Tensor, norm: nn.RMSNorm, angles: tuple[Tensor, Tensor]) -> Tensor:
    """[B, tokens, H x D] in halves to normalised, rotated [B, H, tokens, D]."""
    cos, sin = angles
    heads = heads.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
    heads = functional.rms_norm(heads, (HEAD_DIM,), norm.weight[_HALVES], norm.eps)
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _in_halves(weight: Tensor) -> Tensor:
    return weight.unflatten(0, (-1, HEAD_DIM))[:, _HALVES].flatten(0, 1)


def _heads(values: Tensor) -> Tensor:
    return values.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)


def _flat(heads: Tensor) -> Tensor:
    return heads.transpose(1, 2).flatten(2)


def _modulated(hidden: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(
        shift, functional.layer_norm(hidden, hidden.shape[-1:], eps=1e-6), 1 + scale
    )


def _swiglu(values: Tensor) -> Tensor:
    gate, up = values.chunk(2, dim=-1)
    return functional.silu(gate) * up


def _attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=None if bias is None else bias[None, None, None]
    )


def forward(
    model: Flux2Transformer2DModel,
    latents: Tensor,
    timestep: Tensor,
    references: Tensor,
    text: Tensor,
    positions: Positions,
) -> Tensor:
    """The predicted velocity.

    Args:
        latents: [B, image tokens, 128].
        timestep: [B], 0 to 1.
        references: [B, reference tokens, 128]; none are [B, 0, 128].
        text: [B, text tokens, features].

    Returns:
        [B, image tokens, 128].
    """
    now = model.time_guidance_embed(timestep * 1000, None)
    clean = model.time_guidance_embed(torch.zeros(1), None)
    image = model.x_embedder(latents)
    words = model.context_embedder(text)
    refs = model.x_embedder(references)
    known = references.shape[1] > 0

    image_mods = model.double_stream_modulation_img(now)[:, None].chunk(6, -1)
    refs_mods = model.double_stream_modulation_img(clean)[:, None].chunk(6, -1)
    words_mods = model.double_stream_modulation_txt(now)[:, None].chunk(6, -1)
    for block in model.transformer_blocks:
        own = block.attn
        weights = [_in_halves(own.to_q.weight), _in_halves(own.to_k.weight), own.to_v.weight]
        weight = torch.cat(weights)
        added = torch.cat(
            [
                _in_halves(own.add_q_proj.weight),
                _in_halves(own.add_k_proj.weight),
                own.add_v_proj.weight,
            ]
        )
        streams = []
        for hidden, mods, projection, norms, angles in (
            (words, words_mods, added, (own.norm_added_q, own.norm_added_k), positions.text),
            (refs, refs_mods, weight, (own.norm_q, own.norm_k), positions.references),
            (image, image_mods, weight, (own.norm_q, own.norm_k), positions.image),
        ):
            query, key, value = functional.linear(
                _modulated(hidden, mods[0], mods[1]), projection
            ).chunk(3, -1)
            streams.append(
                (_rotated(query, norms[0], angles), _rotated(key, norms[1], angles), _heads(value))
            )
        joined, of_refs = _joint_attention(streams, positions.bias, known)
        of_words, of_image = joined.split([words.shape[1], image.shape[1]], dim=1)
        words = words + words_mods[2] * own.to_add_out(of_words)
        image = image + image_mods[2] * own.to_out[0](of_image)
        words = words + words_mods[5] * block.ff_context(_modulated(words, *words_mods[3:5]))
        image = image + image_mods[5] * block.ff(_modulated(image, *image_mods[3:5]))
        if known:
            refs = refs + refs_mods[2] * own.to_out[0](of_refs)
            refs = refs + refs_mods[5] * block.ff(_modulated(refs, *refs_mods[3:5]))

    now_mods = model.single_stream_modulation(now)[:, None].chunk(3, -1)
    clean_mods = model.single_stream_modulation(clean)[:, None].chunk(3, -1)
    for number, block in enumerate(model.single_transformer_blocks):
        own = block.attn
        projection = own.to_qkv_mlp_proj.weight
        width = own.inner_dim
        weight = torch.cat(
            [
                _in_halves(projection[:width]),
                _in_halves(projection[width : 2 * width]),
                projection[2 * width :],
            ]
        )
        last = number == len(model.single_transformer_blocks) - 1
        streams, gated = [], []
        for hidden, mods, angles, read in (
            (words, now_mods, positions.text, not last),
            (refs, clean_mods, positions.references, not last),
            (image, now_mods, positions.image, True),
        ):
            values = _modulated(hidden, mods[0], mods[1])
            if read:
                query, key, value, inner = functional.linear(values, weight).split(
                    [width, width, width, weight.shape[0] - 3 * width], dim=-1
                )
                gated.append(_swiglu(inner))
                turned = _rotated(query, own.norm_q, angles)
            else:  # the last block's other tokens are read, and go nowhere
                key, value = functional.linear(values, weight[width : 3 * width]).chunk(2, -1)
                turned = None
            streams.append((turned, _rotated(key, own.norm_k, angles), _heads(value)))
        if last:
            key, value = (torch.cat([stream[index] for stream in streams], 2) for index in (1, 2))
            attended = _flat(_attention(streams[2][0], key, value, positions.bias))
            image = image + now_mods[2] * own.to_out(torch.cat([attended, gated[0]], -1))
            break
        joined, of_refs = _joint_attention(streams, positions.bias, known)
        of_words, of_image = joined.split([words.shape[1], image.shape[1]], dim=1)
        words = words + now_mods[2] * own.to_out(torch.cat([of_words, gated[0]], -1))
        image = image + now_mods[2] * own.to_out(torch.cat([of_image, gated[2]], -1))
        if known:
            refs = refs + clean_mods[2] * own.to_out(torch.cat([of_refs, gated[1]], -1))

    return model.proj_out(model.norm_out(image, now))


def _joint_attention(
    streams: list[tuple[Tensor, Tensor, Tensor]], bias: Tensor, known: bool
) -> tuple[Tensor, Tensor | None]:
    """Text and image attend to everything, references to themselves."""
    words, refs, image = streams
    key, value = (torch.cat([stream[index] for stream in streams], 2) for index in (1, 2))
    joined = _attention(torch.cat([words[0], image[0]], 2), key, value, bias)
    return _flat(joined), _flat(_attention(*refs)) if known else None
