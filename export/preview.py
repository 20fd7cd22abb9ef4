"""The matrix of previews, fitted to a checkpoint's VAE by least squares."""

import logging
from pathlib import Path

import numpy as np
from PIL import Image

from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.preview_matrix import PREVIEW, SIDE, preview_shape
from klein_kv.export.checks.float_vae import FloatVae
from klein_kv.export.checks.samples import made_up_image

__all__ = ["save_preview_matrix"]

_log = logging.getLogger(__name__)

# On pocket, previews of photographs have 27 dB against the decoded image made as small; from
# decoded random latents in place of encoded images 20 dB, at 8x8 pixels a token 25 dB.
_IMAGES, _PIXELS = 3, 192  # 1.2 s an image for klein's own VAE on one core
_RIDGE = 1e-3  # of the channels' variance, which is about 1


def save_preview_matrix(folder: Path, manifest: Manifest) -> None:
    """Encodes a few made-up images, and writes what best maps their tokens to their pixels."""
    config, vae = manifest.config.vae, FloatVae(folder, manifest, decodes=False)
    unit = config.multiple_of
    pixels = -(-_PIXELS // unit) * unit
    inputs, targets = [], []
    for seed in range(_IMAGES):
        image = made_up_image(pixels, pixels, seed)
        tokens = vae.encode(np.asarray(image)[None])[0]
        h, w, channels = tokens.shape  # grid order
        small = image.resize((w * SIDE, h * SIDE), Image.Resampling.BOX)
        squares = np.asarray(small, np.float64).reshape(h, SIDE, w, SIDE, 3) / 255
        squares = squares.transpose(0, 2, 1, 3, 4)
        inputs.append(tokens.reshape(h * w, channels).astype(np.float64))
        targets.append(squares.reshape(h * w, -1))
    x, y = np.concatenate(inputs), np.concatenate(targets)
    if not np.isfinite(x).all():
        _log.warning("the VAE's latents are not finite: no previews")
        return
    x_mean, y_mean = x.mean(axis=0), y.mean(axis=0)
    centred = x - x_mean
    ridge = _RIDGE * len(x) * np.eye(len(x_mean))
    matrix = np.linalg.solve(centred.T @ centred + ridge, centred.T @ (y - y_mean))
    matrix = np.concatenate([matrix, [y_mean - x_mean @ matrix]]).astype(np.float32)
    assert matrix.shape == preview_shape(config)  # noqa: S101 - ours
    np.save(folder / PREVIEW, matrix, allow_pickle=False)
