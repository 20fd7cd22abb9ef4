"""What a preview needs; that it resembles the image is tested on pocket."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from klein_kv import KleinKVPipeline
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.preview_matrix import PREVIEW
from klein_kv.errors import ArtifactError, RequestError
from klein_kv.runtime.outputs.preview import Previews
from klein_kv.schedule import make_schedule


@pytest.mark.parametrize(
    ("grid", "size"), [((2, 3), (48, 32)), ((64, 32), (256, 512)), ((20, 100), (512, 102))]
)
def test_sizes_are_those_of_the_image_up_to_512(
    grid: tuple[int, int], size: tuple[int, int], tiny_ours: KleinKVPipeline
) -> None:
    latents = np.random.default_rng(0).standard_normal((2, 128, *grid)).astype(np.float16)
    latents[0, 0, 0] = np.nan
    latents[1, 0, 0] = np.inf
    assert [picture.size for picture in tiny_ours.preview(latents)] == [size, size]


@pytest.mark.parametrize("shape", [(1, 128, 4), (1, 64, 4, 4), (1, 128, 0, 4)])
def test_latents_of_another_shape_are_refused(
    shape: tuple[int, ...], tiny_ours: KleinKVPipeline
) -> None:
    with pytest.raises(RequestError, match=r"expected \[batch, 128, height / 16, width / 16\]"):
        tiny_ours.preview(np.zeros(shape, np.float32))


def test_folders_of_before_open_and_have_none(tiny_artifacts: Path) -> None:
    manifest = Manifest.load(tiny_artifacts)
    files = {name: record for name, record in manifest.files.items() if name != PREVIEW}
    assert len(files) == len(manifest.files) - 1
    older = replace(manifest, files=files)
    assert older.model_digest == manifest.model_digest
    with pytest.raises(ArtifactError, match="exported before there were previews"):
        Previews(tiny_artifacts, older).make(np.zeros((1, 128, 2, 2), np.float32))


def test_denoised_is_what_all_of_the_prediction_leaves(
    any_ours: KleinKVPipeline, picture: Callable[..., Image.Image]
) -> None:
    """Between two steps the latents move along the prediction, which so is known from them."""
    latents, denoised = [], []

    def look(_pipe: Any, _i: int, _t: float, tensors: dict[str, Any]) -> None:
        latents.append(tensors["latents"].transpose(0, 2, 1).reshape(2, 128, 3, 4))
        denoised.append(tensors["denoised"])

    any_ours(
        "a kite",
        image=picture(64, 64),
        height=48,
        width=64,
        num_images_per_prompt=2,
        sigmas=[1.0, 0.7, 0.2],
        seed=0,
        callback_on_step_end=look,
        callback_on_step_end_tensor_inputs=["latents", "denoised"],
    )
    sigmas = make_schedule(any_ours.manifest.scheduler, 4, 12, [1.0, 0.7, 0.2]).sigmas
    for i in (1, 2):
        prediction = (latents[i] - latents[i - 1]) / (sigmas[i + 1] - sigmas[i])
        expected = latents[i] - sigmas[i + 1] * prediction
        np.testing.assert_allclose(denoised[i], expected, atol=1e-4)
    assert np.array_equal(denoised[-1], latents[-1])
    assert not np.allclose(denoised[0], latents[0], atol=0.1)
