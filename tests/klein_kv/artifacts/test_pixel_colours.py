"""What a reference's numbers mean: deep grey, transparency, ICC profiles."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from klein_kv.artifacts.pixels import load_image, prepare_reference
from klein_kv.errors import RequestError
from tests.icc import (
    cmyk_profile,
    grey_profile,
    rgb_profile,
    srgb_from_lab,
    srgb_from_linear,
    srgb_from_rgb,
)
from tests.klein_kv.artifacts.test_pixels import MULTIPLE, diffusers_pixels, picture

RAMP = np.arange(64 * 64).reshape(64, 64) / (64 * 64 - 1)  # 0..1


def both_ways(path: Path, **options: Any) -> Any:
    """Pixels [H, W, 3] of a file, read by us; the same where a user opens it with PIL."""
    ours = np.asarray(prepare_reference(load_image(path, **options), MULTIPLE, **options))[0]
    with Image.open(path) as image:
        np.testing.assert_array_equal(prepare_reference(image, MULTIPLE, **options)[0], ours)
    return ours


def save_pgm(path: Path, levels: Any, most: int) -> None:
    head = f"P5 {levels.shape[1]} {levels.shape[0]} {most}\n".encode()
    path.write_bytes(head + levels.astype(">u2").tobytes())


# --- deep grey ---


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        # 16 bits: the file's range, though the picture does not fill it
        ("png", (RAMP * 40000).astype(np.uint16), lambda x: x >> 8),
        ("tiff", (RAMP * 40000).astype(np.uint16), lambda x: x >> 8),
        ("pgm", np.rint(RAMP * 2000).astype(np.int32), lambda x: x * 65535 // 4095 >> 8),
        # 32 bits: the picture's own
        ("tiff", np.rint(RAMP * 2e9 - 1e9).astype(np.int32), lambda x: np.floor(RAMP * 255.99999)),
        ("tiff", np.rint(RAMP * 70 + 100).astype(np.int32), lambda x: x),
        ("tiff", np.float32(RAMP * 50 - 3), lambda x: np.floor(RAMP * 255.9999)),
        # but for floats within 0 and 1
        ("tiff", np.float32(RAMP / 2), lambda x: np.floor(RAMP * 128)),
    ],
    ids=["png16", "tiff16", "pgm12", "int32", "int32-of-bytes", "float", "float-of-0-to-1"],
)
def test_deep_grey_is_scaled(tmp_path: Path, name: str, values: Any, expected: Any) -> None:
    """Told by users: PIL's own conversion makes them white, or black."""
    path = tmp_path / f"deep.{name}"
    if name == "pgm":
        save_pgm(path, values, 4095)
    else:
        Image.fromarray(values).save(path)
    pixels = both_ways(path)
    np.testing.assert_allclose(pixels[..., 0], expected(values), atol=1)
    assert (pixels == pixels[..., :1]).all()
    assert 64 <= pixels.max() <= 255


def test_deep_grey_of_12_bits_in_a_tiff(tmp_path: Path) -> None:
    """PIL has no writer: 12 bits are two samples in three bytes."""
    levels = np.rint(RAMP * 4095).astype(int)
    first, second = levels[:, ::2], levels[:, 1::2]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=-1)
    tags = {256: 64, 257: 64, 258: 12, 259: 1, 262: 1, 273: 0, 277: 1, 278: 64, 279: 64 * 96}
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in tags.items():
        directory[tag] = value
    (tmp_path / "deep.tiff").write_bytes(
        b"II*\0\x08\0\0\0" + directory.tobytes(8) + packed.astype(np.uint8).tobytes()
    )
    np.testing.assert_array_equal(both_ways(tmp_path / "deep.tiff")[..., 0], levels >> 4)


def test_deep_grey_that_is_not_finite(tmp_path: Path) -> None:
    values = np.float32(RAMP * 10)
    values[0, :3] = np.nan, np.inf, -np.inf
    Image.fromarray(values).save(tmp_path / "deep.tiff")
    pixels = both_ways(tmp_path / "deep.tiff")[..., 0]
    assert list(pixels[0, :3]) == [0, 255, 0]
    low = RAMP[0, 3]
    np.testing.assert_allclose(pixels[1:], (RAMP[1:] - low) / (1 - low) * 255, atol=1)
    assert not prepare_reference(Image.new("F", (64, 64), 7.0), MULTIPLE).any()
    with pytest.raises(RequestError, match="no finite value"):
        prepare_reference(Image.new("F", (64, 64), np.nan), MULTIPLE)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_deep_grey_is_scaled_before_it_is_reduced(kind: type) -> None:
    wide = Image.fromarray(np.tile(RAMP * 1e5, (17, 17)).astype(kind))
    pixels = prepare_reference(wide, MULTIPLE)
    assert pixels.shape == (1, 1024, 1024, 3)
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert abs(pixels.mean() - 127.5) < 1


# --- transparency ---

SECRET = (200, 30, 90)  # what lies under alpha 0


def see_through(mode: str, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Left half opaque blue, right half transparent over `SECRET`."""
    image = Image.new("RGBA", size, (*SECRET, 0))
    image.paste((0, 0, 255, 255), (0, 0, size[0] // 2, size[1]))
    if mode != "P":
        return image.convert(mode)
    palette = image.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    palette.info["transparency"] = palette.getpixel((size[0] - 1, 0))
    return palette


WHITE = (255, 255, 255)


@pytest.mark.parametrize(
    ("mode", "size", "matte", "expected"),
    [
        *((mode, (64, 64), {}, WHITE) for mode in ("RGBA", "LA", "P", "RGBa")),
        ("RGBA", (1100, 1000), {}, WHITE),
        ("LA", (64, 64), {"matte": "black"}, (0, 0, 0)),
        ("P", (64, 64), {"matte": "#10ff20"}, (16, 255, 32)),
    ],
)
def test_transparency_is_laid_on_a_colour(mode: str, size: Any, matte: Any, expected: Any) -> None:
    image = see_through(mode, size)
    pixels = prepare_reference(image, MULTIPLE, **matte)[0]
    half = pixels.shape[1] // 2
    assert (pixels[:, half + 8 :] == expected).all()
    assert (pixels[:, : half - 8] == pixels[0, 0]).all()
    assert pixels[0, 0, 2] >= 29
    assert image.mode == mode


@pytest.mark.parametrize("suffix", ["png", "webp", "gif", "tiff"])
def test_transparent_files(tmp_path: Path, suffix: str) -> None:
    mode = "P" if suffix == "gif" else "RGBA"
    options = {"lossless": True, "exact": True} if suffix == "webp" else {}
    see_through(mode).save(tmp_path / f"image.{suffix}", **options)
    pixels = both_ways(tmp_path / f"image.{suffix}")
    assert (pixels[0, 0] == (0, 0, 255)).all()
    assert (pixels[:, 32:] == 255).all()


def test_a_transparent_colour_of_a_png_and_half_transparency(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 64), (1, 2, 3))
    image.putpixel((5, 5), (9, 9, 9))
    image.save(tmp_path / "key.png", transparency=(1, 2, 3))
    pixels = both_ways(tmp_path / "key.png")
    assert (pixels[5, 5] == 9).all()
    assert (pixels[0, 0] == 255).all()
    image = Image.new("RGBA", (64, 64), (100, 0, 0, 51))
    assert (prepare_reference(image, MULTIPLE) == (224, 204, 204)).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("size", [(90, 70), (1100, 1000)])
def test_without_matte_as_diffusers(tmp_path: Path, mode: str, size: tuple[int, int]) -> None:
    image = see_through(mode, size) if mode == "P" else picture(*size, mode=mode)
    expected = diffusers_pixels(image)
    np.testing.assert_array_equal(prepare_reference(image, MULTIPLE, matte=None), expected)
    if size[0] == 90:
        image.save(tmp_path / "image.png")
        np.testing.assert_array_equal(both_ways(tmp_path / "image.png", matte=None), expected[0])


@pytest.mark.parametrize("matte", ["mauvish", "", (1, 2, 3)])
def test_no_colour(matte: Any) -> None:
    with pytest.raises(RequestError, match=r"matte is .*expected a colour"):
        prepare_reference(picture(64, 64, "RGBA"), MULTIPLE, matte=matte)


# --- ICC profiles ---


def patches(seed: int = 0) -> Any:
    """64 colours [64, 64, 3] in patches of 8x8, none that sRGB cannot show."""
    colours = np.random.default_rng(seed).integers(60, 190, (8, 8, 3), dtype=np.uint8)
    return colours.repeat(8, 0).repeat(8, 1)


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff", "avif"])
def test_wide_colours_become_srgb(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"wide.{suffix}"
    Image.fromarray(patches()).save(path, icc_profile=rgb_profile())
    with Image.open(path) as image:
        levels = np.asarray(image).astype(int)
    expected = srgb_from_rgb(levels)
    assert np.abs(expected - levels).max() > 15
    np.testing.assert_allclose(both_ways(path), expected, atol=1.5)
    image = load_image(path)
    assert "icc_profile" not in image.info, "colours are converted once"
    np.testing.assert_array_equal(prepare_reference(image, MULTIPLE)[0], image)


def test_colours_and_transparency(tmp_path: Path) -> None:
    levels = patches()
    levels[..., 0][levels[..., 0] < 100] = 100
    image = Image.fromarray(levels)
    alpha = np.full((64, 64), 255, np.uint8)
    alpha[:, 32:] = 0
    image.putalpha(Image.fromarray(alpha))
    image.save(tmp_path / "wide.png", icc_profile=rgb_profile())
    expected = srgb_from_rgb(levels)
    pixels = both_ways(tmp_path / "wide.png")
    np.testing.assert_allclose(pixels[:, :32], expected[:, :32], atol=1.5)
    assert (pixels[:, 32:] == 255).all()
    pixels = both_ways(tmp_path / "wide.png", matte=None)
    np.testing.assert_allclose(pixels, expected, atol=1.5)


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_profiles(tmp_path: Path, mode: str) -> None:
    """Grey in linear light, 16 bits deep too; and grey with a profile for colours."""
    image = Image.new(mode, (64, 64), {"L": 64, "LA": (64, 255), "I;16": 64 << 8}[mode])
    for profile, expected in (
        (grey_profile(1.0), srgb_from_linear(np.array([64 / 255]))),
        (rgb_profile(), srgb_from_rgb([64, 64, 64])),
    ):
        image.save(tmp_path / "grey.png", icc_profile=profile)
        pixels = both_ways(tmp_path / "grey.png")
        np.testing.assert_allclose(pixels, np.broadcast_to(expected, pixels.shape), atol=1.5)


def test_print_colours(tmp_path: Path) -> None:
    """Without its profile, full cyan would be (0, 255, 255)."""
    image = Image.new("CMYK", (64, 64), (255, 0, 0, 0))
    image.paste((0, 0, 0, 0), (0, 0, 32, 64))
    image.paste((0, 0, 0, 128), (0, 32, 32, 64))
    image.save(tmp_path / "print.tiff", icc_profile=cmyk_profile((60, -20, -25)))
    pixels = both_ways(tmp_path / "print.tiff")
    np.testing.assert_allclose(pixels[0, 0], [255] * 3, atol=2)
    np.testing.assert_allclose(pixels[-1, 0], srgb_from_lab((50, 0, 0)), atol=3)
    np.testing.assert_allclose(pixels[0, -1], srgb_from_lab((60, -20, -25)), atol=3)


def test_srgb_by_another_name_stays_as_it_is() -> None:
    """Almost every photo carries such a profile; diffusers reads it right."""
    from PIL import ImageCms

    image = picture(64, 64)
    image.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    np.testing.assert_array_equal(prepare_reference(image, MULTIPLE), diffusers_pixels(image))


@pytest.mark.parametrize(
    ("mode", "profile"),
    [
        ("RGB", b""),
        ("RGB", b"no profile"),
        ("RGB", rgb_profile()[:300]),
        ("RGB", grey_profile(1.0)),
        ("RGB", cmyk_profile((60, -20, -25))),
        ("CMYK", rgb_profile()),
        ("L", cmyk_profile((60, -20, -25))),
    ],
    ids=["empty", "text", "cut", "grey", "print", "rgb-for-print", "print-for-grey"],
)
def test_broken_profiles_are_ignored_with_a_warning(
    mode: str, profile: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    image = picture(64, 64, mode)
    expected = prepare_reference(image, MULTIPLE)
    image.info["icc_profile"] = profile
    with caplog.at_level(logging.WARNING, "klein_kv"):
        np.testing.assert_array_equal(prepare_reference(image, MULTIPLE), expected)
    assert ("ICC profile is ignored" in caplog.text) == bool(profile)
    assert image.info["icc_profile"] == profile
