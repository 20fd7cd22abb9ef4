"""The GPU suite's networks, with random weights drawn on the device, and what is asked of them.

Every module and every backend uses the same tensors: weights are on the device once per data type.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import Flux2KleinKVPipeline, Flux2KleinPipeline
from PIL import Image

from klein_kv.config import ModelConfig, TextEncoderConfig, TransformerConfig, VaeConfig
from klein_kv.export.random_model import (
    SIZES,
    FixtureSize,
    fill_random,
    make_scheduler,
    transformer_on_meta,
    vae_on_meta,
)

__all__ = ["SUITE_SIZES", "Networks", "Scene", "SuiteSize", "make_pipeline", "make_scene"]

PIPELINES = {"kv": Flux2KleinKVPipeline, "plain": Flux2KleinPipeline}
# Random embeddings as strong as a text encoder's: see `context_embedder` in `random_model`.
TEXT_SCALE = 4.0


@dataclass(frozen=True, slots=True)
class SuiteSize:
    """What is measured at one size of the networks.

    Attributes:
        shapes: a key of `random_model.SIZES`.
        outputs: sides of the square outputs in pixels, the most important first.
        reference: side of the square references in pixels.
        references: how many references, the most important count first.
        text_tokens: length of the prompt.
        matmul: side of the square matrix product that the peak is read from.
    """

    shapes: str
    outputs: tuple[int, ...]
    reference: int
    references: tuple[int, ...]
    text_tokens: int
    matmul: int


SUITE_SIZES = {
    "9b": SuiteSize("9b-shapes", (1024, 512), 1024, (4, 1, 2, 0), 512, 8192),
    "tiny": SuiteSize("tiny", (256, 128), 128, (4, 1, 2, 0), 32, 512),
}


class Networks:
    """Denoiser and autoencoder with random weights on one device.

    Args:
        shapes: their size.
        device: where the weights are drawn, tensor by tensor.
        seed: of the weights. Devices draw different numbers from it.
        dtype: type of the weights.
    """

    def __init__(
        self,
        shapes: FixtureSize,
        device: torch.device,
        seed: int,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.shapes = shapes
        self.device = device
        self.dtype = dtype
        generator = torch.Generator(device).manual_seed(seed)
        transformer = transformer_on_meta(shapes, dtype).to_empty(device=device)
        fill_random(transformer, generator)
        self.state: dict[str, torch.Tensor] = transformer.state_dict()
        self.vae = vae_on_meta(shapes, dtype).to_empty(device=device).requires_grad_(False)
        fill_random(self.vae, generator)
        self.config = ModelConfig(
            TransformerConfig.from_dict(transformer.config),
            _text_config(shapes),
            VaeConfig.from_dict(self.vae.config),
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of the denoiser."""
        return sum(tensor.nbytes for tensor in self.state.values())

    @property
    def parameters(self) -> int:
        """Parameters of the denoiser."""
        return sum(tensor.numel() for tensor in self.state.values())

    def transformer(self, state: dict[str, torch.Tensor] | None = None) -> Any:
        """diffusers' module on these weights, without a copy; attention processors are its own."""
        state = state or self.state
        dtype = next(iter(state.values())).dtype
        module = transformer_on_meta(self.shapes, dtype)
        module.load_state_dict(state, assign=True)
        return module.requires_grad_(False)

    def float32_state(self) -> dict[str, torch.Tensor]:
        """The same weights in float32: new tensors."""
        return {name: tensor.float() for name, tensor in self.state.items()}


@dataclass(frozen=True, slots=True)
class Scene:
    """One request, the same for everyone. Tensors are bfloat16 on the device.

    Attributes:
        output: side of the output in pixels.
        images: references, as diffusers takes them.
        noise: [1, C, h, w].
        text: [1, T, D].
        ref_tokens: encoded references [1, R, C], and their positions as diffusers gives them,
            [1, R, 4]; None without references.
    """

    output: int
    images: list[Image.Image]
    noise: torch.Tensor
    text: torch.Tensor
    ref_tokens: tuple[torch.Tensor, torch.Tensor] | None

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes as `klein_kv.flops` takes them."""
        return {
            "batch": 1,
            "image_tokens": self.noise.shape[2] * self.noise.shape[3],
            "text_tokens": self.text.shape[1],
            "ref_tokens": 0 if self.ref_tokens is None else self.ref_tokens[0].shape[1],
        }


def make_pipeline(kind: str, transformer: Any, vae: Any) -> Any:
    """diffusers' "kv" or "plain" pipeline without a text encoder."""
    options = {"is_distilled": True} if kind == "plain" else {}
    pipe = PIPELINES[kind](
        scheduler=make_scheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        **options,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_scene(networks: Networks, size: SuiteSize, output: int, references: int) -> Scene:
    """Noise, prompt embeddings and references from a fixed seed; references through the VAE."""
    device, unit = networks.device, networks.config.vae.multiple_of
    net = networks.config.transformer
    generator = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(networks.dtype)

    noise = normal(1, net.in_channels, output // unit, output // unit)
    text = TEXT_SCALE * normal(1, size.text_tokens, net.joint_attention_dim)
    images = [_picture(size.reference, seed) for seed in range(references)]
    encoded = None
    if images:
        pipe = make_pipeline("plain", networks.transformer(), networks.vae)
        pixels = [
            pipe.image_processor.preprocess(image, height=image.height, width=image.width)
            for image in images
        ]
        encoded = pipe.prepare_image_latents(
            images=pixels,
            batch_size=1,
            generator=None,
            device=device,
            dtype=networks.dtype,
        )
    return Scene(output, images, noise, text, encoded)


def _picture(side: int, seed: int) -> Image.Image:
    """A smooth random picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def _text_config(shapes: FixtureSize) -> TextEncoderConfig:
    """The text encoder that would fit; none is run."""
    return TextEncoderConfig(
        hidden_size=shapes.text_hidden,
        intermediate_size=shapes.text_intermediate,
        num_hidden_layers=shapes.text_layers,
        num_attention_heads=shapes.text_heads,
        num_key_value_heads=shapes.text_kv_heads,
        head_dim=shapes.text_head_dim,
        vocab_size=shapes.text_vocabulary,
        rope_theta=1_000_000.0,
        rms_norm_eps=1e-6,
    )


def fixture_shapes(size: SuiteSize) -> FixtureSize:
    """The shapes of a suite size."""
    return SIZES[size.shapes]
