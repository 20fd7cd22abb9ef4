"""How an image was made, kept in its PNG file.

Three text chunks: `parameters` in the one-line form that image tools and web interfaces read,
`klein_kv` with the same facts as JSON, and an XMP packet that marks the image as made by a model,
where photo libraries and platforms look for it. EXIF says it in words, for viewers that know
nothing else.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from klein_kv import __version__
from klein_kv.errors import RequestError
from klein_kv.runtime.outputs.whole_file import whole_file

__all__ = ["ImageParameters", "save_png"]

# XMP specification, part 3, "PNG": this keyword, not compressed. The property and its value are
# IPTC's: Photo Metadata Standard, "Digital Source Type".
_XMP = """\
<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    Iptc4xmpExt:DigitalSourceType=\
"http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    xmp:CreatorTool="klein-kv {version}"/>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>"""


@dataclass(frozen=True, slots=True)
class ImageParameters:
    """Facts about one image.

    Attributes:
        references: number of reference images.
        model_digest: sha256 of the weights, with or without "sha256:" before it.
        seed: None if the noise came from elsewhere.
        version: of klein-kv.
    """

    prompt: str
    steps: int
    width: int
    height: int
    references: int
    model: str
    model_digest: str
    seed: int | None = None
    version: str = __version__

    @property
    def text(self) -> str:
        """The prompt, and below it one line `Steps: 4, Sampler: Euler, ...`."""
        fields: dict[str, object] = {"Steps": self.steps, "Sampler": "Euler"}
        if self.seed is not None:
            fields["Seed"] = self.seed
        fields["Size"] = f"{self.width}x{self.height}"
        fields["Model"] = self.model
        fields["Model hash"] = self.model_digest.removeprefix("sha256:")[:10]
        fields["References"] = self.references
        fields["Version"] = f"klein-kv {self.version}"
        line = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in fields.items())
        return f"{self.prompt}\n{line}"


def save_png(
    image: Image.Image, path: str | Path, parameters: ImageParameters | None = None
) -> None:
    """Writes a PNG file, whole or not at all (`whole_file`).

    Raises:
        RequestError: the name does not end in .png, or the folder is missing or not writable.
        CapacityError: the disk is full, or a quota is used up.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise RequestError(f"image file is {path}, expected a name that ends in .png")
    chunks = _chunks(parameters) if parameters else {}
    with whole_file(path, image.width * image.height * len(image.getbands())) as file:
        image.save(file, format="PNG", **chunks)


def _chunks(parameters: ImageParameters) -> dict[str, Any]:
    """Options of `PIL.Image.Image.save`: the text chunks, and EXIF tags that say what made it.

    All texts are iTXt, so every language and emoji survives. EXIF has no field for the digital
    source type (Exif 3.0, CIPA DC-008): it is in the XMP packet.
    """
    info = PngInfo()
    parameters = replace(
        parameters, prompt=_storable(parameters.prompt), model=_storable(parameters.model)
    )
    info.add_itxt("parameters", parameters.text)
    info.add_itxt("klein_kv", json.dumps(asdict(parameters), ensure_ascii=False))
    info.add_itxt("XML:com.adobe.xmp", _XMP.format(version=parameters.version))
    tags = Image.Exif()
    tags[ExifTags.Base.ImageDescription] = "Made by a generative model"
    tags[ExifTags.Base.Software] = f"klein-kv {parameters.version}"
    return {"pnginfo": info, "exif": tags}


def _quoted(text: str) -> str:
    """A value with a separator in it goes between quotes, as readers of this form expect."""
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:\n"') else text


def _storable(text: str) -> str:
    """Half a surrogate pair, which cannot be encoded, becomes "?"; NUL ends a text in PNG."""
    return text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")
