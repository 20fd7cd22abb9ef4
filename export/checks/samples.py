"""Requests to calibrate and to measure with: the user's images and prompts, or made-up ones.

Made-up images have the statistics of photographs as far as is known to matter: amplitudes that fall
with frequency (D. J. Field, "Relations between the statistics of natural images and the response
properties of cortical cells", 1987), correlated colours, flat regions and hard edges.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from klein_kv.artifacts.pixels import load_image
from klein_kv.errors import RequestError
from klein_kv.runtime.inputs.prompts import read_prompts

__all__ = ["PROMPTS", "Sample", "made_up_image", "make_samples"]

PROMPTS = (
    "a red kite over the sea, photograph",
    "make the room look as it would at night, lit by a single lamp",
    "turn this into a watercolour painting with visible brush strokes",
    "a close-up portrait of an old fisherman, shallow depth of field, 85mm",
    "put the object of the first picture on the table of the second one",
    "the word KLEIN in large white letters on a brick wall",
    "remove the people in the background and keep everything else as it is",
    "a plate of noodles from above, steam, studio light, very detailed",
    "change the season to winter; snow on the roofs and on the ground",
    "isometric drawing of a small harbour town, flat colours",
    "the same product on a plain white background, soft shadow",
    "a dog",
)
"""Prompts of made-up requests: edits and descriptions, short and long."""

_SIZE = (512, 512)
_REFERENCES = (1, 2, 0)  # how many images the first, second, third, ... request has
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".ppm")


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: text, reference images in order, pixels of the output, seed of the noise."""

    prompt: str
    images: tuple[Image.Image, ...]
    width: int
    height: int
    seed: int


def make_samples(
    count: int,
    *,
    images: Path | None = None,
    prompts: Path | None = None,
    size: tuple[int, int] | None = None,
    seed: int = 0,
) -> list[Sample]:
    """Requests with one, two and no reference images in turn; the same for the same arguments.

    Args:
        count: how many.
        images: folder of reference images, used in the order of their names; None makes some up.
        prompts: file with one prompt per line; None takes `PROMPTS`.
        size: width and height of the output; None takes the first reference's, or 512x512.
        seed: of noise and made-up images.

    Raises:
        RequestError: nothing to be found there, or a count below 1.
    """
    if count < 1:
        raise RequestError(f"samples is {count}, expected 1 or more")
    texts = PROMPTS if prompts is None else read_prompts(prompts)
    files = None if images is None else _image_files(images)
    samples, used = [], 0
    for i in range(count):
        width, height = size or _SIZE
        number = _REFERENCES[i % len(_REFERENCES)]
        if files is None:
            pictures = [made_up_image(width, height, seed + used + j) for j in range(number)]
        else:
            pictures = [load_image(files[(used + j) % len(files)]) for j in range(number)]
            if pictures and size is None:  # at most 1024x1024 pixels, whole multiples of 16
                width, height = pictures[0].size
                scale = min(1.0, (1024 * 1024 / (width * height)) ** 0.5)
                width, height = (max(128, int(x * scale) // 16 * 16) for x in (width, height))
        used += number
        samples.append(Sample(texts[i % len(texts)], tuple(pictures), width, height, seed + i))
    return samples


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise RequestError(f"images {folder} is no folder; expected one with image files")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    if not files:
        raise RequestError(
            f"images {folder} holds no image; expected files that end in {', '.join(_SUFFIXES)}"
        )
    return files


def made_up_image(width: int, height: int, seed: int) -> Image.Image:
    """A picture of smooth variation, texture and edges; the same numbers, the same picture."""
    rng = np.random.default_rng([seed, width, height])
    # Three colours that mostly go together, as in photographs.
    fields = np.stack([_pink_noise(width, height, rng) for _ in range(3)], axis=-1)
    colours = np.full((3, 3), 0.55) + 0.45 * np.eye(3)
    pixels = fields @ colours * rng.uniform(30, 60) + rng.uniform(80, 170)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(3, 9))):
        x, y = rng.integers(0, width), rng.integers(0, height)
        w, h = rng.integers(width // 20 + 2, width // 3 + 3), rng.integers(4, height // 3 + 5)
        box = (int(x), int(y), int(x + w), int(y + h))
        fill = tuple(int(value) for value in rng.integers(0, 256, 3))
        shape = (draw.ellipse, draw.rectangle)[int(rng.integers(2))]
        shape(box, fill=fill)
    return image


def _pink_noise(width: int, height: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Noise [H, W] whose amplitude falls as 1 / frequency; mean 0, standard deviation 1."""
    spectrum = np.fft.rfft2(rng.standard_normal((height, width)))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    noise = np.fft.irfft2(spectrum / frequency, s=(height, width))
    deviation: NDArray[np.float64] = noise / noise.std()
    return deviation
