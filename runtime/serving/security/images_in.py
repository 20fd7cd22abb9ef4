"""Uploaded bytes to prepared pixels: everything is checked before it is decoded."""

import base64
import binascii
import io
import logging

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from klein_kv.artifacts.pixels import MAX_ASPECT, MIN_SIDE, prepare_reference
from klein_kv.errors import RequestError
from klein_kv.runtime.serving.errors import ServiceError
from klein_kv.runtime.serving.jobs import Pixels
from klein_kv.runtime.serving.security.image_files import is_intricate

__all__ = ["bytes_from_base64", "open_image", "prepare_mask", "prepare_upload"]

_log = logging.getLogger(__name__)

_FORMATS = ("PNG", "JPEG", "WEBP")


def bytes_from_base64(text: str, most: int, param: str) -> bytes:
    """Bytes of base64, or of a `data:` URI with base64 in it.

    Raises:
        ServiceError: it is neither, or more than `most` bytes.
    """
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise ServiceError("invalid_image", "expected a data URI with base64 in it", param)
    if len(text) > most // 3 * 4 + 4:
        raise ServiceError("payload_too_large", f"an image has more than {most} bytes", param)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ServiceError("invalid_image", "an image is no valid base64", param) from None


def open_image(data: bytes, max_pixels: int, param: str) -> Image.Image:
    """Decodes a PNG, JPEG or WebP file, its first frame, and turns it upright.

    Raises:
        ServiceError: "invalid_image": another kind of file, a damaged one, or too many pixels.
    """
    if is_intricate(data):
        raise ServiceError("invalid_image", "an image has more parts than encoders write", param)
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        width, height = image.size
        if width * height <= max_pixels:
            image.load()
            return ImageOps.exif_transpose(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        width, height = 0, 0
    except UnidentifiedImageError:
        raise ServiceError("invalid_image", "a file is no PNG, JPEG or WebP image", param) from None
    except Exception as error:  # noqa: BLE001 - whatever a decoder raises on a damaged file
        _log.info("an upload cannot be decoded: %s", type(error).__name__)
        raise ServiceError("invalid_image", "an image is damaged or cut short", param) from None
    size = f"{width}x{height}" if width else "too large"
    raise ServiceError(
        "invalid_image",
        f"an image is {size}, expected at most {max_pixels} pixels; make it smaller",
        param,
    )


def prepare_upload(
    data: bytes, max_pixels: int, unit: int, matte: str | None, param: str = "image"
) -> Pixels:
    """Decodes an upload and makes a reference of it, uint8 [H, W, 3].

    Raises:
        ServiceError: "invalid_image", as of `open_image`, or a side too short or an aspect too far.
    """
    return _prepared(open_image(data, max_pixels, param), unit, matte, param)


def prepare_mask(data: bytes, max_pixels: int, unit: int, size: tuple[int, ...]) -> Pixels:
    """Decodes a mask for a prepared image of (height, width) `size`: uint8 [H, W], 0 or 255.

    255, where the image changes, is what is transparent, as OpenAI has it; or white, in a mask
    without transparency. The mask is resized and cropped as the image was.

    Raises:
        ServiceError: "invalid_image", or "invalid_value": another size, or nothing would change.
    """
    image = open_image(data, max_pixels, "mask")
    change = image.convert("L")
    if image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
        if np.asarray(alpha).min() < 255:
            change = ImageOps.invert(alpha)
    mask = _prepared(change.convert("RGB"), unit, None, "mask")[..., 0]
    if mask.shape != tuple(size):
        raise ServiceError(
            "invalid_value",
            f"mask is {image.width}x{image.height}, which is not the first image's size",
            "mask",
        )
    mask = np.where(mask < 128, 0, 255).astype(np.uint8)
    if not mask.any():
        raise ServiceError("invalid_value", "mask leaves everything as it is", "mask")
    return mask


def _prepared(image: Image.Image, unit: int, matte: str | None, param: str) -> Pixels:
    try:
        return np.ascontiguousarray(prepare_reference(image, unit, matte)[0])
    except RequestError:
        raise ServiceError(
            "invalid_image",
            f"an image is {image.width}x{image.height}, expected at least {MIN_SIDE} pixels on "
            f"each side, at most {MAX_ASPECT} times as long as wide, and a colour mode that can be "
            "turned into RGB",
            param,
        ) from None
