"""Reference preparation against diffusers' image processor, and files of every kind."""

import contextlib
import functools
import importlib.util
import io
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from klein_kv.artifacts.pixels import (
    _FORMATS,
    check_reference,
    load_image,
    prepare_reference,
)
from klein_kv.errors import RequestError
from tests.damage import damaged_bytes
from tests.icc import rgb_profile, srgb_from_rgb

MULTIPLE = 16


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Noise: every pixel that moves shows."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def save_picture(path: Path, width: int, height: int) -> Path:
    if path.suffix == ".heic":
        pytest.importorskip("pillow_heif").from_pillow(picture(width, height)).save(path)
    else:
        picture(width, height).save(path)
    return path


def diffusers_pixels(image: Image.Image) -> Any:
    """Part 4 of Flux2KleinKVPipeline.__call__, back from float [-1, 1] to uint8."""
    processor = Flux2ImageProcessor(vae_scale_factor=MULTIPLE)
    processor.check_image_input(image)
    width, height = image.size
    if width * height > 1024 * 1024:
        image = processor._resize_to_target_area(image, 1024 * 1024)
        width, height = image.size
    width, height = width // MULTIPLE * MULTIPLE, height // MULTIPLE * MULTIPLE
    tensor = processor.preprocess(image, height=height, width=width, resize_mode="crop")
    levels = (tensor.permute(0, 2, 3, 1).numpy() + 1) * 127.5
    assert np.abs(levels - levels.round()).max() < 1e-3
    return levels.round().astype(np.uint8)


@pytest.mark.parametrize(
    ("mode", "size"),
    [
        *(("RGB", size) for size in ((64, 64), (65, 79), (64, 512), (1024, 1024))),
        *(("RGB", size) for size in ((1025, 1024), (1999, 700), (3200, 400))),
        *((mode, (90, 70)) for mode in ("1", "L", "P", "CMYK", "YCbCr")),
        *((mode, (1200, 1000)) for mode in ("1", "P", "CMYK")),
    ],
)
def test_prepare_equals_diffusers(mode: str, size: tuple[int, int]) -> None:
    """But for deep grey, transparency and ICC profiles: test_pixel_colours."""
    image = picture(*size).convert(mode)
    ours = prepare_reference(image, MULTIPLE)
    assert (ours.dtype, ours.shape[0], ours.shape[3]) == (np.uint8, 1, 3)
    assert ours.flags.writeable
    np.testing.assert_array_equal(ours, diffusers_pixels(image))
    assert image.size == size


@settings(max_examples=25, deadline=None)
@given(width=st.integers(64, 400), height=st.integers(64, 400))
def test_any_small_size_equals_diffusers(width: int, height: int) -> None:
    image = picture(width, height)
    np.testing.assert_array_equal(prepare_reference(image, MULTIPLE), diffusers_pixels(image))


@pytest.mark.parametrize("size", [(63, 64), (64, 63), (64, 513), (1000, 100)])
def test_refused_where_diffusers_refuses(size: tuple[int, int]) -> None:
    image = picture(*size)
    with pytest.raises(ValueError, match=r"small|ratio"):
        Flux2ImageProcessor.check_image_input(image)
    for check in (check_reference, lambda image: prepare_reference(image, MULTIPLE)):
        with pytest.raises(RequestError, match=f"{size[0]}x{size[1]}"):
            check(image)


def test_what_cannot_be_prepared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for value in (None, "photo.png", np.zeros((64, 64, 3), np.uint8)):
        with pytest.raises(RequestError, match=r"expected a PIL\.Image\.Image"):
            check_reference(value)
    with pytest.raises(RequestError, match="at least 128"):
        prepare_reference(picture(64, 64), 128)
    with pytest.raises(RequestError, match=r"mode La.*not supported"):
        prepare_reference(picture(64, 64, "LA").convert("La"), MULTIPLE)
    cut = tmp_path / "cut.png"
    picture(100, 100).save(cut, icc_profile=rgb_profile())  # which damage is not blamed on
    cut.write_bytes(cut.read_bytes()[:9000])
    with Image.open(cut) as image, pytest.raises(RequestError, match="truncated"):
        prepare_reference(image, MULTIPLE)
    assert not caplog.records


@pytest.mark.parametrize(
    "suffix", ["png", "jpg", "webp", "bmp", "gif", "tiff", "ppm", "avif", "heic"]
)
def test_load_formats(tmp_path: Path, suffix: str) -> None:
    path = save_picture(tmp_path / f"image.{suffix}", 80, 70)
    image = load_image(str(path))
    assert (image.mode, image.size) == ("RGB", (80, 70))
    if suffix in ("png", "bmp", "tiff", "ppm"):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(picture(80, 70)))


def test_photo_of_a_telephone(tmp_path: Path) -> None:
    """HEIC, upright by its own transformation, in the colours of Display P3."""
    pytest.importorskip("pillow_heif").register_heif_opener()
    image, exif = Image.new("RGB", (80, 70), (180, 80, 80)), Image.Exif()
    image.paste((80, 180, 80), (0, 0, 80, 20))
    exif[0x0112] = 6
    image.save(tmp_path / "photo.HEIC", exif=exif.tobytes(), icc_profile=rgb_profile())
    turned = load_image(tmp_path / "photo.HEIC")
    assert turned.size == (70, 80)
    for place, colour in (((60, 40), (80, 180, 80)), ((20, 40), (180, 80, 80))):
        np.testing.assert_allclose(turned.getpixel(place), srgb_from_rgb(colour), atol=4)


def test_heic_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(RequestError, match=r"photo\.heic.*pip install 'klein-kv\[heif\]'"):
        load_image(tmp_path / "photo.heic")
    picture(80, 70).save(tmp_path / "photo.avif")
    content = (tmp_path / "photo.avif").read_bytes()
    (tmp_path / "photo.avif").write_bytes(content.replace(b"ftypavif", b"ftypmif1", 1))
    assert load_image(tmp_path / "photo.avif").size == (80, 70)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_load_turns_as_exif_says(tmp_path: Path, orientation: int) -> None:
    image, flip = picture(90, 70), Image.Transpose
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.png", exif=exif)
    turns = [flip.FLIP_LEFT_RIGHT, flip.ROTATE_180, flip.FLIP_TOP_BOTTOM, flip.TRANSPOSE]
    turns += [flip.ROTATE_270, flip.TRANSVERSE, flip.ROTATE_90]
    expected = image if orientation == 1 else image.transpose(turns[orientation - 2])
    turned = load_image(tmp_path / "turned.png")
    np.testing.assert_array_equal(np.asarray(turned), np.asarray(expected))


@pytest.mark.parametrize("content", [b"hello", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0"])
def test_load_not_an_image(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "image.png"
    with pytest.raises(RequestError, match=r"does not exist: .*image\.png"):
        load_image(path)
    with pytest.raises(RequestError, match="cannot be read"):
        load_image(tmp_path)
    path.write_bytes(content)
    with pytest.raises(RequestError, match=r"image\.png"):
        load_image(path)


@pytest.mark.parametrize("suffix", ["png", "jpeg", "webp", "gif", "tiff", "bmp", "avif"])
def test_load_truncated(tmp_path: Path, suffix: str) -> None:
    buffer, path = io.BytesIO(), tmp_path / f"cut.{suffix}"
    picture(200, 200).save(buffer, format=suffix)
    for kept in (0.3, 0.9):
        path.write_bytes(buffer.getvalue()[: int(kept * buffer.tell())])
        with pytest.raises(RequestError, match="cut"):
            load_image(path)


@pytest.mark.parametrize(
    ("kept", "left", "message"), [(263, 263, "damaged or cut"), (205, 206, "cannot be read")]
)
def test_load_avif_whose_parts_moved(tmp_path: Path, kept: int, left: int, message: str) -> None:
    """PIL's decoder raises RuntimeError, when it opens such a file or when it reads the pixels."""
    buffer = io.BytesIO()
    picture(70, 70).save(buffer, format="avif")
    content = buffer.getvalue()
    (tmp_path / "image.avif").write_bytes(content[:kept] + b"\0" * (kept == left) + content[left:])
    with pytest.raises(RequestError, match=message):
        load_image(tmp_path / "image.avif")


@functools.cache
def small_files() -> list[bytes]:
    """One file of every format, and of what they hold besides plain colours."""
    plain, profile = picture(70, 70), {"icc_profile": rgb_profile()}
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(np.arange(4900, dtype=np.uint16).reshape(70, 70))
    kinds: list[tuple[str, Image.Image, dict[str, Any]]] = [
        *((suffix, plain, {}) for suffix in ("png", "jpeg", "webp", "gif", "bmp", "avif", "ppm")),
        ("png", plain.convert("P"), {"transparency": 3}),
        ("png", picture(70, 70, "RGBA"), {**profile, "exif": exif}),
        ("png", deep, {}),
        ("ppm", deep, {}),
        ("jpeg", plain, {**profile, "exif": exif, "progressive": True}),
        ("jpeg", picture(70, 70, "CMYK"), {}),
        ("mpo", plain, {"save_all": True, "append_images": [plain]}),
        ("webp", picture(70, 70, "RGBA"), {**profile, "lossless": True}),
        *(("tiff", plain, {"compression": how, **profile}) for how in (None, "tiff_lzw", "jpeg")),
        ("tiff", deep, {"compression": "tiff_adobe_deflate"}),
        ("tiff", plain.convert("F"), {}),
    ]
    if importlib.util.find_spec("pillow_heif"):
        import pillow_heif

        pillow_heif.register_heif_opener()
        kinds.append(("heif", plain, {}))
    files = []
    for suffix, image, options in kinds:
        buffer = io.BytesIO()
        image.save(buffer, format=suffix, **options)
        files.append(buffer.getvalue())
    return files


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_files_raise_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(damaged_bytes(data, data.draw(st.sampled_from(small_files())), 64, 400))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL warns of damaged EXIF and of metadata it skips
        with contextlib.suppress(RequestError):
            image = load_image(path)
            assert image.mode == "RGB"
        try:
            opened = Image.open(path, formats=[name for name in _FORMATS if name in Image.OPEN])
        except Exception:  # noqa: BLE001 - whatever PIL tells a user who opens files
            return
        with opened, contextlib.suppress(RequestError):
            assert prepare_reference(opened, MULTIPLE).dtype == np.uint8


def test_load_large_photo(tmp_path: Path) -> None:
    """108 megapixels, as telephones take them; decoded at a quarter of its sides."""
    path = tmp_path / "large.jpg"
    large = Image.new("L", (12000, 9000), 40)
    large.paste(200, (6000, 0, 12000, 9000))
    large.save(path)
    image = load_image(path)
    assert image.size == (3000, 2250)
    pixels = prepare_reference(image, MULTIPLE)
    assert pixels.shape == (1, 880, 1168, 3)
    assert (pixels[:, :, :576] == 40).all()
    assert (pixels[:, :, 592:] == 200).all()


@pytest.mark.parametrize("suffix", ["png", "jpg", "heic"])
def test_load_bomb_is_refused_before_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = save_picture(tmp_path / f"bomb.{suffix}", 100, 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    assert load_image(path).size == (100, 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4999)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(RequestError, match=r"too large: .*10000 pixels.*limit of 9998.*megapixels"):
        load_image(path)
