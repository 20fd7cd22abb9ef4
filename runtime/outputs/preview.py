"""Latents to small pictures without the VAE: one matrix, fitted to it at export.

A token is 16x16 pixels of the image; its channels, linearly mapped, give the mean colours of 4x4
squares of them.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.preview_matrix import PREVIEW, SIDE, preview_shape
from klein_kv.errors import ArtifactError, RequestError

__all__ = ["Previews"]

_LONGEST = 512  # pixels of a preview's longer side; never more than the image has
_LARGEST = 100.0  # latents are of order one; what broke is shown, without a warning of numpy's


class Previews:
    """Makes previews with the matrix of one artifact folder, read at the first one."""

    def __init__(self, artifacts: Path, manifest: Manifest) -> None:
        self._artifacts = artifacts
        self._listed = PREVIEW in manifest.files
        self._shape = preview_shape(manifest.config.vae)
        self._unit = manifest.config.vae.multiple_of
        self._matrix: NDArray[np.float32] | None = None

    def make(self, latents: NDArray[Any]) -> list[Image.Image]:
        """One picture for each image of latents [B, C, h, w]; see `KleinKVPipeline.preview`."""
        matrix, latents = self._read(), np.asarray(latents)
        channels = self._shape[0] - 1
        if latents.ndim != 4 or latents.shape[1] != channels or 0 in latents.shape:
            raise RequestError(
                f"latents to preview have shape {latents.shape}, expected [batch, {channels}, "
                f"height / {self._unit}, width / {self._unit}]: what a callback gets as 'denoised'"
            )
        batch, _, rows, columns = latents.shape
        tokens = latents.astype(np.float32).transpose(0, 2, 3, 1)  # [B, h, w, C]
        tokens = np.clip(np.nan_to_num(tokens), -_LARGEST, _LARGEST)
        squares = (tokens @ matrix[:-1] + matrix[-1]).reshape(batch, rows, columns, SIDE, SIDE, 3)
        pixels = squares.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * SIDE, columns * SIDE, 3)
        small = np.clip(pixels * 255 + 0.5, 0, 255).astype(np.uint8)
        scale = min(self._unit, _LONGEST / max(rows, columns))
        size = round(columns * scale), round(rows * scale)
        return [Image.fromarray(x).resize(size, Image.Resampling.BILINEAR) for x in small]

    def _read(self) -> NDArray[np.float32]:
        if self._matrix is None:
            path = self._artifacts / PREVIEW
            if not self._listed:
                raise ArtifactError(
                    f"{path} does not exist: the folder was exported before there were previews; "
                    "export the checkpoint again"
                )
            matrix = np.load(path, allow_pickle=False)
            if matrix.shape != self._shape or matrix.dtype != np.float32:
                raise ArtifactError(
                    f"{path} holds {matrix.dtype} {matrix.shape}, expected float32 {self._shape}; "
                    "export the checkpoint again"
                )
            self._matrix = matrix
        return self._matrix
