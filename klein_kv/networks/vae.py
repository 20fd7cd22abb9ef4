"""The VAE's two graphs as modules around diffusers' `AutoencoderKLFlux2`.

What diffusers' pipeline does around the VAE is part of them: pixels come and go as uint8 in image
order, latents as the transformer's tokens in grid order (2x2 patches, normalised with the BatchNorm
statistics). Source: `Flux2KleinKVPipeline._encode_vae_image`, `_patchify_latents` and the end of
`__call__`; `VaeImageProcessor.preprocess` and `postprocess`. The exporter traces these modules, the
torch backend runs them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2

from klein_kv.errors import CheckpointError

__all__ = ["VaeDecoder", "VaeEncoder", "build_vae"]


def build_vae(config: Mapping[str, Any], dtype: torch.dtype) -> AutoencoderKLFlux2:
    """diffusers' module for a checkpoint's `vae/config.json`, or a `CheckpointError`.

    Weights are whatever the surrounding context makes of them: random, fake, or on "meta".
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        vae = AutoencoderKLFlux2.from_config(dict(config))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"vae config: diffusers cannot build the model: {error}") from error
    finally:
        torch.set_default_dtype(before)
    return vae.eval()


class _Statistics(torch.nn.Module):
    """Mean and standard deviation of tokens, in the grid layout [B, C, h, w]."""

    def __init__(self, vae: AutoencoderKLFlux2) -> None:
        super().__init__()
        self.vae = vae

    def mean_std(self) -> tuple[torch.Tensor, torch.Tensor]:
        bn = self.vae.bn
        mean = bn.running_mean.view(1, -1, 1, 1)
        std = torch.sqrt(bn.running_var.view(1, -1, 1, 1) + self.vae.config.batch_norm_eps)
        return mean, std


class VaeEncoder(_Statistics):
    """uint8 [1, H, W, 3] -> normalised tokens [1, h, w, C]."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Runs the encoder on one image."""
        mean, std = self.mean_std()
        # TensorRT does nothing but cast uint8: the cast comes first here, and last in the decoder.
        pixels = image.to(torch.float32).permute(0, 3, 1, 2) / 255 * 2 - 1
        # The mode of the latent distribution is its mean, the first half of the moments. Asking the
        # distribution for it exports torch.chunk as a sequence, which TensorRT does not parse.
        moments = self.vae._encode(pixels.to(mean.dtype))
        z = moments[:, : self.vae.config.latent_channels]
        b, c, h, w = z.shape
        z = z.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4)
        z = z.reshape(b, 4 * c, h // 2, w // 2)
        tokens: torch.Tensor = ((z - mean) / std).permute(0, 2, 3, 1)
        return tokens


class VaeDecoder(_Statistics):
    """Tokens [B, h, w, C] -> uint8 [B, H, W, 3] and the same values as [B, 3, H, W] in 0..1."""

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the decoder on a batch."""
        mean, std = self.mean_std()
        z = latents.permute(0, 3, 1, 2) * std + mean
        b, c, h, w = z.shape
        z = z.reshape(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)
        z = z.reshape(b, c // 4, 2 * h, 2 * w)
        sample = (self.vae.decode(z, return_dict=False)[0] * 0.5 + 0.5).clamp(0, 1)
        pixels = (sample.to(torch.float32) * 255).round().permute(0, 2, 3, 1)
        return pixels.to(torch.uint8), sample
