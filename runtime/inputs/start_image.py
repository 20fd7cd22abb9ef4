"""The image that an edit starts from, in place of noise alone, and how far back it starts."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from klein_kv.artifacts.pixels import MAX_AREA
from klein_kv.errors import RequestError
from klein_kv.runtime.inputs.masks import (
    Box,
    check_mask,
    crop_box,
    fit,
    mask_pixels,
    mask_tokens,
)
from klein_kv.schedule import Schedule

__all__ = ["Crop", "StartImage", "make_start", "size_of"]


@dataclass(frozen=True, slots=True, eq=False)
class StartImage:
    """What an edit starts from; it is the first reference too.

    Attributes:
        pixels: uint8 [1, H, W, 3], as the VAE reads it; H and W are those of the output.
        mask: float32 [n, S, 1], 1 for tokens that are made anew; None for all. n divides the batch.
        strength: part of the schedule that is run, 0 to 1.
        noised: whether the first latents are this image with noise; else they are the caller's.

    Raises:
        RequestError: a strength out of range, or an area above 1024x1024.
    """

    pixels: NDArray[np.uint8]
    mask: NDArray[np.float32] | None = None
    strength: float = 1.0
    noised: bool = True

    def __post_init__(self) -> None:
        known = isinstance(self.strength, int | float | np.number)
        if not known or not 0 <= self.strength <= 1:
            raise RequestError(f"strength is {self.strength!r}, expected a number in 0..1")
        _, height, width, _ = self.pixels.shape
        if height * width > MAX_AREA:
            raise RequestError(
                f"output is {width}x{height}, expected at most the area of 1024x1024: the image is "
                "a reference too"
            )

    def shortened(self, schedule: Schedule) -> Schedule:
        """The end of a schedule, which is what is run.

        Source: diffusers, `Flux2KleinInpaintPipeline.get_timesteps`.

        Raises:
            RequestError: nothing is left of it.
        """
        steps = schedule.num_steps
        begin = int(max(steps - min(steps * float(self.strength), steps), 0))
        if begin == steps:
            raise RequestError(
                f"strength is {self.strength}, which leaves none of {steps} steps; expected more "
                f"than 0, such as {1 / steps:.2g} for one step"
            )
        return Schedule(schedule.sigmas[begin:].copy())

    def mixes(self, schedule: Schedule) -> bool:
        """Whether the first latents are a mixture, on the schedule that is run."""
        return self.noised and bool(schedule.sigmas[0] < 1)

    def blends(self, schedule: Schedule, batch: int) -> bool:
        """Whether latents are mixed with the image at all.

        Raises:
            RequestError: a number of masks that does not divide the batch.
        """
        if self.mask is None:
            return self.mixes(schedule)
        if batch % len(self.mask):
            raise RequestError(
                f"{len(self.mask)} masks for a batch of {batch}; expected one, or one each"
            )
        return True


class Crop(NamedTuple):
    """A region that was worked on, and what it is laid back on; sizes are the original's."""

    original: Image.Image
    mask: Image.Image  # mode L
    box: Box


def size_of(image: Image.Image, unit: int) -> tuple[int, int]:
    """Height and width that an image is worked on at, in whole tokens of `unit` pixels a side.

    Source: diffusers, `Flux2KleinInpaintPipeline.__call__` (part 2).
    """
    width, height = _reduced(image)
    return height // unit * unit, width // unit * unit


def _reduced(image: Image.Image) -> tuple[int, int]:
    """Width and height, after an area above 1024x1024 was made smaller."""
    width, height = image.size
    if width * height <= MAX_AREA:
        return image.size
    scale = math.sqrt(MAX_AREA / (width * height))
    return int(width * scale), int(height * scale)


def make_start(
    image: Image.Image,
    mask: Any,
    size: tuple[int, int],
    unit: int,
    *,
    strength: float,
    noised: bool,
    padding: int | None,
    blur: float,
    overlay: bool,
) -> tuple[StartImage, list[Crop]]:
    """Prepares image and mask; nothing is computed yet.

    A region is cut out of the image as it came; diffusers makes that smaller first.

    Args:
        image: mode RGB.
        mask: see `mask_pixels`; None for all of it.
        size: height and width to work at, whole tokens.
        unit: pixels of a token's side.
        strength: see `StartImage`.
        noised: see `StartImage`.
        padding: works on the region of the mask alone, with so many pixels around it.
        blur: radius in pixels of a Gaussian blur of the mask.
        overlay: without `padding` too, what is made is laid over the image, of the size to work at.

    Returns:
        Where to start; and what results are laid back on, one for each mask, or none.

    Raises:
        RequestError: a mask or a size that cannot be worked with.
    """
    height, width = size
    if not isinstance(blur, int | float) or not blur >= 0:
        raise RequestError(f"mask_blur is {blur!r}, expected a radius of 0 or more pixels")
    if blur:
        mask = check_mask(mask).convert("L").filter(ImageFilter.GaussianBlur(blur))
    if padding is None:
        shown = None if mask is None else mask_pixels(mask, size)
        tokens = None if shown is None else mask_tokens(shown, unit)
        reduced = image.resize(_reduced(image), Image.Resampling.LANCZOS)
        pixels = np.array(reduced.resize((width, height), Image.Resampling.LANCZOS))
        crops = []
        if overlay and shown is not None:
            masks = [Image.fromarray(np.uint8((x * 255).round())) for x in shown]
            crops = [Crop(Image.fromarray(pixels), x, (0, 0, width, height)) for x in masks]
        return StartImage(pixels[None], tokens, strength, noised), crops
    if not isinstance(padding, int) or isinstance(padding, bool) or padding < 0:
        raise RequestError(f"padding_mask_crop is {padding!r}, expected 0 or more pixels")
    mask = check_mask(mask)
    if mask.size != image.size:
        mask = mask.resize(image.size, Image.Resampling.LANCZOS)
    crop = Crop(image, mask.convert("L"), crop_box(mask.convert("L"), size, padding))
    pixels = np.array(fit(image.crop(crop.box), size))
    tokens = mask_tokens(mask_pixels(crop.mask, size, crop.box), unit)
    return StartImage(pixels[None], tokens, strength, noised), [crop]
