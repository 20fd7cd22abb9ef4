"""Requests to calibrate with."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from klein_kv.errors import RequestError
from klein_kv.export.checks.samples import PROMPTS, made_up_image, make_samples


def test_made_up_requests_repeat_themselves_and_differ_from_each_other() -> None:
    samples, again = make_samples(5, size=(96, 64)), make_samples(5, size=(96, 64))
    assert [len(sample.images) for sample in samples] == [1, 2, 0, 1, 2]
    assert [sample.prompt for sample in samples] == list(PROMPTS[:5])
    for one, two in zip(samples, again, strict=True):
        assert (one.prompt, one.seed, one.width, one.height) == (two.prompt, two.seed, 96, 64)
        assert [x.tobytes() for x in one.images] == [x.tobytes() for x in two.images]
    pictures = [image.tobytes() for sample in samples for image in sample.images]
    assert len(set(pictures)) == len(pictures) == 6
    other = make_samples(1, size=(96, 64), seed=1000)[0]
    assert other.images[0].tobytes() not in pictures
    assert other.seed == 1000


def test_made_up_images_vary_smoothly_and_sharply() -> None:
    pixels = np.asarray(made_up_image(128, 96, 3)).astype(float)
    assert pixels.shape == (96, 128, 3)
    assert pixels.std() > 15
    neighbours = np.corrcoef(pixels[:, 1:].ravel(), pixels[:, :-1].ravel())[0, 1]
    assert 0.7 < neighbours < 0.999  # noise has 0, a gradient 1
    colours = np.corrcoef(pixels[..., 0].ravel(), pixels[..., 1].ravel())[0, 1]
    assert 0.3 < colours < 0.999


def test_the_users_own(tmp_path: Path) -> None:
    for i, size in enumerate([(200, 100), (64, 80), (3000, 2000)]):
        Image.new("RGB", size, (i, i, i)).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no image")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("first\n\n  second  \n", encoding="utf-8")
    samples = make_samples(4, images=tmp_path, prompts=prompts)
    assert [sample.prompt for sample in samples] == ["first", "second", "first", "second"]
    assert [[x.size for x in s.images] for s in samples] == [
        [(200, 100)],
        [(64, 80), (3000, 2000)],
        [],
        [(200, 100)],
    ]
    # The first reference's size in whole tokens, but not smaller than klein makes.
    assert [(s.width, s.height) for s in samples] == [
        (192, 128),
        (128, 128),
        (512, 512),
        (192, 128),
    ]
    (large,) = make_samples(1, images=_folder(tmp_path / "large", (3000, 2000)))
    assert (large.width, large.height) == (1248, 832)


def _folder(path: Path, size: tuple[int, int]) -> Path:
    path.mkdir()
    Image.new("RGB", size).save(path / "a.jpg")
    return path


def test_refuses_nothing_at_all(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    for arguments, message in (
        ({"count": 0}, "samples is 0"),
        ({"count": 1, "images": tmp_path}, "holds no image"),
        ({"count": 1, "images": tmp_path / "none"}, "is no folder"),
        ({"count": 1, "prompts": tmp_path / "none"}, "cannot be read"),
        ({"count": 1, "prompts": tmp_path / "empty.txt"}, "holds no text"),
    ):
        with pytest.raises(RequestError, match=message):
            make_samples(**arguments)  # type: ignore[arg-type]
