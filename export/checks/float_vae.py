"""The VAE of an artifact folder in float32 on a CPU, whatever type its graphs have.

Calibration and quality measurements need reference tokens and images where no backend runs bfloat16
graphs, and should not depend on the VAE's rounding.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from klein_kv.artifacts.manifest import Manifest
from klein_kv.networks.vae import VaeDecoder, VaeEncoder
from klein_kv.runtime.backends.pytorch.weights import FolderWeights

__all__ = ["FloatVae"]


class FloatVae:
    """Encodes reference images and decodes latents.

    Raises:
        ArtifactError: the folder does not hold the VAE's weights or its configuration.
    """

    def __init__(self, artifacts: Path, manifest: Manifest) -> None:
        vae = FolderWeights(artifacts, manifest, device="cpu").load("vae").float()
        self._encoder, self._decoder = VaeEncoder(vae), VaeDecoder(vae)

    def encode(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Reference tokens [1, h, w, C] of pixels [1, H, W, 3]."""
        tokens: NDArray[np.float32] = self._encoder(torch.tensor(image)).numpy()
        return tokens

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Images [B, H, W, 3] of latents in grid order [B, h, w, C]."""
        images: NDArray[np.uint8] = self._decoder(torch.tensor(latents))[0].numpy()
        return images
