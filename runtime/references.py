"""Reference images as the transformer sees them: tokens, positions, and keys and values."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from klein_kv.runtime.backend import Buffer

__all__ = ["ReferenceSet", "grid_ids", "reference_ids", "text_ids"]

REFERENCE_TIME_STEP = 10
"""Reference i sits at T = 10 + 10 * i (diffusers: `_prepare_image_ids`, scale)."""


@dataclass(frozen=True, slots=True)
class ReferenceSet:
    """Keys and values of an ordered set of reference images, on the backend's device.

    They depend on the images, their order, and the weights; not on prompt, seed or size. Made by
    `KleinKVPipeline.encode_references`, valid for the pipeline that made it.

    Attributes:
        kv: `k_ref.{i}` and `v_ref.{i}` of every block, each [1, R, H, D].
        num_tokens: R, tokens of all images together.
        nbytes: bytes of all keys and values.
        first_size: (height, width) of the first image after cropping: the default output size.
        model_digest: the weights they belong to.
    """

    kv: dict[str, Buffer]
    num_tokens: int
    nbytes: int
    first_size: tuple[int, int]
    model_digest: str


def grid_ids(height: int, width: int, time: int = 0) -> NDArray[np.int64]:
    """Positions (T, H, W, L) of a grid of tokens, row by row.

    Source: diffusers, `Flux2KleinKVPipeline._prepare_latent_ids` and `_prepare_image_ids`.

    Returns:
        int64 [height * width, 4].
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
