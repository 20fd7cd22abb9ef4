"""Edits inside a mask against diffusers' `Flux2KleinInpaintPipeline`: same weights, inputs, noise.

diffusers has no such pipeline for KV weights: there the same class is the judge, with its KV
transformer in it.
"""

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinInpaintPipeline, Flux2KleinKVPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from klein_kv import KleinKVInpaintPipeline, KleinKVPipeline
from klein_kv.artifacts.manifest import Manifest
from klein_kv.cli import main
from klein_kv.errors import ArtifactError, RequestError
from klein_kv.runtime.inputs.masks import mask_pixels, mask_tokens
from tests.conftest import load_ours
from tests.runtime.conftest import Picture, Watch
from tests.tolerances import assert_close

PROMPT = "a red kite over the sea"
SHORT: dict[str, Any] = {"prompt": PROMPT, "max_sequence_length": 32}


class KVTransformer:
    """diffusers' KV transformer behind the calls of a pipeline that knows no K/V."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._cache: Any = None
        self.config, self.dtype = module.config, module.dtype
        self.cache_context = module.cache_context

    def __call__(self, hidden_states: Any, img_ids: Any, timestep: Any, **rest: Any) -> Any:
        count = int((img_ids[0, :, 0] == 0).sum())  # tokens of the image itself, which come first
        image, references = hidden_states[:, :count], hidden_states[:, count:]
        rest["timestep"] = timestep
        if self._cache is None:
            noise, self._cache = self._module(
                hidden_states=torch.cat([references, image], dim=1),
                img_ids=torch.cat([img_ids[:, count:], img_ids[:, :count]], dim=1),
                kv_cache_mode="extract",
                num_ref_tokens=references.shape[1],
                **rest,
            )
        else:
            (noise,) = self._module(
                hidden_states=image,
                img_ids=img_ids[:, :count],
                kv_cache=self._cache,
                kv_cache_mode="cached",
                **rest,
            )
        return (torch.cat([noise, torch.zeros_like(references)], dim=1),)

    def forget(self) -> None:
        self._cache = None


class Theirs:
    """diffusers' pipeline, with what it does wrong put right."""

    def __init__(self, pipe: Flux2KleinInpaintPipeline) -> None:
        self.pipe = pipe
        pipe.set_progress_bar_config(disable=True)
        # Its own processor cuts a piece of the region's size out of the result (diffusers 0.42.1),
        # where the class it comes from makes the result as small as the region.
        pipe.image_processor.apply_overlay = VaeImageProcessor().apply_overlay
        self._known: dict[str, Any] = {}

    def __call__(self, name: str, request: dict[str, Any]) -> tuple[list[Any], Any]:
        """Latents and images of a case; the backends share them."""
        if name not in self._known:
            if isinstance(self.pipe.transformer, KVTransformer):
                self.pipe.transformer.forget()
            self._known[name] = run(self.pipe, **request, guidance_scale=1.0)
        return self._known[name]


def run(pipe: Any, **request: Any) -> tuple[list[Any], Any]:
    """Latents after each step, the generator's state at the end; and the images."""
    latents: list[Any] = []

    def after_step(_pipe: Any, _i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents.append(np.array(torch.as_tensor(tensors["latents"]).numpy()))
        return {}

    generator = torch.Generator().manual_seed(3)
    images = pipe(generator=generator, callback_on_step_end=after_step, **request).images
    return [*latents, generator.get_state().numpy()], images


@pytest.fixture(scope="session")
def theirs(plain_checkpoint: Path, tiny_theirs: Flux2KleinKVPipeline) -> Callable[[str], Theirs]:
    plain = Flux2KleinInpaintPipeline.from_pretrained(plain_checkpoint)
    kv = Flux2KleinInpaintPipeline(**tiny_theirs.components)
    kv.transformer = KVTransformer(tiny_theirs.transformer)
    return {"plain": Theirs(plain), "kv": Theirs(kv)}.__getitem__


@pytest.fixture(scope="module")
def ours(
    plain_artifacts: Path, any_ours: KleinKVPipeline, backend: str
) -> Callable[[str], KleinKVInpaintPipeline]:
    plain = load_ours(plain_artifacts, backend)
    pipes = {"plain": plain, "kv": any_ours}
    return lambda variant: KleinKVInpaintPipeline.from_pipe(pipes[variant])


def patch(width: int, height: int, soft: bool = False) -> Image.Image:
    """A white ellipse right of the middle, with an edge as wide as a token where it is soft."""
    y, x = np.mgrid[:height, :width]
    far = np.hypot((x / width - 0.6) / 0.3, (y / height - 0.5) / 0.25)
    values = np.clip((1.3 - far) * (3 if soft else 1e6), 0, 1)
    return Image.fromarray((values * 255).astype(np.uint8))


def cases(picture: Picture) -> dict[str, dict[str, Any]]:
    whole, other = picture(128, 96, 1), picture(150, 130, 2)
    sides = np.zeros((2, 96, 128), np.float32)
    sides[0, :, :50], sides[1, 40:] = 1, 1
    return {
        "a little": {"image": whole, "mask_image": patch(128, 96), "strength": 0.3}
        | {"num_inference_steps": 8},
        "with a reference, soft": {"image": other, "mask_image": patch(150, 130, soft=True)}
        | {"image_reference": picture(97, 120, 4), "num_inference_steps": 4},
        "two prompts, two masks": {"image": whole, "mask_image": sides, "strength": 1.0}
        | {"prompt": [PROMPT, "snow"], "num_inference_steps": 1, "num_images_per_prompt": 2},
        "a region": {"image": other, "mask_image": patch(150, 130), "padding_mask_crop": 4}
        | {"image_reference": picture(64, 80, 5), "strength": 0.6, "num_inference_steps": 5},
        "sigmas of one's own, white": {"image": whole, "mask_image": torch.ones(1, 1, 96, 128)}
        | {"sigmas": [0.9, 0.6, 0.4, 0.2], "strength": 0.75, "num_inference_steps": 4},
        "latents of one's own": {"image": whole, "mask_image": patch(128, 96), "strength": 0.5}
        | {"latents": torch.randn(1, 128, 6, 8, generator=torch.Generator().manual_seed(1))}
        | {"num_inference_steps": 2, "output_type": "np"},
    }


NAMES = list(cases(lambda w, h, _=0: Image.new("RGB", (w, h))))


@pytest.mark.parametrize("variant", ["plain", "kv"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_diffusers(
    name: str, variant: str, ours: Any, theirs: Any, picture: Picture
) -> None:
    request = SHORT | cases(picture)[name]
    (*latents, state), images = run(ours(variant), **request)
    (*expected, their_state), their_images = theirs(variant)(name, request)
    assert len(latents) == len(expected)
    np.testing.assert_array_equal(state, their_state)
    for step, (mine, other) in enumerate(zip(latents, expected, strict=True)):
        assert_close("latents", "float32", mine, other, f"step {step}")
        np.testing.assert_allclose(mine, other, atol=1e-4)
    kind = "sample" if request.get("output_type") == "np" else "pixels"
    assert_close(kind, "float32", images, their_images)


def test_a_white_mask_is_none(ours: Any, picture: Picture) -> None:
    """Image to image, bit for bit; at full strength an edit with the image as reference."""
    pipe, image = ours("kv"), picture(128, 96, 1)
    request = SHORT | {"image": image, "seed": 2, "output_type": "np"}
    for strength in (0.5, 1.0):
        white = pipe(**request, mask_image=np.ones((96, 128)), strength=strength).images
        np.testing.assert_array_equal(pipe(**request, strength=strength).images, white)
    edit = KleinKVPipeline.from_pipe(pipe)(**request).images
    np.testing.assert_array_equal(edit, white)


def test_outside_the_mask_latents_are_the_image(ours: Any, picture: Picture) -> None:
    pipe, image, mask = ours("kv"), picture(128, 96, 1), patch(128, 96)
    request = SHORT | {"image": image, "num_inference_steps": 3}
    (*latents, _), _ = run(pipe, mask_image=mask, **request)
    (*nothing, _), round_trip = run(pipe, mask_image=Image.new("L", mask.size), **request)
    outside = mask_tokens(mask_pixels(mask, (96, 128)), 16)[0, :, 0] == 0
    assert 0.2 < outside.mean() < 0.9
    np.testing.assert_array_equal(latents[-1][:, outside], nothing[-1][:, outside])
    assert np.abs(latents[-1][:, ~outside] - nothing[-1][:, ~outside]).mean() > 0.1
    decoded = KleinKVPipeline.from_pipe(pipe)  # the image through the VAE and back
    tokens = decoded.encoder.tokens(decoded.encoder.prepare([image]))["ref_hidden_states"]
    np.testing.assert_array_equal(decoded.session.download(tokens), nothing[-1])
    assert round_trip[0].size == image.size


def test_keys_and_values_are_known_the_second_time(
    tiny_artifacts: Path, backend: str, picture: Picture, watch: Watch
) -> None:
    """Another mask, another prompt: cached steps alone. And a hit is what a miss is."""
    pipe = KleinKVInpaintPipeline.from_pretrained(tiny_artifacts, backend=backend, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    runs = watch(pipe)
    masks = patch(128, 96), Image.new("L", (128, 96), 255)
    request = {"image": picture(128, 96, 1), "image_reference": picture(64, 64, 2)}
    request |= {"seed": 5, "strength": 0.75, "output_type": "np", "max_sequence_length": 32}

    def edit(mask: Image.Image, prompt: str) -> Any:
        runs.clear()
        return pipe(prompt, mask_image=mask, **request).images  # type: ignore[arg-type, union-attr]

    first = edit(masks[0], PROMPT)
    steps = [run.graph for run in runs if run.graph not in ("text_encoder", "vae_encoder")]
    begin = ["blend", "first_step", "blend"]
    assert steps == [*begin, *2 * ["cached_step", "blend"], "vae_decoder"]
    for mask, prompt in ((masks[1], "snow"), (masks[0], PROMPT)):
        again = edit(mask, prompt)
        assert "first_step" not in {run.graph for run in runs}
        assert [run.graph for run in runs].count("cached_step") == 3
        assert pipe.timings.blend > 0
        assert pipe.num_timesteps == 3
    np.testing.assert_array_equal(again, first)
    runs.clear()  # the same references, in the other pipeline
    other = KleinKVPipeline.from_pipe(pipe)
    other(**SHORT, image=[request["image"], request["image_reference"]], seed=1)
    assert "first_step" not in {run.graph for run in runs}


def test_one_pipeline_with_two_faces(tiny_artifacts: Path) -> None:
    pipe = KleinKVPipeline.from_pretrained(tiny_artifacts)
    other = KleinKVInpaintPipeline.from_pipe(pipe)
    assert other.session is pipe.session
    pipe.check_finite = False
    assert not other.check_finite
    other.close()
    with pytest.raises(RequestError, match="closed"):
        pipe(PROMPT)


def test_arguments_are_diffusers() -> None:
    """Names, order and defaults, but for guidance and steps; what is added comes last."""
    theirs = inspect.signature(Flux2KleinInpaintPipeline.__call__).parameters
    mine = inspect.signature(KleinKVInpaintPipeline.__call__).parameters
    expected = [x for x in theirs if x not in ("guidance_scale", "negative_prompt_embeds")]
    assert list(mine) == [*expected, "seed", "mask_blur", "overlay"]
    for name in expected:
        default = theirs[name].default
        default = tuple(default) if isinstance(default, list) else default
        assert mine[name].default == (4 if name == "num_inference_steps" else default), name


def test_sizes(tiny_ours: KleinKVPipeline, picture: Picture) -> None:
    """The image's, or what is asked for; with a region, the original's."""
    pipe = KleinKVInpaintPipeline.from_pipe(tiny_ours)
    image, mask = picture(150, 130, 2), patch(150, 130)
    request = SHORT | {"mask_image": mask, "num_inference_steps": 1, "seed": 0}
    (one,), (asked,), (region,) = (
        pipe(image=image, **request, **sizes).images
        for sizes in ({}, {"height": 96, "width": 192}, {"padding_mask_crop": 2})
    )
    assert (one.size, asked.size, region.size) == ((144, 128), (192, 96), (150, 130))
    black = np.asarray(mask) == 0
    np.testing.assert_array_equal(np.asarray(region)[black], np.asarray(image)[black])


def test_overlaid_pixels_are_the_images(tiny_ours: KleinKVPipeline, picture: Picture) -> None:
    """Each result over the image, where its own mask is black; soft edges mix both."""
    pipe = KleinKVInpaintPipeline.from_pipe(tiny_ours)
    image, edge = picture(128, 96, 1), patch(128, 96, soft=True)
    masks = [edge, Image.fromarray(255 - np.asarray(edge))]
    request = SHORT | {"image": image, "num_inference_steps": 1, "seed": 0, "mask_image": masks}
    request["prompt"] = [PROMPT, "snow"]
    plain, laid = (pipe(**request, overlay=overlay).images for overlay in (False, True))
    for made, result, mask in zip(plain, laid, masks, strict=True):
        expected = VaeImageProcessor().apply_overlay(mask, image, made)
        difference = np.asarray(result, np.int16) - np.asarray(expected)
        assert np.abs(difference).max() <= 1
        for value, same in ((0, image), (255, made)):
            at = np.asarray(mask) == value
            np.testing.assert_array_equal(np.asarray(result)[at], np.asarray(same)[at])
        assert made.tobytes() != result.tobytes() != image.tobytes()


def test_warming_up_runs_what_a_call_runs(
    tiny_artifacts: Path, watch: Watch, picture: Picture
) -> None:
    pipe = KleinKVInpaintPipeline.from_pretrained(tiny_artifacts)
    pipe.set_progress_bar_config(disable=True)
    runs = watch(pipe)
    with pytest.raises(RequestError, match="at most the area of 1024x1024"):
        pipe.warm_up(1024, 1040)
    pipe.warm_up(96, 128, [(64, 80)], max_sequence_length=16)
    warm = [run.graph for run in runs if run.graph != "encode_references"]
    runs.clear()
    request = {"image": picture(128, 96), "image_reference": picture(80, 64)}
    pipe(PROMPT, mask_image=patch(128, 96), max_sequence_length=16, seed=0, **request)  # type: ignore[arg-type]
    assert warm == [run.graph for run in runs]


BLACK = Image.new("L", (128, 96))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": None}, "image is None, expected the PIL image"),
        ({"image": np.zeros((96, 128, 3))}, "ndarray, expected a PIL"),
        ({"image": Image.new("RGB", (32, 640))}, "at least 64 pixels"),
        ({"mask_image": "mask.png"}, r"mask_image is a str of shape \(\)"),
        ({"mask_image": []}, "empty list"),
        ({"mask_image": np.zeros((96, 128), np.uint8)}, "uint8 values, expected truth values"),
        ({"mask_image": np.full((96, 128), np.nan)}, "expected truth values or numbers in 0..1"),
        ({"mask_image": np.zeros((1, 96, 128, 3))}, r"shape \(1, 96, 128, 3\)"),
        ({"mask_image": Image.new("I;16", (8, 8))}, "image of mode I;16"),
        ({"mask_image": np.zeros((3, 96, 128))}, "3 masks for a batch of 2"),
        ({"strength": 0.0}, r"strength is 0.0, which leaves none of 4 steps.* 0.25 for one"),
        ({"strength": 1.5}, "strength is 1.5, expected a number in 0..1"),
        ({"strength": None}, "strength is None"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"height": 100}, "height is 100, expected a multiple of 16"),
        ({"height": 1024, "width": 1040}, "at most the area of 1024x1024"),
        ({"padding_mask_crop": 8, "mask_image": BLACK}, "mask_image is black"),
        ({"padding_mask_crop": -1}, "padding_mask_crop is -1"),
        ({"padding_mask_crop": 8, "mask_image": None}, "mask_image is a NoneType"),
        ({"padding_mask_crop": 8, "output_type": "np"}, "expected 'pil' with padding_mask_crop"),
        ({"overlay": True, "output_type": "np"}, "expected 'pil' with overlay"),
        ({"mask_blur": -1}, "mask_blur is -1"),
        ({"mask_blur": 3, "mask_image": np.ones((96, 128))}, "mask_image is a ndarray"),
        ({"latents": np.zeros((2, 128, 8, 8), np.float32)}, "latents has shape"),
    ],
)
@pytest.mark.usefixtures("no_graph_runs")
def test_bad_requests(
    changes: dict[str, Any], message: str, tiny_ours: KleinKVPipeline, picture: Picture
) -> None:
    pipe = KleinKVInpaintPipeline.from_pipe(tiny_ours)
    request = {"image": picture(128, 96), "mask_image": patch(128, 96), "seed": 0}
    with pytest.raises(RequestError, match=message):
        pipe(["", ""], **request | changes)  # type: ignore[arg-type]


def test_artifacts_without_the_graph(
    tiny_artifacts: Path, tmp_path: Path, picture: Picture
) -> None:
    """Of an earlier klein-kv: they run as they did, and say what a mask needs."""
    folder = shutil.copytree(tiny_artifacts, tmp_path / "old", symlinks=True)
    shutil.rmtree(folder / "latents")
    manifest = json.loads((folder / "klein.json").read_text())
    manifest["files"] = {x: y for x, y in manifest["files"].items() if not x.startswith("latents/")}
    (folder / "klein.json").write_text(json.dumps(manifest))
    pipe = KleinKVInpaintPipeline.from_pipe(load_ours(folder))
    again = Manifest.load(tiny_artifacts)
    assert pipe.manifest.model_digest == again.model_digest, "saved references stay valid"
    request = SHORT | {"image": picture(64, 64), "num_inference_steps": 2, "seed": 0}
    pipe(strength=1, **request)
    for changes in ({"strength": 0.5}, {"mask_image": np.ones((64, 64))}):
        with pytest.raises(ArtifactError, match=r"lacks the graph `blend`.*export the checkpoint"):
            pipe(**request, **changes)


def test_command(
    tiny_artifacts: Path,
    tiny_ours: KleinKVPipeline,
    tmp_path: Path,
    picture: Picture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    picture(128, 96).save(tmp_path / "init.png")
    patch(128, 96).save(tmp_path / "mask.png")
    out, arguments = tmp_path / "out.png", ["-p", PROMPT, "--steps", "2", "--seed", "1", "-q"]
    arguments += ["--init", str(tmp_path / "init.png"), "-o", str(out)]
    mask = ["--mask", str(tmp_path / "mask.png"), "--strength", "0.5"]
    assert main(["generate", str(tiny_artifacts), *arguments, *mask]) == 0
    pipe: Any = KleinKVInpaintPipeline.from_pipe(tiny_ours)
    request = {"image": picture(128, 96), "mask_image": patch(128, 96), "strength": 0.5}
    request["overlay"] = True
    (expected,) = pipe(PROMPT, **request, num_inference_steps=2, seed=1).images
    with Image.open(out) as image:
        assert image.tobytes() == expected.tobytes()
        assert "Denoising strength: 0.5" in image.info["parameters"]
    assert main(["generate", str(tiny_artifacts), "-p", PROMPT, *mask]) == 1
    assert "--mask belongs to --init" in capsys.readouterr().err
