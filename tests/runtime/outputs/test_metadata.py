"""What an image file says about itself, and that it is written whole or not at all."""

import errno
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, PngImagePlugin

from klein_kv import __version__
from klein_kv.errors import CapacityError, RequestError
from klein_kv.runtime.outputs.metadata import ImageParameters, image_format, save_image

PARAMETERS = ImageParameters(
    prompt="a red kite over the sea",
    steps=4,
    width=512,
    height=256,
    references=2,
    model="FLUX.2-klein-9b-kv",
    model_digest="sha256:0123456789abcdef",
    seed=2**63 - 1,
)
RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
IPTC = "http://cv.iptc.org/newscodes"
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))


def text_of(path: Path) -> dict[str, str]:
    with Image.open(path) as image:
        image.load()
        assert isinstance(image, PngImagePlugin.PngImageFile)
        return dict(image.text)


def test_parameters_text() -> None:
    assert PARAMETERS.text == (
        "a red kite over the sea\n"
        "Steps: 4, Sampler: Euler, Seed: 9223372036854775807, Size: 512x256, "
        "Model: FLUX.2-klein-9b-kv, Model hash: 0123456789, References: 2, "
        f"Version: klein-kv {__version__}"
    )
    assert "Seed" not in replace(PARAMETERS, seed=None).text
    assert 'Model: "a, b: c"' in replace(PARAMETERS, model="a, b: c").text


@settings(max_examples=30)
@given(prompt=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_every_language(tmp_path_factory: pytest.TempPathFactory, prompt: str) -> None:
    path = tmp_path_factory.mktemp("png") / "out.png"
    save_image(IMAGE, path, replace(PARAMETERS, prompt=prompt))
    texts = text_of(path)
    assert json.loads(texts["klein_kv"])["prompt"] == prompt
    assert texts["parameters"].startswith(prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        "a kite, 凧 \U0001f6a2",
        "\ud800 nul\0 \U0001f6a2",
        'quotes " and <tags> & \n\x01\ufffe',
        "",
        "long \U0001f6a2 " * 9000,
    ],
)
@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "webp", "PNG"])
def test_every_format_says_how_it_was_made(tmp_path: Path, suffix: str, prompt: str) -> None:
    """In EXIF, where web interfaces look in files that are no PNG, and in XMP, marked as IPTC's."""
    path = tmp_path / f"out.{suffix}"
    smooth = IMAGE.resize((96, 64), Image.Resampling.BICUBIC)
    save_image(smooth, path, replace(PARAMETERS, prompt=prompt))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    expected = prompt.replace("\ud800", "?").replace("\0", "")  # which have no encoding
    if suffix[0] == "j" and len(prompt) > 5000:  # JPEG's segments hold 64 KiB
        expected = prompt[:4999] + "…"
    parameters = replace(PARAMETERS, prompt=expected)
    with Image.open(path) as image:
        image.load()
        assert image.format == {"jpg": "JPEG", "webp": "WEBP", "PNG": "PNG"}.get(suffix, "JPEG")
        off = np.abs(np.asarray(image).astype(int) - np.asarray(smooth))
        assert off.mean() <= (0 if suffix == "PNG" else 8)
        tags, packet = image.getexif(), image.info["xmp"]

    (entry,) = ET.fromstring(packet).iter(f"{{{RDF}}}Description")
    said = {name.rpartition("}")[2]: value for name, value in entry.attrib.items()}
    kind = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
    assert entry.attrib[kind] == f"{IPTC}/digitalsourcetype/trainedAlgorithmicMedia"
    assert said["CreatorTool"] == tags[ExifTags.Base.Software] == f"klein-kv {__version__}"
    assert json.loads(entry.attrib["{urn:klein-kv}parameters"]) == asdict(parameters)
    assert tags[ExifTags.Base.ImageDescription] == "Made by a generative model"
    comment = tags.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment == b"UNICODE\0" + parameters.text.encode("utf-16-be")
    if suffix == "PNG":
        texts = text_of(path)
        assert texts["parameters"] == parameters.text
        assert json.loads(texts["klein_kv"]) == asdict(parameters)
        assert texts["XML:com.adobe.xmp"] == packet.decode()


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_quality(tmp_path: Path, suffix: str) -> None:
    sizes = []
    for quality in (20, 60, None, 99):
        path = tmp_path / f"out.{suffix}"
        save_image(IMAGE, path, **({} if quality is None else {"quality": quality}))
        sizes.append(path.stat().st_size)
    assert sizes == sorted(set(sizes))
    for quality in (19, 100, 95.0, True):
        with pytest.raises(RequestError, match=r"quality is .*expected 20 to 99"):
            save_image(IMAGE, path, quality=quality)


def test_colours_of_a_jpeg_have_the_full_resolution(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 64), "blue")
    image.paste("red", (0, 0, 31, 64))
    save_image(image, tmp_path / "out.jpg")
    with Image.open(tmp_path / "out.jpg") as saved:
        np.testing.assert_allclose(np.asarray(saved), np.asarray(image), atol=12)


@pytest.mark.parametrize(("name", "most"), [("a.webp", 16383), ("a.jpg", 65500), ("a.png", 10**6)])
def test_longest_side(name: str, most: int) -> None:
    assert image_format(Path(name), most) in ("WEBP", "JPEG", "PNG")
    if most < 10**6:
        with pytest.raises(RequestError, match=f"holds at most {most} pixels .* ends in .png"):
            image_format(Path(name), most + 1)


def test_without_parameters(tmp_path: Path) -> None:
    save_image(IMAGE, tmp_path / "out.PNG")
    with Image.open(tmp_path / "out.PNG") as image:
        assert not image.getexif()
        assert set(image.info) <= {"dpi"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.gif", r"a name that ends in \.png, \.jpg, \.jpeg or \.webp"),
        ("gone/out.png", "No such file"),
        ("file/out.png", "Not a directory"),
        ("folder.png", "cannot be written"),
    ],
)
def test_places_where_nothing_is_written(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(RequestError, match=message):
        save_image(IMAGE, tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder.png"}


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "told so"), CapacityError),
        (OSError(errno.EDQUOT, "told so"), CapacityError),
        (OSError(errno.EACCES, "told so"), RequestError),
        (OSError(errno.EROFS, "told so"), RequestError),
        (KeyboardInterrupt("told so"), KeyboardInterrupt),
    ],
)
@pytest.mark.parametrize("old", [b"old", None])
def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    told: type[BaseException],
    old: bytes | None,
) -> None:
    path = tmp_path / "out.png"
    if old is not None:
        path.write_bytes(old)

    def fail(self: Image.Image, file: Any, **options: Any) -> None:
        file.write(b"half")
        raise error

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(told, match="told so"):
        save_image(IMAGE, path, PARAMETERS)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == ({path: old} if old else {})
