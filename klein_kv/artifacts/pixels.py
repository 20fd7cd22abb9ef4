"""Reference images as the VAE reads them.

The preparation of a reference is diffusers' to the pixel: the reference K/V, and so every image
made from them, depend on it.
"""

import math
import struct
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from klein_kv.errors import RequestError

__all__ = ["check_reference", "load_image", "prepare_reference"]

MIN_SIDE = 64
MAX_ASPECT = 8
MAX_AREA = 1024 * 1024

# What cameras, browsers and editors write. Other readers of PIL are left out because nobody needs
# them here and a file may choose its reader: EPS, for one, starts another program.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM")

# What PIL's decoders raise on damaged files.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    struct.error,
    Image.DecompressionBombError,
)


def check_reference(image: object) -> None:
    """Refuses what diffusers refuses: no PIL image, a side under 64 pixels, an aspect above 8:1.

    Source: diffusers, `Flux2ImageProcessor.check_image_input`.
    """
    if not isinstance(image, Image.Image):
        raise RequestError(
            f"reference image is a {type(image).__name__}, expected a PIL.Image.Image; "
            "PIL.Image.open reads files, PIL.Image.fromarray takes arrays"
        )
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise RequestError(
            f"reference image is {width}x{height}, expected at least {MIN_SIDE} pixels on each "
            "side; enlarge it first"
        )
    if max(width / height, height / width) > MAX_ASPECT:
        raise RequestError(
            f"reference image is {width}x{height}, {max(width, height) / min(width, height):.2f} "
            f"times as long as wide, expected at most {MAX_ASPECT}:1; crop it first"
        )


def prepare_reference(image: Image.Image, multiple_of: int) -> NDArray[np.uint8]:
    """Resizes and crops a reference image to what the VAE encoder reads: uint8 [1, H, W, 3], RGB.

    An area above 1024x1024 is resized to it, keeping the aspect. Then the centre is cropped to
    whole multiples. Transparency is dropped, not blended, as diffusers does. A `RequestError` as of
    `check_reference`, or if PIL cannot read or convert the image.

    Source: diffusers, `Flux2KleinKVPipeline.__call__` (part 4) and `Flux2ImageProcessor`
    (`_resize_to_target_area`, `_resize_and_crop`). The encoder graph scales x/255*2-1 itself.
    """
    check_reference(image)
    try:
        return _resized_and_cropped(image, multiple_of)
    except RequestError:
        raise
    except _DECODE_ERRORS as error:  # PIL reads files late
        raise RequestError(
            f"reference image (mode {image.mode}) cannot be read or turned into RGB: {error}; "
            "load it anew, or convert it first"
        ) from error


def _resized_and_cropped(image: Image.Image, multiple_of: int) -> NDArray[np.uint8]:
    width, height = image.size
    if width * height > MAX_AREA:
        scale = math.sqrt(MAX_AREA / (width * height))
        size = int(width * scale), int(height * scale)
        image = image.resize(size, Image.Resampling.LANCZOS)
        width, height = image.size
    crop_width = width // multiple_of * multiple_of
    crop_height = height // multiple_of * multiple_of
    if crop_width == 0 or crop_height == 0:
        raise RequestError(
            f"reference image is {width}x{height} after resizing, expected at least "
            f"{multiple_of} pixels on each side"
        )
    left = (width - crop_width) // 2
    top = (height - crop_height) // 2
    image = image.crop((left, top, left + crop_width, top + crop_height)).convert("RGB")
    return np.array(image, dtype=np.uint8)[None]


def load_image(path: str | Path) -> Image.Image:
    """Reads an image file (the first of several frames), upright, in RGB; 16-bit grey as 8-bit.

    A `RequestError` tells of no file, no image, a damaged one, or one of more pixels than
    `PIL.Image.MAX_IMAGE_PIXELS`, which is refused before anything is decoded.
    """
    path = Path(path)
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]  # AVIF is optional in PIL
    try:
        with warnings.catch_warnings():
            # PIL warns between one and two times its limit and raises above: both are too large.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = Image.open(path, formats=formats)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise RequestError(
            f"image is too large: {path}: {error}; make it smaller, a reference of more than "
            "1024x1024 pixels is reduced anyway"
        ) from error
    except FileNotFoundError as error:
        raise RequestError(f"image file does not exist: {path}") from error
    except UnidentifiedImageError as error:
        raise RequestError(
            f"not an image that can be read: {path}; expected {', '.join(formats)}"
        ) from error
    except _DECODE_ERRORS as error:
        raise RequestError(f"image file cannot be read: {path}: {error}") from error
    try:
        with opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
            return _rgb(image)
    except _DECODE_ERRORS as error:
        raise RequestError(
            f"image file is damaged or cut short: {path}: {error}; save or download it again"
        ) from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # PIL's own conversion cuts every value above 255 to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")
