"""Reference images as the VAE reads them.

The preparation of a plain RGB image is diffusers' to the pixel: the reference K/V, and so every
image made from them, depend on it. Deep grey, transparency and colours under another profile than
sRGB are read better than there; docs/images.md has the rules.
"""

import contextlib
import io
import logging
import math
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageColor, ImageOps, UnidentifiedImageError

from klein_kv.errors import RequestError

__all__ = [
    "MAX_AREA",
    "check_matte",
    "check_reference",
    "load_image",
    "prepare_reference",
    "to_rgb",
]

_log = logging.getLogger(__name__)

MIN_SIDE = 64
MAX_ASPECT = 8
MAX_AREA = 1024 * 1024

_READ_WHOLE = 90_000_000
"""Pixels up to which a JPEG is decoded at its full size; larger ones are halved, or more."""

# What cameras, browsers and editors write. Other readers of PIL are left out because nobody needs
# them here and a file may choose its reader: EPS, for one, starts another program.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM")

# ISO/IEC 23008-12, annex B: brands of HEIF files in HEVC. "mif1" and "msf1" leave the coding open;
# where it is AV1, "avif" is among the other brands that follow.
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

# What PIL's decoders raise on damaged files.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    RuntimeError,  # AVIF
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


def check_matte(matte: str | None) -> tuple[int, ...] | None:
    """Red, green and blue of a colour: a name, "#rrggbb", or what else `PIL.ImageColor` reads.

    Raises:
        RequestError: no colour.
    """
    if matte is None:
        return None
    try:
        return ImageColor.getrgb(matte)[:3]
    except (ValueError, TypeError, AttributeError) as error:
        raise RequestError(
            f'matte is {matte!r}, expected a colour such as "white" or "#ff8800"; None drops '
            "transparency instead"
        ) from error


def prepare_reference(
    image: Image.Image, multiple_of: int, matte: str | None = "white"
) -> NDArray[np.uint8]:
    """Resizes and crops a reference image to what the VAE encoder reads: uint8 [1, H, W, 3], sRGB.

    Deep grey is scaled to 8 bits, colours of an ICC profile become sRGB's, and what is transparent
    is laid on the colour `matte`; None drops transparency, as diffusers does. An area above
    1024x1024 is resized to it, keeping the aspect. Then the centre is cropped to whole multiples.

    Source: diffusers, `Flux2KleinKVPipeline.__call__` (part 4) and `Flux2ImageProcessor`
    (`_resize_to_target_area`, `_resize_and_crop`). The encoder graph scales x/255*2-1 itself.

    Raises:
        RequestError: as of `check_reference` and `check_matte`, or PIL cannot read or convert it.
    """
    with _preparing(image):
        return _resized_and_cropped(_srgb(_eight_bits(image), matte), multiple_of)


def to_rgb(image: Image.Image, matte: str | None = "white") -> Image.Image:
    """A whole image in the colours that `prepare_reference` gives it, which has the errors too."""
    with _preparing(image):
        return _srgb(_eight_bits(image), matte).convert("RGB")


def _preparing(image: Image.Image) -> contextlib.AbstractContextManager[None]:
    check_reference(image)
    what = f"reference image (mode {image.mode}) cannot be read or turned into RGB"
    return _refusing(what, "; load it anew, or convert it first")


@contextlib.contextmanager
def _refusing(what: str, remedy: str = "") -> Iterator[None]:
    """A `RequestError` of whatever PIL, which reads files late, finds damaged in the block."""
    try:
        yield
    except RequestError:
        raise
    except _DECODE_ERRORS as error:
        raise RequestError(f"{what}: {error}{remedy}") from error


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


def load_image(path: str | Path, matte: str | None = "white") -> Image.Image:
    """Reads an image file (the first of several frames), upright, as `prepare_reference` does.

    The result is RGB; with `matte` None it keeps its transparency. JPEG files above 90 megapixels
    are decoded at a half, a quarter or an eighth of their sides.

    Raises:
        RequestError: no file, no image, a damaged one, or one of more than twice
            `PIL.Image.MAX_IMAGE_PIXELS` (set it for more), refused before anything is decoded.
    """
    path = Path(path)
    formats: list[str] = []
    with _refusing(f"image file cannot be read: {path}"), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # beyond half the limit
        try:
            formats = _formats(path)
            opened = Image.open(path, formats=formats)
        except Image.DecompressionBombError as error:
            raise RequestError(
                f"image is too large: {path}: {error} Make it smaller (a reference of more than "
                "1024x1024 pixels is reduced anyway), or raise PIL.Image.MAX_IMAGE_PIXELS "
                "(klein-kv generate: --max-megapixels)"
            ) from error
        except FileNotFoundError as error:
            raise RequestError(f"image file does not exist: {path}") from error
        except UnidentifiedImageError as error:
            raise RequestError(
                f"not an image that can be read: {path}; expected {', '.join(formats)}"
            ) from error
    damaged = _refusing(
        f"image file is damaged or cut short: {path}", "; save or download it again"
    )
    with damaged, opened:
        width, height = opened.size
        if width * height > _READ_WHOLE:  # down to no less than 2048x2048
            times = math.isqrt(width * height // (4 * MAX_AREA))
            opened.draft(None, (width // times, height // times))
        opened.load()
        image = _srgb(ImageOps.exif_transpose(_eight_bits(opened)), matte)
        if matte is not None or not image.has_transparency_data:
            image = image.convert("RGB")
        image.info.pop("icc_profile", None)
        return image


def _formats(path: Path) -> list[str]:
    """PIL's names of the formats that may be in a file: what is read here, HEIC where it is one."""
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]  # AVIF is optional in PIL
    with path.open("rb") as file:
        head = file.read(64)
    if head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS and b"avif" not in head:
        try:
            import pillow_heif
        except ImportError as error:
            raise RequestError(
                f"{path} is a HEIC image, which takes another library to read; install it with "
                "pip install 'klein-kv[heif]', or convert the image to PNG or JPEG"
            ) from error
        pillow_heif.register_heif_opener()
        formats.append("HEIF")
    return formats


def _eight_bits(image: Image.Image) -> Image.Image:
    """Deep grey (modes I;16, I and F) in 8 bits, by its range; other images as they are."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image).astype(np.float64)
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]  # TIFF may hold 12 of them
        low, high = 0.0, 2.0**bits - 1
    elif image.mode == "I" and image.format == "PPM":  # PIL scales PGM files so
        low, high = 0.0, 65535.0
    else:
        finite = values[np.isfinite(values)]
        if not finite.size:
            raise RequestError("reference image holds no finite value, expected some")
        low, high = float(finite.min()), float(finite.max())
        most = 1.0 if image.mode == "F" else 255.0
        if low >= 0 and high <= most:
            low, high = 0.0, most
    values = (values - low) * (256 / ((high - low) or 1))  # 256 steps of one width
    grey = Image.fromarray(np.clip(np.nan_to_num(values), 0, 255).astype(np.uint8))
    grey.info = {name: value for name, value in image.info.items() if name != "transparency"}
    return grey


def _srgb(image: Image.Image, matte: str | None) -> Image.Image:
    """Colours of an image's ICC profile as sRGB's, on `matte`; a plain image as it is."""
    ground = check_matte(matte)
    if image.mode == "RGBa":
        image = image.convert("RGBA")
    icc = image.info.get("icc_profile")
    see_through = image.has_transparency_data and (icc or ground is not None)
    if not (icc or see_through):
        return image
    alpha = image.convert("RGBA").getchannel("A") if see_through else None
    if icc:
        image = _from_profile(image, icc)
    if alpha is None:
        return image
    if ground is None:
        image = image.convert("RGB")
        image.putalpha(alpha)
        return image
    whole = Image.new("RGB", image.size, ground)
    whole.paste(image.convert("RGB"), mask=alpha)
    return whole


def _from_profile(image: Image.Image, icc: bytes) -> Image.Image:
    """Colours under an ICC profile as sRGB, without alpha; a broken profile is ignored."""
    own = "CMYK" if image.mode == "CMYK" else "L" if image.mode in ("1", "L", "LA") else "RGB"
    image.load()  # that the file is damaged is no fault of the profile
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        space = profile.profile.xcolor_space.strip()
        mode = "L" if space == "GRAY" else space
        if (own, mode) not in (("L", "L"), ("L", "RGB"), ("RGB", "RGB"), ("CMYK", "CMYK")):
            raise ValueError(f"it is of {space} colours, the image of {own}")
        srgb = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(profile, srgb, mode, "RGB")
        if mode == "RGB" and _changes_little(transform):
            return image
        image = ImageCms.applyTransform(image.convert(mode), transform) or image
    except (ImageCms.PyCMSError, ImportError, *_DECODE_ERRORS) as error:
        _log.warning("an image's ICC profile is ignored, its colours may be off: %s", error)
    return image


def _changes_little(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether no colour moves by more than 2 levels: the profile is sRGB's, rounded."""
    levels = np.linspace(0, 255, 18).astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 18, 3)
    moved = np.asarray(ImageCms.applyTransform(Image.fromarray(colours), transform))
    return bool(np.abs(moved.astype(int) - colours).max() <= 2)
