"""The VAE of an artifact folder in float32 on a CPU, whatever type its graphs have.

Calibration and quality measurements need reference tokens and images where no backend runs bfloat16
graphs, and should not depend on the VAE's rounding.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from klein_kv.artifacts.manifest import Manifest
from klein_kv.networks.torch_ops import TorchOps
from klein_kv.networks.vae import vae_decoder, vae_encoder
from klein_kv.runtime.backends.pytorch.weights import FolderWeights

__all__ = ["FloatVae"]


class FloatVae:
    """Encodes reference images and, unless told that nothing `decodes`, decodes latents.

    Raises:
        ArtifactError: the folder does not hold the VAE's weights.
    """

    def __init__(self, artifacts: Path, manifest: Manifest, decodes: bool = True) -> None:
        stored = FolderWeights(artifacts, manifest, device="cpu").load("vae")
        weights = {
            name: tensor.float()
            for name, tensor in stored.items()
            if decodes or not name.startswith("decoder.")
        }
        self._ops, self._config = TorchOps(weights, torch.float32), manifest.config.vae

    def encode(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Reference tokens [1, h, w, C] of pixels [1, H, W, 3]."""
        return vae_encoder(self._ops, self._config, torch.tensor(image)).numpy()

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Images [B, H, W, 3] of latents in grid order [B, h, w, C]."""
        return vae_decoder(self._ops, self._config, torch.tensor(latents))[0].numpy()
