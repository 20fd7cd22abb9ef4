"""ComfyUI's images and ours."""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from klein_kv.errors import RequestError

__all__ = ["image_from_made", "pictures_from_image"]


def pictures_from_image(image: torch.Tensor) -> list[Image.Image]:
    """PIL images of an IMAGE, float [B, H, W, C] in 0..1 with C of 1, 3 or 4.

    Raises:
        RequestError: another shape.
    """
    if image.ndim != 4 or image.shape[3] not in (1, 3, 4) or 0 in image.shape:
        raise RequestError(
            f"the image has shape {tuple(image.shape)}, expected [batch, height, width, 3]"
        )
    # Rounded: a pixel of a file, divided by 255, may come back a little below a whole number.
    pixels = (image.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return [Image.fromarray(x[..., 0] if x.shape[2] == 1 else x) for x in pixels]


def image_from_made(made: NDArray[np.float32] | list[Image.Image]) -> torch.Tensor:
    """An IMAGE of float32 [B, H, W, 3] in 0..1, or of PIL images of one size."""
    if isinstance(made, list):
        made = np.stack([np.asarray(x, np.float32) for x in made]) / np.float32(255)
    return torch.from_numpy(made)
