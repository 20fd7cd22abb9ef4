"""Positions (T, H, W, L) of tokens: what `img_ids`, `txt_ids` and `ref_ids` of the graphs hold."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["MAX_OUTPUT_AREA", "grid_ids", "reference_ids", "text_ids"]

MAX_OUTPUT_AREA = 2048 * 2048
"""Pixels of the largest output, 4 megapixels (Black Forest Labs: FLUX.2 documentation)."""

REFERENCE_TIME_STEP = 10
"""Reference i sits at T = 10 + 10 * i (diffusers: `_prepare_image_ids`, scale)."""


def grid_ids(height: int, width: int, time: int = 0) -> NDArray[np.int64]:
    """Positions (T, H, W, L) of a grid of tokens, row by row: int64 [height * width, 4].

    Source: diffusers, `Flux2KleinKVPipeline._prepare_latent_ids` and `_prepare_image_ids`.
    """
    ids = np.zeros((height, width, 4), np.int64)
    ids[..., 0] = time
    ids[..., 1] = np.arange(height)[:, None]
    ids[..., 2] = np.arange(width)
    return ids.reshape(-1, 4)


def reference_ids(grids: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """Positions of all references' tokens, one image after the other: int64 [R, 4]."""
    return np.concatenate(
        [
            grid_ids(height, width, REFERENCE_TIME_STEP * (i + 1))
            for i, (height, width) in enumerate(grids)
        ]
    )


def text_ids(length: int) -> NDArray[np.int64]:
    """Positions of text tokens, counted along L: int64 [T, 4]."""
    ids = np.zeros((length, 4), np.int64)
    ids[:, 3] = np.arange(length)
    return ids
