"""The networks of klein with random weights, at any size and on any device.

What a checkpoint of random weights holds, without the files: `fixture` writes it to a disk, a
benchmark draws it where it computes.

Weights are scaled so that activations stay of order one through all blocks, and the modulations,
norms and BatchNorm statistics differ from their identity: a graph that drops one gives another
image.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from torch import Tensor, nn

__all__ = [
    "SIZES",
    "FixtureSize",
    "fill_random",
    "make_scheduler",
    "transformer_on_meta",
    "vae_on_meta",
]

_TEXT_TAPS = 3  # hidden states 9, 18 and 27, side by side on the feature axis


@dataclass(frozen=True, slots=True)
class FixtureSize:
    """Shapes of one checkpoint: arguments of the networks' own classes."""

    transformer: Mapping[str, int]  # of `Flux2Transformer2DModel`; a head is a multiple of 8 wide
    # of `Qwen3Config`; at least 28 layers: the last hidden state of a Qwen3 model is normalised,
    # and must not be the last one that is read
    text_encoder: Mapping[str, int]
    vae: Mapping[str, Any]  # of `AutoencoderKLFlux2`; four levels, a scale factor of 8
    dtype: str = "float32"  # of the weights when the caller names none
    sparse: bool = False  # holes in place of values: every weight reads as zero


# No fewer rows of the embedding than the tokenizer has tokens.
_SMALL_TEXT = {
    "num_hidden_layers": 28,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 640,
}

SIZES: Mapping[str, FixtureSize] = MappingProxyType(
    {
        "tiny": FixtureSize(
            {
                "num_layers": 1,
                "num_single_layers": 2,
                "num_attention_heads": 2,
                "attention_head_dim": 32,
            },
            {**_SMALL_TEXT, "hidden_size": 32, "head_dim": 16, "intermediate_size": 80},
            {"block_out_channels": (16, 16, 24, 24), "norm_num_groups": 8, "layers_per_block": 1},
        ),
        "small": FixtureSize(
            {
                "num_layers": 4,
                "num_single_layers": 10,
                "num_attention_heads": 4,
                "attention_head_dim": 128,
            },
            {**_SMALL_TEXT, "hidden_size": 128, "head_dim": 32, "intermediate_size": 384},
            {"block_out_channels": (32, 64, 96, 96), "norm_num_groups": 16, "layers_per_block": 1},
        ),
        # Transformer: klein-9b in diffusers' scripts/convert_flux2_to_diffusers.py. Text encoder:
        # the configuration of Qwen/Qwen3-8B. Autoencoder: the defaults of AutoencoderKLFlux2.
        "9b-shapes": FixtureSize(
            {
                "num_layers": 8,
                "num_single_layers": 24,
                "num_attention_heads": 32,
                "attention_head_dim": 128,
            },
            {
                "num_hidden_layers": 36,
                "hidden_size": 4096,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "intermediate_size": 12288,
                "vocab_size": 151936,
            },
            {},
            dtype="bfloat16",
            sparse=True,
        ),
    }
)


def transformer_on_meta(shapes: FixtureSize, dtype: torch.dtype) -> Flux2Transformer2DModel:
    """diffusers' denoiser of this size without storage."""
    with torch.device("meta"):
        module = Flux2Transformer2DModel(
            joint_attention_dim=_TEXT_TAPS * shapes.text_encoder["hidden_size"],
            axes_dims_rope=4 * (shapes.transformer["attention_head_dim"] // 4,),
            guidance_embeds=False,
            **shapes.transformer,
        )
    return _ready(module, dtype)


def vae_on_meta(shapes: FixtureSize, dtype: torch.dtype) -> AutoencoderKLFlux2:
    """diffusers' autoencoder of this size without storage."""
    with torch.device("meta"):
        return _ready(AutoencoderKLFlux2(**shapes.vae), dtype)


def _ready(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    # nn.Module's own `to`: the override of diffusers 0.42 warns of layers to keep in float32 even
    # when the model names none.
    return nn.Module.to(module, dtype=dtype).eval()


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1 [dev]'s schedule, which diffusers' conversion script gives to FLUX.2 too."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


# Where 1/sqrt(fan-in) is not enough, by the end of the name. Measured on `tiny` (two references)
# and `small` (four): the noise prediction and the final latents have a standard deviation of 1.1 to
# 1.5, the blocks of at most 2.9, and every input, the references' order too, shows in the pixels.
_GAINS = MappingProxyType(
    {
        # SiLU halves what passes, and there are two on the way from the timestep to a modulation.
        "timestep_embedder.linear_1.weight": 1.5,
        "timestep_embedder.linear_2.weight": 1.5,
        # 28 residual layers and no final norm: the text arrives four times too large.
        "context_embedder.weight": 0.25,
        # Queries of unit scale attend almost evenly, and then it hardly matters to what.
        "attn.norm_q.weight": 2.0,
        "attn.norm_added_q.weight": 2.0,
        # Most pixels inside the range of an image, few of them clipped.
        "decoder.conv_out.weight": 0.5,
    }
)


def fill_random(module: nn.Module, generator: torch.Generator) -> None:
    """Draws every tensor of a module's state, in the order of its state_dict, in float32.

    The generator is on the module's device; another device gives other numbers.
    """
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(_random(name, tensor.shape, generator))
        else:
            tensor.zero_()  # BatchNorm's num_batches_tracked


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Values for one tensor: normal with 1/sqrt(fan-in) for matrices, near identity for norms."""
    normal = torch.randn(shape, generator=generator, device=generator.device)
    if name == "bn.running_var":
        return (0.3 * normal).exp()
    if name == "bn.running_mean":
        return 0.3 * normal
    if name.endswith(".bias"):
        return 0.1 * normal
    if name.endswith("embed_tokens.weight"):
        return normal
    gain = next((gain for suffix, gain in _GAINS.items() if name.endswith(suffix)), 1.0)
    if len(shape) == 1:
        return gain * (1.0 + 0.1 * normal)
    return normal * (gain / math.sqrt(shape[1:].numel()))
