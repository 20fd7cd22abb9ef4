"""Masks: which tokens are made anew, and the region around them that is worked on alone.

Sources: diffusers, `Flux2KleinInpaintPipeline.prepare_mask_latents`, and `VaeImageProcessor`
(`get_crop_region`, `_resize_and_fill`, `binarize`, `apply_overlay`) in image_processor.py.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from klein_kv.errors import RequestError

__all__ = ["Box", "check_mask", "crop_box", "fit", "lay_back", "mask_pixels", "mask_tokens"]

Box = tuple[int, int, int, int]
"""Left, top, right and bottom of a region, in pixels."""

_DEEP = ("I", "F")  # modes of PIL with more than 8 bits


def check_mask(mask: object) -> Image.Image:
    """Refuses what is no PIL image of 8 bits; a mask of PIL as it is."""
    if not isinstance(mask, Image.Image) or mask.mode.startswith(_DEEP):
        got = f"image of mode {mask.mode}" if isinstance(mask, Image.Image) else type(mask).__name__
        raise RequestError(f"mask_image is a {got}, expected a PIL image of mode L, 1 or RGB")
    return mask


def mask_tokens(pixels: NDArray[Any], unit: int) -> NDArray[np.float32]:
    """How much of each token is made anew: [n, S, 1] of 0, 1/4, 1/2, 3/4 or 1, for n masks.

    Pixels [n, H, W] of 0.5 and more count as 1; a token, of `unit` pixels a side, has the mean of
    the four in its middle.
    """
    count, height, width = pixels.shape
    cells = (pixels >= 0.5).reshape(count, height // unit, unit, width // unit, unit)
    middle = slice(unit // 2 - 1, unit // 2 + 1)
    means: NDArray[np.float32] = cells[:, :, middle, :, middle].mean((2, 4), np.float32)
    return means.reshape(count, -1, 1)


def mask_pixels(mask: Any, size: tuple[int, int], box: Box | None = None) -> NDArray[Any]:
    """Masks [n, H, W] in 0..1, as large as the image that is worked on.

    Args:
        mask: a PIL image, white where the image changes; numpy [H, W], [B, H, W] or [B, H, W, 1] or
            torch [B, 1, H, W], of truth values or numbers in 0..1; or a list of any of these.
        size: height and width of that image.
        box: the region of a PIL mask, mode L, that becomes this image.

    Raises:
        RequestError: something else.
    """
    masks = mask if isinstance(mask, list | tuple) else [mask]
    if not masks:
        raise RequestError("mask_image is an empty list, expected at least one mask")
    return np.concatenate([_pixels(one, size, box) for one in masks])


def _pixels(mask: Any, size: tuple[int, int], box: Box | None) -> NDArray[Any]:
    """Masks [n, H, W] in 0..1, resized to `size`."""
    height, width = size
    if isinstance(mask, Image.Image):
        check_mask(mask)
        if box is None:
            whole = mask.resize((width, height), Image.Resampling.LANCZOS)
        else:
            whole = fit(mask.crop(box), size)
        return np.asarray(whole.convert("L"), np.float32)[None] / 255
    if hasattr(mask, "detach"):
        mask = mask.detach().cpu().float().numpy()
    array = np.asarray(mask)
    if array.ndim == 4 and array.shape[1] == 1:
        array = array[:, 0]
    elif array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    elif array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or 0 in array.shape:
        raise RequestError(
            f"mask_image is a {type(mask).__name__} of shape {array.shape}, expected a PIL image, "
            "or an array [H, W], [B, H, W], [B, 1, H, W] or [B, H, W, 1]"
        )
    # False for NaN too.
    if array.dtype.kind not in "bf" or not ((array >= 0) & (array <= 1)).all():
        raise RequestError(
            f"mask_image holds {array.dtype} values, expected truth values or numbers in 0..1; "
            "compare it, as in mask > 127"
        )
    rows, columns = (_nearest(*sides) for sides in zip(array.shape[1:], size, strict=True))
    return array[:, rows[:, None], columns]


def _nearest(before: int, after: int) -> NDArray[np.intp]:
    """Which of `before` rows stands for each of `after`, as torch's "nearest" has it."""
    step = np.float32(before) / np.float32(after)
    return np.minimum((np.arange(after, dtype=np.float32) * step).astype(np.intp), before - 1)


def crop_box(mask: Image.Image, size: tuple[int, int], padding: int) -> Box:
    """The region around everything that is not black, with the proportions of `size`.

    Args:
        mask: mode L.
        size: height and width that the region will be worked on at.
        padding: pixels that are added on each side.

    Raises:
        RequestError: all of it is black.
    """
    marked = np.asarray(mask) > 0
    columns, rows = np.flatnonzero(marked.any(axis=0)), np.flatnonzero(marked.any(axis=1))
    if not columns.size:
        raise RequestError("mask_image is black, expected something white to crop around")
    left, right = max(columns[0] - padding, 0), min(columns[-1] + 1 + padding, mask.width)
    top, bottom = max(rows[0] - padding, 0), min(rows[-1] + 1 + padding, mask.height)
    ratio = size[1] / size[0]
    if (right - left) / (bottom - top) > ratio:
        top, bottom = _widened(top, bottom, (right - left) / ratio, mask.height)
    else:
        left, right = _widened(left, right, (bottom - top) * ratio, mask.width)
    return int(left), int(top), int(right), int(bottom)


def _widened(low: int, high: int, wanted: float, limit: int) -> tuple[int, int]:
    """A stretch of `wanted` around another one, moved and then cut to lie within 0 and `limit`."""
    more = int(wanted - (high - low))
    low, high = low - more // 2, high + more - more // 2
    if high > limit:
        low, high = low - (high - limit), limit
    if low < 0:
        low, high = 0, high - low
    return low, min(high, limit)


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """An image made as large as fits into `size`, in the middle; its edges fill what is left."""
    height, width = size
    wide = width / height < image.width / image.height
    inner_width = width if wide else image.width * height // image.height
    inner_height = image.height * width // image.width if wide else height
    inner = image.resize((inner_width, inner_height), Image.Resampling.LANCZOS)
    left, top = width // 2 - inner_width // 2, height // 2 - inner_height // 2
    whole = Image.new(image.mode, (width, height))
    whole.paste(inner, (left, top))
    if top:
        for edge, at in ((0, 0), (inner_height, top + inner_height)):
            whole.paste(inner.resize((width, top), box=(0, edge, width, edge)), (0, at))
    elif left:
        for edge, at in ((0, 0), (inner_width, left + inner_width)):
            whole.paste(inner.resize((left, height), box=(edge, 0, edge, height)), (at, 0))
    return whole


def lay_back(
    result: Image.Image, original: Image.Image, mask: Image.Image, box: Box
) -> Image.Image:
    """Lays what was made of a region over the original where the mask, mode L, is white."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    # As large as covers the region; what is beyond it is cut on both sides.
    wide = width / height > result.width / result.height
    scaled_width = width if wide else result.width * height // result.height
    scaled_height = result.height * width // result.width if wide else height
    scaled = result.resize((scaled_width, scaled_height), Image.Resampling.LANCZOS)
    region = Image.new("RGB", (width, height))
    region.paste(scaled, (width // 2 - scaled_width // 2, height // 2 - scaled_height // 2))
    whole = Image.new("RGB", original.size)
    whole.paste(region, (left, top))
    return Image.composite(whole, original, mask)
