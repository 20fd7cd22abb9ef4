"""Denoised latents to what the caller asked for."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from klein_kv.artifacts.config import VaeConfig
from klein_kv.artifacts.signature import GRAPH_FILES
from klein_kv.artifacts.weights import graph_weights, map_weight
from klein_kv.errors import BackendError
from klein_kv.runtime.backends.backend import Buffer
from klein_kv.runtime.outputs.finite import is_finite, rows_are_finite
from klein_kv.runtime.session import Session

__all__ = ["decode_latents", "vae_latents"]


def decode_latents(
    backend: Session, latents: Buffer, shape: tuple[int, int, int, int], output_type: str
) -> tuple[Any, bool]:
    """Runs the VAE decoder on tokens [B, S, C] on the device, in grid order `shape` [B, h, w, C].

    Gives PIL images for "pil", for "np" float32 [B, H, W, 3] in 0..1, for "pt" a torch tensor
    [B, 3, H, W] in the artifacts' type (a BackendError without torch); and whether all is finite.
    """
    outputs = backend.run("vae_decoder", {"latents": backend.view(latents, shape)})
    if output_type == "pil":
        pixels = backend.download(outputs["image"])  # uint8, which hides what was not finite
        # PIL's images have memory of their own.
        images = [Image.fromarray(np.array(x)) for x in pixels]
        return images, rows_are_finite(backend, outputs["sample"], pixels.shape[:3])
    sample = backend.download(outputs["sample"])
    finite = is_finite(sample[:, 0, 0])
    if output_type == "np":
        return np.ascontiguousarray(sample.transpose(0, 2, 3, 1), dtype=np.float32), finite
    try:
        import torch
    except ImportError as error:
        raise BackendError(
            "output_type 'pt' needs torch, which is not installed; use 'np'"
        ) from error
    tensor = torch.from_numpy(sample.astype(np.float32))
    return tensor.to(getattr(torch, sample.dtype.name)), finite


def vae_latents(artifacts: Path, config: VaeConfig, tokens: NDArray[Any]) -> NDArray[Any]:
    """Tokens [B, h, w, 4C] to the VAE's latents [B, C, 2h, 2w] (diffusers: "latent")."""
    weights = graph_weights(artifacts, GRAPH_FILES["vae_decoder"])
    mean, var = (map_weight(weights[f"bn.running_{name}"]) for name in ("mean", "var"))
    std = np.sqrt(var + np.asarray(config.batch_norm_eps, var.dtype))
    b, h, w, c = tokens.shape
    z = (tokens * std + mean).reshape(b, h, w, c // 4, 2, 2)
    return np.ascontiguousarray(z.transpose(0, 3, 1, 4, 2, 5).reshape(b, c // 4, 2 * h, 2 * w))
