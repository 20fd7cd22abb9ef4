"""How an image was made, kept in its file.

EXIF's `UserComment` has it in the form that image tools and web interfaces read: the prompt, and
one line of facts. An XMP packet has the facts as JSON, and marks the image as made by a model,
where photo libraries and platforms look for it; EXIF says that in words, for viewers that know
nothing else. PNG files have the same as text chunks, `parameters` and `klein_kv`.
"""

import html
import json
import logging
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from klein_kv import __version__
from klein_kv.errors import RequestError
from klein_kv.runtime.outputs.whole_file import whole_file

__all__ = [
    "QUALITY",
    "ImageParameters",
    "check_quality",
    "image_format",
    "save_image",
    "write_image",
]

_log = logging.getLogger(__name__)

QUALITY = 95
"""Of JPEG and WebP files, where none is asked for."""

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_LONGEST_SIDE = {"JPEG": 65500, "WEBP": 16383}  # of libjpeg and libwebp, in pixels
_LONGEST_JPEG_PROMPT = 5000  # characters: EXIF and XMP have 64 KiB each, of up to 12 bytes for one

# XMP specification, part 3, "PNG": this keyword, not compressed. The property and its value are
# IPTC's: Photo Metadata Standard, "Digital Source Type".
_XMP = """\
<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:klein_kv="urn:klein-kv"
    Iptc4xmpExt:DigitalSourceType=\
"http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    xmp:CreatorTool="klein-kv {version}"
    klein_kv:parameters="{facts}"/>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>"""


@dataclass(frozen=True, slots=True)
class ImageParameters:
    """Facts about one image."""

    prompt: str
    steps: int
    width: int
    height: int
    references: int  # number of images
    model: str
    model_digest: str  # sha256 of the weights, with or without "sha256:" before it
    seed: int | None = None  # None if the noise came from elsewhere
    strength: float | None = None  # of an edit that started from an image
    version: str = __version__

    @property
    def text(self) -> str:
        """The prompt, and below it one line `Steps: 4, Sampler: Euler, ...`."""
        fields: dict[str, object] = {"Steps": self.steps, "Sampler": "Euler"}
        if self.seed is not None:
            fields["Seed"] = self.seed
        if self.strength is not None:
            fields["Denoising strength"] = f"{self.strength:g}"
        fields["Size"] = f"{self.width}x{self.height}"
        fields["Model"] = self.model
        fields["Model hash"] = self.model_digest.removeprefix("sha256:")[:10]
        fields["References"] = self.references
        fields["Version"] = f"klein-kv {self.version}"
        line = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in fields.items())
        return f"{self.prompt}\n{line}"


def image_format(path: Path, longest: int = 0) -> str:
    """PIL's name of the format that a file's name asks for, for `longest` pixels on a side.

    A RequestError if it is none that is written here, or none for so many pixels.
    """
    kind = _FORMATS.get(path.suffix.lower())
    if kind is None:
        raise RequestError(
            f"image file is {path}, expected a name that ends in .png, .jpg, .jpeg or .webp"
        )
    if longest > (most := _LONGEST_SIDE.get(kind, longest)):
        raise RequestError(
            f"{path} holds at most {most} pixels on a side, the image has {longest}; choose a "
            "name that ends in .png"
        )
    return kind


def check_quality(quality: int) -> None:
    """Refuses a quality of JPEG or WebP files that is not within 20 and 99."""
    if not isinstance(quality, int) or isinstance(quality, bool) or not 20 <= quality <= 99:
        raise RequestError(f"quality is {quality!r}, expected 20 to 99")


def save_image(
    image: Image.Image,
    path: str | Path,
    parameters: ImageParameters | None = None,
    quality: int = QUALITY,
) -> None:
    """Writes a PNG, JPEG or WebP file, as its name says, whole or not at all (`whole_file`).

    Raises:
        RequestError: another name, a quality out of range, or the folder is missing or not
            writable.
        CapacityError: the disk is full, or a quota is used up.
    """
    path = Path(path)
    kind = image_format(path, max(image.size))
    check_quality(quality)
    with whole_file(path, image.width * image.height * len(image.getbands())) as file:
        write_image(image, file, kind, parameters, quality)


def write_image(
    image: Image.Image,
    file: BinaryIO,
    kind: str = "PNG",
    parameters: ImageParameters | None = None,
    quality: int = QUALITY,
    *,
    quickly: bool = False,
) -> None:
    """Writes an image as "PNG", "JPEG" or "WEBP"; `quality` is that of the latter two.

    `quickly` looks for runs alone in a PNG: a photograph of 1024x1024 takes 80 ms in place of 400,
    for 2 % fewer bytes; a drawing gets 13 % larger.
    """
    options: dict[str, Any] = {"quality": quality} if kind != "PNG" else {}
    if kind == "PNG" and quickly:
        options = {"compress_type": zlib.Z_RLE}
    if kind == "JPEG":
        options["subsampling"] = "4:4:4"
    if parameters is not None:
        options |= _metadata(kind, parameters)
    image.save(file, format=kind, **options)


def _metadata(kind: str, parameters: ImageParameters) -> dict[str, Any]:
    """Options of `PIL.Image.Image.save`: EXIF tags and XMP packet, in PNG also text chunks.

    All PNG texts are iTXt, so every language and emoji survives. EXIF has no field for the digital
    source type (Exif 3.0, CIPA DC-008): it is in the XMP packet.
    """
    prompt = _storable(parameters.prompt)
    if kind == "JPEG" and len(prompt) > _LONGEST_JPEG_PROMPT:
        _log.warning("a JPEG file keeps %d characters of a prompt", _LONGEST_JPEG_PROMPT)
        prompt = prompt[: _LONGEST_JPEG_PROMPT - 1] + "…"
    parameters = replace(parameters, prompt=prompt, model=_storable(parameters.model))
    tags = Image.Exif()
    tags[ExifTags.Base.ImageDescription] = "Made by a generative model"
    tags[ExifTags.Base.Software] = f"klein-kv {parameters.version}"
    comment = b"UNICODE\0" + parameters.text.encode("utf-16-be")  # Exif 2.3, 4.6.5
    tags.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    facts = html.escape(json.dumps(asdict(parameters)))  # ASCII: XML has no form for some others
    packet = _XMP.format(version=parameters.version, facts=facts)
    if kind != "PNG":
        return {"exif": tags.tobytes(), "xmp": packet.encode()}
    info = PngInfo()
    info.add_itxt("parameters", parameters.text)
    info.add_itxt("klein_kv", json.dumps(asdict(parameters), ensure_ascii=False))
    info.add_itxt("XML:com.adobe.xmp", packet)
    return {"pnginfo": info, "exif": tags}


def _quoted(text: str) -> str:
    """A value with a separator in it goes between quotes, as readers of this form expect."""
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:\n"') else text


def _storable(text: str) -> str:
    """Half a surrogate pair, which cannot be encoded, becomes "?"; NUL ends a text in PNG."""
    return text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")
