"""Whole runs against diffusers' `Flux2KleinKVPipeline`: same float32 weights, inputs and noise.

Compared are the latents after every step and what comes out at the end, with each backend. The
three models are diffusers' own, saved by it (`tests.checkpoints`); 16-bit artifacts are compared on
`tiny`. Prompts have room for 64 tokens, in a third of the matrix for 512, the default: with those,
most of the time is attention to padding.
"""

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinKVPipeline
from PIL import Image

from klein_kv import KleinKVPipeline
from tests.checkpoints import MODELS, load_diffusers
from tests.conftest import load_ours
from tests.runtime.conftest import Picture
from tests.tolerances import assert_close


@dataclass(frozen=True, slots=True)
class Model:
    """One of `MODELS`, exported in float32, and loaded by both pipelines."""

    checkpoint: Path
    ours: KleinKVPipeline
    theirs: Flux2KleinKVPipeline
    text_layers: tuple[int, ...]


Models = Callable[[str], Model]


@pytest.fixture(scope="module")
def models(saved_models: Any, backend: str) -> Models:
    """By name, with each backend; built when asked for."""

    @functools.cache
    def get(name: str) -> Model:
        checkpoint, artifacts, theirs = saved_models(name)
        ours = load_ours(artifacts, backend)
        return Model(checkpoint, ours, theirs, MODELS[name].text_layers)

    return get


PROMPT = "a red kite over the sea"
# Width and height; none is a multiple of 16 on both sides.
REFERENCES = [(200, 136), (150, 177), (97, 320), (130, 75)]
OUTPUTS = [(128, 192), (160, 128), (192, 160)]
STEPS = [1, 4, 8]
LONG_PROMPTS = [(0, 1), (1, 4), (2, 1), (4, 1)]  # references and steps


def run(
    pipeline: Any, seeds: tuple[int, ...] | None = (3,), **request: Any
) -> tuple[list[Any], Any]:
    """One call with fresh generators: the latents after every step, and the images."""
    latents: list[Any] = []

    def after_step(_pipe: Any, _i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        kept = tensors["latents"]
        if isinstance(kept, torch.Tensor):  # numpy has no bfloat16 of its own
            kept = kept.float().numpy()
        latents.append(np.array(kept))
        return {}

    if seeds is not None:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        request["generator"] = generators if len(generators) > 1 else generators[0]
    request.setdefault("callback_on_step_end", after_step)
    request.setdefault("max_sequence_length", 64)
    images = pipeline(**request).images
    if seeds is not None:
        states = [generator.get_state() for generator in generators]
        latents.append(torch.stack(states).numpy())
    return latents, images


def assert_same(model: Model, **request: Any) -> None:
    """Runs both pipelines and compares everything."""
    request.setdefault("text_encoder_out_layers", model.text_layers)
    ours, our_images = run(model.ours, **request)
    theirs, their_images = run_theirs(model, **request)
    assert len(ours) == len(theirs)
    *theirs, state = theirs
    if request.get("seeds", ()) is not None:
        np.testing.assert_array_equal(ours.pop(), state, "generators stand elsewhere")
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert_close("latents", "float32", mine, other, f"step {step}")
    output_type = request.get("output_type", "pil")
    assert_images_close(output_type, "float32", our_images, their_images)
    if output_type == "latent":  # numpy by contract, torch there
        their_images = their_images.numpy()
    assert type(our_images) is type(their_images)
    assert output_type == "pil" or our_images.dtype == their_images.dtype
    assert model.ours.num_timesteps == len(ours)


def run_theirs(model: Model, **request: Any) -> tuple[list[Any], Any]:
    """diffusers' results; another backend may have been compared with the same."""
    key = str(model.checkpoint), repr([_content(item) for item in sorted(request.items())])
    if key not in _THEIRS:
        _THEIRS[key] = run(model.theirs, **request)
    return _THEIRS[key]


_THEIRS: dict[tuple[str, str], tuple[list[Any], Any]] = {}


def _content(value: Any) -> Any:
    """Plain values that tell requests apart."""
    if isinstance(value, list | tuple):
        return [_content(item) for item in value]
    if isinstance(value, Image.Image):
        return value.mode, value.size, hashlib.sha256(value.tobytes()).hexdigest()
    if isinstance(value, torch.Tensor):
        return value.shape, hashlib.sha256(value.numpy().tobytes()).hexdigest()
    return value


def assert_images_close(output_type: str, precision: str, ours: Any, theirs: Any) -> None:
    graph = {"pil": "pixels", "latent": "latents"}.get(output_type, "sample")
    assert_close(graph, precision, ours, theirs, "images")


# --- the matrix ---


def request_of(references: int, steps: int, picture: Picture) -> dict[str, Any]:
    """A request with its share of batch, output and text sizes."""
    i, j = [0, 1, 2, 4].index(references), STEPS.index(steps)
    height, width = OUTPUTS[(i + j) % 3]
    request: dict[str, Any] = {
        "prompt": PROMPT,
        "image": [picture(*size, seed=k) for k, size in enumerate(REFERENCES[:references])] or None,
        "num_inference_steps": steps,
        "height": height,
        "width": width,
        "max_sequence_length": 512 if (references, steps) in LONG_PROMPTS else 64,
    }
    if (i + j) % 2:
        request |= (
            {"prompt": [PROMPT, "the same cat in snow"]} if i % 2 else {"num_images_per_prompt": 2}
        )
    return request


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("references", [0, 1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_equals_diffusers(
    name: str, references: int, steps: int, models: Models, picture: Picture
) -> None:
    request = request_of(references, steps, picture)
    assert_same(models(name), **request)


@pytest.mark.parametrize("name", MODELS)
def test_every_input_matters(name: str, models: Models, picture: Picture) -> None:
    """Otherwise the matrix would prove little: each change shows far above the tolerance."""
    one, two = picture(160, 128, seed=1), picture(160, 128, seed=2)
    request = {"prompt": PROMPT, "image": [one, two], "num_inference_steps": 2, **SMALL}

    def latents(**change: Any) -> Any:
        return run(models(name).ours, **(request | {"output_type": "latent"} | change))[1]

    base = latents()
    for change in (
        {"prompt": "snow"},
        {"image": [two, one]},
        {"image": [one]},
        {"image": None},
        {"seeds": (4,)},
        {"max_sequence_length": 80},
        {"sigmas": [1.0, 0.4]},
    ):
        assert np.abs(latents(**change) - base).max() > 1e-2, change


# --- one thing at a time ---

SMALL = {"height": 128, "width": 128}
EMBEDS = torch.randn(2, 37, 72, generator=torch.Generator().manual_seed(0))
BATCH: dict[str, Any] = {"prompt": [PROMPT, "snow"], "image": [(150, 130)]}
# Requests of two steps; pictures are their sizes, and a mode where it is not RGB.
CASES: dict[str, dict[str, Any]] = {
    "size of the first reference": {"image": [(177, 150), (300, 200)]},
    "height alone": {"height": 208, "image": [(160, 144)]},
    "width alone": {"width": 208, "image": [(160, 144)]},
    # 128 latent cells: 4,096 tokens at any number of VAE levels.
    "no size": {"output_type": "latent", "num_inference_steps": 1},
    "RGBA": {"image": [(150, 130, "RGBA")]},
    "grey": {"image": [(150, 130, "L")]},
    "palette": {"image": [(150, 130, "P")]},
    "CMYK": {"image": [(150, 130, "CMYK")]},
    "prompts times images": BATCH | {"num_images_per_prompt": 2},
    "generators": {"image": [(128, 160)], "seeds": (5, 6), "num_images_per_prompt": 2},
    # Shorter prompts are padded, on the side that the tokenizer says; the long one is cut.
    "empty prompt": {"prompt": "", **SMALL},
    "languages": {"prompt": "Café 一只红色的风筝 \U0001f3f3", **SMALL},
    "long prompt": {"prompt": "a red kite " * 80, **SMALL},
    "embeds": {"prompt": None, "prompt_embeds": EMBEDS, "image": [(128, 128)]},
    "embeds twice": {"prompt": None, "prompt_embeds": EMBEDS, "num_images_per_prompt": 2, **SMALL},
    "order of hidden states": {"text_encoder_out_layers": (27, 9, 18), **SMALL},
    "sigmas": {"image": [(128, 144)], "sigmas": [1.0, 0.7, 0.3], "num_inference_steps": 4},
    "one sigma": {"image": [(128, 144)], "sigmas": [0.9], "num_inference_steps": 4},
    "five sigmas": {"image": [(128, 144)], "sigmas": [1.0, 0.8, 0.6, 0.4, 0.2]},
    "pil": BATCH,
    "np": BATCH | {"output_type": "np"},
    "pt": BATCH | {"output_type": "pt"},
    "latent": BATCH | {"output_type": "latent"},
}
EVERY_MODEL = ["size of the first reference", "generators", "empty prompt", "languages"]
EVERY_MODEL += ["long prompt", "pil", "np", "pt", "latent"]


PAIRS = [(case, name) for name in MODELS for case in EVERY_MODEL]
PAIRS += [(case, "plain") for case in CASES if case not in {*EVERY_MODEL, "no size"}]


@pytest.mark.parametrize(("case", "name"), [*PAIRS, ("no size", "sharded")])
def test_each_argument_means_the_same(
    case: str, name: str, models: Models, picture: Picture
) -> None:
    request = {"prompt": PROMPT, "num_inference_steps": 2} | CASES[case]
    if "image" in request:
        sizes = request["image"]
        pictures = [picture(width, height).convert(*mode) for width, height, *mode in sizes]
        request["image"] = pictures if len(pictures) > 1 else pictures[0]
    assert_same(models(name), **request)


@pytest.fixture
def exact_vae(models: Models, backend: str) -> Iterator[None]:
    """diffusers' VAE in float64 for one test, unless ours is the same in float32.

    In float32 its group norms over a megapixel depend on the number of threads: the tokens of a
    smooth 1024x1024 picture were measured 5e-3 away from float64, ONNX Runtime's 1e-3.
    """
    if backend == "torch":
        yield
        return
    vae = models("sharded").theirs.vae
    torch.nn.Module.double(vae)
    yield
    torch.nn.Module.float(vae)


@pytest.mark.parametrize("size", [(1500, 900), (3000, 400)])
@pytest.mark.usefixtures("exact_vae")
def test_large_reference_is_reduced(
    size: tuple[int, int], models: Models, picture: Picture
) -> None:
    request = {
        "prompt": PROMPT,
        "image": [picture(*size)],
        "height": 128,
        "width": 160,
        "num_inference_steps": 2,
    }
    ours, _ = run(models("sharded").ours, **request)
    # Latents: the decoder does not take float32 ones now.
    theirs, _ = run(models("sharded").theirs, output_type="latent", **request)
    assert_close("latents", "float32", ours[:2], theirs[:2])


def test_images_of_a_batch_are_those_made_alone(models: Models, picture: Picture) -> None:
    ours = models("plain").ours
    request = {"image": picture(128, 160), "num_inference_steps": 2, "output_type": "latent"}
    _, both = run(ours, seeds=(5, 6), prompt=[PROMPT, "snow"], **request)
    for i, (prompt, seed) in enumerate([(PROMPT, 5), ("snow", 6)]):
        _, alone = run(ours, seeds=(seed,), prompt=prompt, **request)
        assert_close("latents", "float32", both[i : i + 1], alone)


@pytest.mark.parametrize("references", [0, 1])
def test_latents_of_ones_own(references: int, models: Models, picture: Picture) -> None:
    model = models("plain")
    noise = torch.randn(2, 128, 9, 11, generator=torch.Generator().manual_seed(0))
    request = {
        "prompt": PROMPT,
        "num_images_per_prompt": 2,
        "image": picture(160, 128) if references else None,
        "num_inference_steps": 2,
    }
    theirs, expected = run(model.theirs, seeds=None, latents=noise, **request)
    assert expected[0].size == (11 * 16, 9 * 16)
    for given in (noise, noise.numpy()):
        ours, images = run(model.ours, seeds=None, latents=given, **request)
        assert_close("latents", "float32", ours, theirs)
        assert_close("pixels", "float32", images, expected)


def test_seed_is_the_generators_noise(models: Models) -> None:
    """To a bit of each value, without torch; see `klein_kv.runtime.inputs.noise`."""
    ours = models("plain").ours
    request = {"prompt": PROMPT, "height": 128, "width": 128, "output_type": "latent"}
    _, expected = run(ours, seeds=(2**63 - 1,), **request)
    _, got = run(ours, seeds=None, seed=2**63 - 1, **request)
    assert_close("latents", "float32", got, expected)


@pytest.mark.parametrize("name", MODELS)
def test_encode_prompt(name: str, models: Models) -> None:
    model = models(name)
    prompts = [PROMPT, ""]
    expected, _ = model.theirs.encode_prompt(prompts, text_encoder_out_layers=model.text_layers)
    ours = model.ours.encode_prompt(prompts, text_encoder_out_layers=model.text_layers)
    assert_close("text_encoder", "float32", ours, expected)


def test_tuple_instead_of_output(models: Models) -> None:
    ours = models("plain").ours
    request = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 1, **SMALL}
    (images,) = ours(return_dict=False, max_sequence_length=64, **request)
    expected = ours(max_sequence_length=64, **request).images
    np.testing.assert_array_equal(images[0], expected[0])


# --- callbacks ---


def callback_of(
    change: Callable[[Any, int, dict[str, Any]], dict[str, Any]], seen: list[Any]
) -> Any:
    def callback(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((i, float(t), {name: tuple(x.shape) for name, x in tensors.items()}))
        return change(pipe, i, tensors)

    return callback


def halve(_pipe: Any, i: int, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"latents": tensors["latents"] * 0.5 + 0.1 * i}


def halve_in_place(_pipe: Any, _i: int, tensors: dict[str, Any]) -> dict[str, Any]:
    tensors["latents"] *= 0.5
    return {}


def other_text(_pipe: Any, i: int, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"prompt_embeds": tensors["prompt_embeds"] * (0.8 - 0.1 * i)}


def stop(pipe: Any, i: int, _tensors: dict[str, Any]) -> dict[str, Any]:
    pipe._interrupt = i == 1
    return {}


@pytest.mark.parametrize("change", [halve, halve_in_place, other_text, stop])
@pytest.mark.parametrize("references", [0, 1])
def test_callback_changes_the_run(
    change: Any, references: int, models: Models, picture: Picture
) -> None:
    model = models("plain")
    request = {
        "prompt": PROMPT,
        "image": picture(128, 144) if references else None,
        "height": 128,
        "width": 144,
        "num_images_per_prompt": 2,
        "output_type": "latent",
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    seen: dict[str, list[Any]] = {"ours": [], "theirs": []}
    results = [
        run(pipe, callback_on_step_end=callback_of(change, seen[name]), **request)[1]
        for name, pipe in (("ours", model.ours), ("theirs", model.theirs))
    ]
    assert_close("latents", "float32", *results)
    assert seen["ours"] == seen["theirs"]
    assert len(seen["ours"]) == (2 if change is stop else 4)
    latents, unchanged = run(model.ours, **request)
    assert len(latents) == 5, "an interrupt holds for one call: four steps, and the generator"
    assert not np.allclose(results[0], unchanged, atol=1e-2)
    assert model.ours.current_timestep is None


def test_what_a_callback_keeps_stays_what_it_was(models: Models) -> None:
    """Tensors handed out are views; their memory must outlive the call."""
    kept: list[Any] = []

    def keep(_pipe: Any, _i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        kept.extend((x, np.array(x)) for x in tensors.values())
        return {"prompt_embeds": tensors["prompt_embeds"][:]}

    run(
        models("plain").ours,
        prompt=PROMPT,
        height=128,
        width=128,
        callback_on_step_end=keep,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )
    noise = [np.full(1 << 16, 7.0, np.float32) for _ in range(64)]
    for view, copy in kept:
        np.testing.assert_array_equal(view, copy)
    del noise


# --- references ---


@pytest.mark.parametrize("name", MODELS)
def test_references_equal_images(name: str, models: Models, picture: Picture) -> None:
    """Bit for bit: with K/V at hand the first step is a cached one, and that changes nothing."""
    ours = models(name).ours
    pictures = [picture(150, 177, seed=1), picture(200, 136, seed=2)]
    references = ours.encode_references(pictures)
    sized = {"prompt": ["snow", ""], "height": 192, "width": 128}
    for request in ({"prompt": PROMPT}, sized):
        request |= {"num_inference_steps": 2}
        latents, images = run(ours, references=references, **request)
        expected, their_images = run(ours, image=pictures, **request)
        for mine, other in zip(latents, expected, strict=True):
            assert_close("first_step = references + cached", "float32", mine, other)
        assert_close("pixels", "float32", images, their_images)


# --- the signature ---


def test_call_takes_diffusers_arguments() -> None:
    ours = inspect.signature(KleinKVPipeline.__call__).parameters
    theirs = inspect.signature(Flux2KleinKVPipeline.__call__).parameters
    assert list(ours) == [*theirs, "references", "seed"]
    for name, parameter in theirs.items():
        assert ours[name].kind == parameter.kind
        expected = parameter.default
        if isinstance(expected, list):  # a list as a default is shared by all calls
            expected = tuple(expected)
        assert ours[name].default == expected, name
    assert ours["references"].default is None
    assert ours["seed"].default is None


def test_arguments_may_come_in_diffusers_order(models: Models, picture: Picture) -> None:
    model, image = models("plain"), picture(128, 128)
    order = (image, PROMPT, 128, 144, 1, None, 2)
    ours = model.ours(*order, torch.Generator().manual_seed(1)).images
    theirs = model.theirs(*order, torch.Generator().manual_seed(1)).images
    assert_close("pixels", "float32", ours, theirs)


def test_prompt_may_come_first(models: Models, picture: Picture) -> None:
    ours = models("plain").ours
    request = {"image": picture(128, 128), "seed": 1, "num_inference_steps": 1}
    request["max_sequence_length"] = 64
    for prompt in (PROMPT, [PROMPT]):
        images = ours(prompt, **request).images
        np.testing.assert_array_equal(images[0], ours(prompt=PROMPT, **request).images[0])


# --- 16 bits ---


@dataclass(frozen=True, slots=True)
class Narrow:
    """The tiny model in 16 bits, and diffusers' pipeline in the same type."""

    precision: str
    ours: KleinKVPipeline
    theirs: Flux2KleinKVPipeline


# ONNX Runtime does not compute bfloat16 on a CPU.
NARROW = [("onnxruntime", "float16"), ("torch", "float16"), ("torch", "bfloat16")]


@pytest.fixture(scope="module")
def narrow_models(
    tiny_checkpoint: Path, tiny_fp16_artifacts: Path, tiny_bf16_artifacts: Path
) -> Callable[[str, str], Narrow]:
    """By backend and type; pytest would open each anew whenever tests of another come between."""
    artifacts = {"float16": tiny_fp16_artifacts, "bfloat16": tiny_bf16_artifacts}

    @functools.cache
    def get(backend: str, precision: str) -> Narrow:
        theirs = load_diffusers(tiny_checkpoint, getattr(torch, precision))
        return Narrow(precision, load_ours(artifacts[precision], backend), theirs)

    return get


@pytest.fixture(params=NARROW, ids="-".join)
def narrow(request: pytest.FixtureRequest, narrow_models: Callable[[str, str], Narrow]) -> Narrow:
    return narrow_models(*request.param)


@pytest.mark.parametrize(
    ("narrow", "size", "references"),
    [
        pytest.param(pair, size, references, id=f"{'-'.join(pair)}-{size[0]}-{references}")
        for pair in NARROW
        for size in [(128, 160), (256, 192)]
        for references in [0, 1, 2]
        # The larger size with the most references only: it is other numbers of tokens, no other
        # code. And torch takes seconds for a float16 convolution of one image on a CPU.
        if (size == (128, 160) or references == 2)
        and (pair != ("torch", "float16") or (size, references) == ((128, 160), 1))
    ],
    indirect=["narrow"],
)
def test_sixteen_bits(
    size: tuple[int, int],
    references: int,
    narrow: Narrow,
    tiny_theirs: Flux2KleinKVPipeline,
    picture: Picture,
) -> None:
    """Against diffusers in the same type, which rounds in other places but as often."""
    request = {
        "prompt": PROMPT,
        "image": [picture(*size, seed=k) for k, size in enumerate(REFERENCES[:references])] or None,
        "num_images_per_prompt": 2,
        "height": size[0],
        "width": size[1],
    }
    latents, pixels = run(narrow.ours, **request)
    their_latents, their_pixels = run(narrow.theirs, **request)
    np.testing.assert_array_equal(latents.pop(), their_latents.pop(), "generators stand elsewhere")
    assert latents[-1].dtype.name == narrow.precision
    assert_close("latents", narrow.precision, latents, their_latents)
    assert_close("pixels", narrow.precision, pixels, their_pixels)

    # Neither is close to float32: timesteps are rounded too, up to some units of 1000.
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 128, size[0] // 16, size[1] // 16, generator=generator)
    noise = noise.to(getattr(torch, narrow.precision))
    results = [
        np.array(run(pipe, None, latents=noise, output_type="latent", **request)[1], np.float32)
        if pipe is narrow.ours
        else run(pipe, None, latents=noise, output_type="latent", **request)[1].float().numpy()
        for pipe in (narrow.ours, narrow.theirs, tiny_theirs)
    ]
    ours, theirs = (np.abs(result - results[2]) for result in results[:2])
    assert ours.max() < 1.1 * theirs.max()
    assert ours.mean() < 1.1 * theirs.mean()


@pytest.mark.parametrize("output_type", ["np", "pt", "latent"])
def test_sixteen_bit_output_types(output_type: str, narrow: Narrow) -> None:
    request = {"height": 128, "width": 128, "output_type": output_type, "num_inference_steps": 1}
    _, ours = run(narrow.ours, prompt=PROMPT, **request)
    _, theirs = run(narrow.theirs, prompt=PROMPT, **request)
    assert_images_close(output_type, narrow.precision, ours, theirs)
    assert str(theirs.dtype).removeprefix("torch.") == str(ours.dtype).removeprefix("torch.")
