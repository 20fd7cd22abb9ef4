"""The VAE of an artifact folder in float32 on a CPU, whatever type its graphs have.

Calibration and quality measurements need reference tokens and images where no backend runs bfloat16
graphs, and should not depend on the VAE's rounding.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from klein_kv.artifacts.config import read_json
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.weights import WeightRef, graph_weights
from klein_kv.errors import ArtifactError, CheckpointError
from klein_kv.export.checks.artifact_weights import MappedWeights
from klein_kv.networks.vae import VaeDecoder, VaeEncoder, build_vae

__all__ = ["FloatVae"]


class FloatVae:
    """Encodes reference images and decodes latents.

    Raises:
        ArtifactError: the folder does not hold the VAE's weights or its configuration.
    """

    def __init__(self, artifacts: Path, manifest: Manifest) -> None:
        refs: dict[str, WeightRef] = {}
        for graph in ("vae_encoder", "vae_decoder"):
            refs |= graph_weights(artifacts, manifest.graphs.files[graph])
        try:
            with torch.device("meta"):
                vae = build_vae(
                    read_json(artifacts / "vae/config.json", "vae config"), torch.float32
                )
            tensors = dict(MappedWeights(refs, torch.float32))
            vae.load_state_dict(tensors, strict=False, assign=True)
        except (CheckpointError, RuntimeError) as error:
            raise ArtifactError(
                f"{artifacts}: the VAE cannot be built: {error}; export again"
            ) from error
        vae.requires_grad_(False)
        self._encoder, self._decoder = VaeEncoder(vae), VaeDecoder(vae)

    def encode(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Reference tokens [1, h, w, C] of pixels [1, H, W, 3]."""
        tokens: NDArray[np.float32] = self._encoder(torch.tensor(image)).numpy()
        return tokens

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Images [B, H, W, 3] of latents in grid order [B, h, w, C]."""
        images: NDArray[np.uint8] = self._decoder(torch.tensor(latents))[0].numpy()
        return images
