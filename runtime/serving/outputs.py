"""Images as an answer holds them: PNG, JPEG or WebP, in base64."""

import base64
import io
from typing import Literal

from PIL import Image

from klein_kv.runtime.outputs.metadata import QUALITY, ImageParameters, write_image

__all__ = ["OutputFormat", "base64_text", "encode_image"]

OutputFormat = Literal["png", "jpeg", "webp"]


def encode_image(
    image: Image.Image,
    kind: OutputFormat = "png",
    quality: int | None = None,
    parameters: ImageParameters | None = None,
) -> bytes:
    """One image as a file's bytes; `quality` 1 to 100 is that of JPEG and WebP."""
    file = io.BytesIO()
    quality = QUALITY if quality is None else max(1, quality)
    write_image(image, file, kind.upper(), parameters, quality, quickly=True)
    return file.getvalue()


def base64_text(data: bytes) -> str:
    """Bytes in base64."""
    return base64.b64encode(data).decode()
