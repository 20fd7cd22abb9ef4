"""The matrix that previews are made with: where it lies, and its shape."""

from klein_kv.artifacts.config import VaeConfig

__all__ = ["PREVIEW", "SIDE", "preview_shape"]

PREVIEW = "vae/preview.npy"
"""File of an artifact folder; folders of before there were previews have none."""

SIDE = 4
"""Pixels of a preview per token and side."""


def preview_shape(config: VaeConfig) -> tuple[int, int]:
    """float32 [C + 1, SIDE * SIDE * 3]: a row per channel of a token, and what is added.

    A column is a pixel's red, green or blue in 0..1, in the order of an image's rows.
    """
    return config.token_channels + 1, SIDE * SIDE * 3
