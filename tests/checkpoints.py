"""Small klein checkpoints built with diffusers' and transformers' own classes and saved by them.

Only the tokenizer is klein-kv's, so that its own fixture checkpoints and its exporter cannot be
wrong in the same way. Three models differ in everything that a configuration may choose.
"""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from transformers import Qwen3Config, Qwen3ForCausalLM

from klein_kv.export.checkpoints.fixture import make_tokenizer
from tests.chat_tokenizer import edit_config

__all__ = [
    "MODELS",
    "Architecture",
    "load_diffusers",
    "load_plain_diffusers",
    "randomize",
    "save_checkpoint",
]


@dataclass(frozen=True, slots=True)
class Architecture:
    """Arguments of the classes, and how the checkpoint is saved."""

    transformer: dict[str, Any]
    text_encoder: dict[str, Any]
    vae: dict[str, Any]
    text_layers: tuple[int, ...] = (9, 18, 27)
    padding_side: str = "right"
    max_shard_size: str = "10GB"


MODELS: dict[str, Architecture] = {
    # The usual shape of everything, in other sizes; RoPE axes of different widths.
    "plain": Architecture(
        transformer={
            "num_layers": 2,
            "num_single_layers": 3,
            "num_attention_heads": 3,
            "attention_head_dim": 24,
            "axes_dims_rope": (4, 8, 8, 4),
        },
        text_encoder={
            "num_hidden_layers": 30,
            "hidden_size": 24,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 40,
            "tie_word_embeddings": False,
        },
        vae={"block_out_channels": (16, 16, 24, 32), "latent_channels": 32, "layers_per_block": 1},
    ),
    # The last hidden state of the text encoder is read, after its final norm; three VAE levels.
    "short": Architecture(
        transformer={
            "num_layers": 1,
            "num_single_layers": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 40,
            "axes_dims_rope": (8, 16, 12, 4),
            "mlp_ratio": 2.5,
            "rope_theta": 500,
            "timestep_guidance_channels": 64,
        },
        text_encoder={
            "num_hidden_layers": 3,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 24,
            "intermediate_size": 48,
            "tie_word_embeddings": True,
        },
        vae={"block_out_channels": (16, 24, 32), "latent_channels": 8, "layers_per_block": 2},
        text_layers=(1, 2, 3),
    ),
    # Sharded files, padding on the left, one head, five VAE levels.
    "sharded": Architecture(
        transformer={
            "num_layers": 3,
            "num_single_layers": 1,
            "num_attention_heads": 1,
            "attention_head_dim": 64,
            "axes_dims_rope": (16, 16, 16, 16),
        },
        text_encoder={
            "num_hidden_layers": 28,
            "hidden_size": 16,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "intermediate_size": 32,
            "tie_word_embeddings": False,
        },
        vae={
            "block_out_channels": (8, 8, 16, 16, 24),
            "latent_channels": 16,
            "layers_per_block": 1,
        },
        padding_side="left",
        max_shard_size="150KB",
    ),
}


def save_checkpoint(folder: Path, architecture: Architecture, seed: int) -> None:
    """Builds the networks with random weights and saves them as a pipeline."""
    tokenizer = make_tokenizer()
    text = Qwen3Config(
        vocab_size=len(tokenizer) + 5,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        **architecture.text_encoder,
    )
    levels = len(architecture.vae["block_out_channels"])
    modules: dict[str, torch.nn.Module] = {
        "transformer": Flux2Transformer2DModel(
            in_channels=4 * architecture.vae["latent_channels"],
            joint_attention_dim=len(architecture.text_layers) * text.hidden_size,
            guidance_embeds=False,
            **architecture.transformer,
        ),
        "text_encoder": Qwen3ForCausalLM(text),
        "vae": AutoencoderKLFlux2(
            down_block_types=levels * ("DownEncoderBlock2D",),
            up_block_types=levels * ("UpDecoderBlock2D",),
            norm_num_groups=8,
            **architecture.vae,
        ),
    }
    generator = torch.Generator().manual_seed(seed)
    for module in modules.values():
        randomize(module, generator)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipeline = Flux2KleinKVPipeline(scheduler=scheduler, tokenizer=tokenizer, **modules)
    pipeline.save_pretrained(folder, max_shard_size=architecture.max_shard_size)
    edit_config(folder / "tokenizer", padding_side=architecture.padding_side)


def load_diffusers(checkpoint: Path, dtype: torch.dtype = torch.float32) -> Flux2KleinKVPipeline:
    """The reference: diffusers' pipeline, without its progress bar."""
    return _load(Flux2KleinKVPipeline, checkpoint, dtype)


def load_plain_diffusers(checkpoint: Path) -> Flux2KleinPipeline:
    """The reference for plain weights, in float32."""
    return _load(Flux2KleinPipeline, checkpoint, torch.float32)


def _load(kind: Any, checkpoint: Path, dtype: torch.dtype) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what third parties warn of while they load
        pipeline = kind.from_pretrained(checkpoint, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def randomize(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Values that keep activations of order one, with no norm or statistic at its identity."""
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            continue
        value = torch.randn(tensor.shape, generator=generator)
        if name == "bn.running_var":
            value = (0.5 * value).exp()
        elif tensor.ndim == 1 and not name.endswith(("bias", "running_mean")):
            value = 1 + 0.2 * value
        elif tensor.ndim == 1:
            value = 0.2 * value
        elif not name.endswith("embed_tokens.weight"):
            value = value / math.sqrt(tensor[0].numel())
        if name.endswith(("o_proj.weight", "down_proj.weight", "decoder.conv_out.weight")):
            # Residual streams of thirty blocks stay small, and pixels mostly inside their range.
            value = 0.4 * value
        tensor.copy_(value)
