"""Image and mask before anything is computed: diffusers' processors are the judge, to the pixel."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinInpaintPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image

from klein_kv.errors import RequestError
from klein_kv.runtime.inputs.masks import mask_pixels, mask_tokens
from klein_kv.runtime.inputs.start_image import Crop, StartImage, make_start, size_of
from klein_kv.schedule import make_schedule
from tests.runtime.conftest import Picture

UNIT = 16
SIZES = [(150, 130), (97, 320), (128, 192), (1500, 1100)]


class Judge:
    """What diffusers' pipeline does before its VAE (part 2), without its models."""

    latent_channels, vae_scale_factor = 32, 8
    _pack_latents = staticmethod(Flux2KleinInpaintPipeline._pack_latents)

    def __init__(self) -> None:
        options = {"vae_scale_factor": UNIT, "vae_latent_channels": 32}
        self.images = Flux2ImageProcessor(**options)
        self.masks = Flux2ImageProcessor(
            **options,
            do_normalize=False,
            do_binarize=True,
            do_convert_rgb=False,
            do_convert_grayscale=True,
        )

    def pixels(self, image: Image.Image, size: tuple[int, int], **crop: Any) -> np.ndarray:
        normal = self.images.preprocess(image, *size, **crop)
        return ((normal + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()

    def tokens(self, mask: Any, size: tuple[int, int], **crop: Any) -> np.ndarray:
        whole = self.masks.preprocess(mask, *size, **crop)
        latents = Flux2KleinInpaintPipeline.prepare_mask_latents(
            self, whole, len(whole), 1, *size, torch.float32, "cpu"
        )
        return latents.numpy()


def start_of(image: Image.Image, mask: Any, **changes: Any) -> tuple[StartImage, list[Crop]]:
    options = {"strength": 1.0, "noised": True, "padding": None, "blur": 0, "overlay": False}
    return make_start(image, mask, size_of(image, UNIT), UNIT, **options | changes)


def tokens_of(mask: Any, size: tuple[int, int]) -> np.ndarray:
    return mask_tokens(mask_pixels(mask, size), UNIT)


def blot(width: int, height: int, seed: int, mode: str = "L") -> Image.Image:
    """A mask with soft edges somewhere, black around it."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    (at_x, at_y), (far_x, far_y) = rng.uniform(0.2, 0.8, 2), rng.uniform(0.05, 0.35, 2)
    far = np.hypot((x / width - at_x) / far_x, (y / height - at_y) / far_y)
    return Image.fromarray((np.clip(1.5 - far, 0, 1) * 255).astype(np.uint8)).convert(mode)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["L", "RGB", "1"])
def test_whole_images(size: tuple[int, int], mode: str, picture: Picture) -> None:
    judge, image, mask = Judge(), picture(*size), blot(size[0] + 40, size[1], 1, mode)
    start, crops = start_of(image, mask)
    reduced, worked_on = image, size_of(image, UNIT)
    if size[0] * size[1] > 1024 * 1024:
        scale = (1024 * 1024 / (size[0] * size[1])) ** 0.5
        reduced = judge.images.resize(image, int(size[1] * scale), int(size[0] * scale))
    assert worked_on == tuple(side // UNIT * UNIT for side in reduced.size[::-1])
    np.testing.assert_array_equal(start.pixels, judge.pixels(reduced, worked_on))
    np.testing.assert_array_equal(start.mask, judge.tokens(mask, worked_on))
    assert start.mask is not None
    assert 0 < start.mask.mean() < 1
    assert not crops


@pytest.mark.parametrize("size", SIZES[:3])
@pytest.mark.parametrize("seed", range(8))
def test_regions(size: tuple[int, int], seed: int, picture: Picture) -> None:
    judge, image, mask = Judge(), picture(*size), blot(*size, seed)
    start, (crop,) = start_of(image, mask, padding=7 * seed)
    worked_on = size_of(image, UNIT)
    box = judge.masks.get_crop_region(mask, *worked_on[::-1], pad=7 * seed)
    assert crop.box == box
    region = {"crops_coords": box, "resize_mode": "fill"}
    np.testing.assert_array_equal(start.pixels, judge.pixels(image, worked_on, **region))
    np.testing.assert_array_equal(start.mask, judge.tokens(mask, worked_on, **region))


def test_a_region_of_a_large_image_keeps_its_pixels(picture: Picture) -> None:
    """Cut out before anything is made smaller, from a mask of another size too."""
    image = picture(2000, 1600)
    image.paste(Image.effect_noise((400, 320), 90).convert("RGB"), (600, 800))
    mask = Image.new("L", (1000, 800))
    mask.paste(255, (300, 400, 500, 560))
    start, (crop,) = start_of(image, mask, padding=0)
    assert start.pixels.shape[1:3] == size_of(image, UNIT)
    assert crop.mask.size == crop.original.size == image.size
    left, top, right, bottom = crop.box
    assert (left, top) == pytest.approx((600, 800), abs=12)
    worked_on = Image.fromarray(start.pixels[0])
    shown = worked_on.resize((right - left, bottom - top), Image.Resampling.LANCZOS)
    both = [np.asarray(x).ravel() for x in (shown, image.crop(crop.box))]
    # The noise, of single pixels, is there: 0.92; of an image made smaller first 0.05.
    assert np.corrcoef(*both)[0, 1] > 0.8


def test_arrays_are_masks(picture: Picture) -> None:
    judge, size = Judge(), (128, 96)
    flat = np.random.default_rng(0).random((60, 50), np.float32)
    pair = np.stack([flat, 1 - flat])
    for mask in (flat, pair, pair[..., None], torch.tensor(flat), torch.tensor(pair)[:, None]):
        np.testing.assert_array_equal(tokens_of(mask, size), judge.tokens(mask, size))
    expected = judge.tokens(pair, size)
    for mask in ([flat, 1 - flat], pair >= 0.5, torch.tensor(pair >= 0.5)):
        np.testing.assert_array_equal(tokens_of(mask, size), expected)
    blots = [blot(96, 128, seed) for seed in (1, 2)]
    np.testing.assert_array_equal(tokens_of(blots, size), judge.tokens(blots, size))


def test_a_blurred_mask_is_diffusers_blurred_mask(picture: Picture) -> None:
    image, mask = picture(128, 128), blot(128, 128, 3)
    start, (crop,) = start_of(image, mask, blur=5, padding=8)
    other, (expected,) = start_of(image, VaeImageProcessor.blur(mask, 5), padding=8)
    np.testing.assert_array_equal(start.mask, other.mask)
    assert crop.mask.tobytes() == expected.mask.tobytes()
    assert crop.mask.tobytes() != mask.tobytes()


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8, 50])
def test_strength_shortens_the_schedule_as_there(steps: int) -> None:
    """`get_timesteps`, over every percent; what leaves no step is refused, as there."""

    class Steps:
        order, timesteps = 1, list(range(steps))

    class Pipe:
        scheduler = Steps()

    schedule = make_schedule({"use_dynamic_shifting": True}, steps, 64)
    for strength in np.linspace(0, 1, 101):
        _, left = Flux2KleinInpaintPipeline.get_timesteps(Pipe(), steps, strength, "cpu")
        start = StartImage(np.zeros((1, 64, 64, 3), np.uint8), strength=float(strength))
        if left < 1:
            with pytest.raises(RequestError, match="leaves none of"):
                start.shortened(schedule)
        else:
            sigmas = start.shortened(schedule).sigmas
            np.testing.assert_array_equal(sigmas, schedule.sigmas[steps - left :])
