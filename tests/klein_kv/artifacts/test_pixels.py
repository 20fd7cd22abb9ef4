"""Reference preparation against diffusers' image processor, and files of every kind."""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from klein_kv.artifacts.pixels import check_reference, load_image, prepare_reference
from klein_kv.errors import RequestError

MULTIPLE = 16


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Noise: every pixel that moves shows."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


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


def test_pictures_that_pil_cannot_convert_or_finish_reading(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"mode La.*not supported"):
        prepare_reference(picture(64, 64, "LA").convert("La"), MULTIPLE)
    picture(100, 100).save(tmp_path / "whole.png")
    cut = tmp_path / "cut.png"
    cut.write_bytes((tmp_path / "whole.png").read_bytes()[:9000])
    with Image.open(cut) as image, pytest.raises(RequestError, match="truncated"):
        prepare_reference(image, MULTIPLE)


@pytest.mark.parametrize(
    "size",
    [(64, 64), (65, 79), (80, 64), (64, 512), (1024, 1024), (1025, 1024), (1999, 700), (3200, 400)],
)
def test_prepare_equals_diffusers(size: tuple[int, int]) -> None:
    image = picture(*size)
    ours = prepare_reference(image, MULTIPLE)
    assert ours.dtype == np.uint8
    assert ours.shape[0] == 1
    assert ours.shape[3] == 3
    assert ours.flags.writeable
    np.testing.assert_array_equal(ours, diffusers_pixels(image))
    assert image.size == size


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16", "F"])
@pytest.mark.parametrize("size", [(90, 70), (1200, 1000)])
def test_every_mode_equals_diffusers(mode: str, size: tuple[int, int]) -> None:
    if mode == "I;16":
        wide = np.random.default_rng(0).integers(0, 2**16, size[::-1], dtype=np.uint16)
        image = Image.fromarray(wide)
        assert image.mode == mode
    else:
        image = picture(*size, mode=mode)
    np.testing.assert_array_equal(prepare_reference(image, MULTIPLE), diffusers_pixels(image))


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


@pytest.mark.parametrize("image", [None, "photo.png", np.zeros((64, 64, 3), np.uint8), []])
def test_not_an_image(image: Any) -> None:
    with pytest.raises(RequestError, match=r"expected a PIL\.Image\.Image"):
        check_reference(image)


def test_a_multiple_larger_than_the_image() -> None:
    with pytest.raises(RequestError, match="at least 128"):
        prepare_reference(picture(64, 64), 128)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tiff", "ppm"])
def test_load_formats(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    picture(80, 70, "RGBA" if suffix == "png" else "RGB").save(path)
    image = load_image(str(path))
    assert (image.mode, image.size) == ("RGB", (80, 70))
    if suffix in ("png", "bmp", "tiff", "ppm"):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(picture(80, 70)))


def test_load_scales_16_bit_grey(tmp_path: Path) -> None:
    """PIL's own conversion turns almost all of such an image white."""
    wide = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    Image.fromarray(wide).save(tmp_path / "wide.png")
    image = np.asarray(load_image(tmp_path / "wide.png"))
    np.testing.assert_array_equal(image[..., 0], wide >> 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_load_turns_as_exif_says(tmp_path: Path, orientation: int) -> None:
    image = picture(90, 70)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.png", exif=exif)
    turned = load_image(tmp_path / "turned.png")
    assert turned.size == ((90, 70) if orientation < 5 else (70, 90))
    transforms = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    transform = transforms[orientation]
    expected = image if transform is None else image.transpose(transform)
    np.testing.assert_array_equal(np.asarray(turned), np.asarray(expected))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"does not exist: .*image\.png"),
        ("a folder", r"cannot be read: .*image\.png"),
        (b"", r"image\.png"),
        (b"hello", r"image\.png"),
        (b"\x89PNG\r\n\x1a\n", r"image\.png"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", r"image\.png"),
    ],
)
def test_load_not_an_image(tmp_path: Path, content: bytes | str | None, message: str) -> None:
    path = tmp_path / "image.png"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.mkdir()
    with pytest.raises(RequestError, match=message):
        load_image(path)


@pytest.mark.parametrize("suffix", ["png", "jpeg", "webp", "gif", "tiff", "bmp"])
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
def test_load_truncated(tmp_path: Path, suffix: str, kept: float) -> None:
    buffer = io.BytesIO()
    picture(200, 200).save(buffer, format=suffix)
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(buffer.getvalue()[: int(kept * buffer.tell())])
    with pytest.raises(RequestError, match="cut"):
        load_image(path)


@settings(max_examples=60, deadline=None)
@given(suffix=st.sampled_from(["png", "jpeg", "webp", "gif", "tiff"]), data=st.data())
def test_load_damaged_raises_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, data: st.DataObject
) -> None:
    buffer = io.BytesIO()
    picture(70, 70).save(buffer, format=suffix)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, min(len(content), 400) - 1))
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "image"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL warns of damaged EXIF and of metadata it skips
        try:
            image = load_image(path)
        except RequestError:
            return
    assert image.mode == "RGB"


@pytest.mark.parametrize("times", [1.5, 3.0])
def test_load_bomb_is_refused_before_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: float
) -> None:
    path = tmp_path / "bomb.png"
    picture(100, 100).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(100 * 100 / times))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(RequestError, match="too large"):
        load_image(path)
