"""Requests: what is refused, before anything is computed, and what the results carry."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from PIL import Image

import klein_kv
from klein_kv import KleinKVPipeline
from klein_kv.errors import ArtifactError, BackendError, CapacityError, RequestError
from klein_kv.runtime import maker
from tests.runtime.conftest import Picture

PROMPT = "a red kite over the sea"
LATENTS = np.zeros((1, 128, 8, 8), np.float32)
EMBEDS = np.zeros((1, 7, 96), np.float32)
PICTURE = Image.new("RGB", (64, 64))
NARROW = Image.new("RGB", (32, 640))
# Of what is computed: prompts of few tokens, one step.
SMALL: dict[str, Any] = {"max_sequence_length": 64, "num_inference_steps": 1}
SQUARE: dict[str, Any] = {"height": 128, "width": 128, **SMALL}


# --- refused ---


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        # size
        ({"height": 200}, "height is 200, expected a multiple of 16 from 16 to 65536"),
        ({"width": 136}, "width is 136, expected a multiple of 16"),
        ({"height": 8}, "height is 8"),
        ({"width": 65552}, "width is 65552"),
        (
            {"height": 4112},
            "output is 1024x4112, 4.2 megapixels, expected at most the area of 2048",
        ),
        ({"height": 2048, "width": 2064}, "output is 2064x2048"),
        ({"latents": np.zeros((1, 128, 129, 128), np.float32)}, "output is 2048x2064"),
        ({"height": 0}, "height is 0"),
        ({"width": -128}, "width is -128"),
        ({"height": 256.0}, "height is 256.0"),
        ({"width": "256"}, "width is '256'"),
        ({"height": True}, "height is True"),
        # prompt
        ({"prompt": None}, "one of prompt and prompt_embeds, got neither"),
        ({"prompt_embeds": EMBEDS}, "one of prompt and prompt_embeds, got both"),
        ({"prompt": []}, "expected a text or a list of texts"),
        ({"prompt": 5}, "prompt is 5"),
        ({"prompt": ("a", "b")}, "expected a text or a list of texts"),
        ({"prompt": ["a", None]}, "expected a text or a list of texts"),
        ({"prompt": "half a pair \ud800"}, "lone surrogate"),
        (
            {"prompt": None, "prompt_embeds": EMBEDS[0]},
            r"shape \(7, 96\), expected \[batch, tokens",
        ),
        ({"prompt": None, "prompt_embeds": EMBEDS[..., :95]}, r"shape \(1, 7, 95\)"),
        ({"prompt": None, "prompt_embeds": EMBEDS[:, :0]}, r"shape \(1, 0, 96\)"),
        ({"prompt": None, "prompt_embeds": np.zeros((1, 4097, 96))}, "at most 4096"),
        ({"prompt": None, "prompt_embeds": EMBEDS.astype(int)}, "dtype int64, expected floating"),
        ({"prompt": None, "prompt_embeds": EMBEDS * np.nan}, "not finite"),
        ({"prompt": None, "prompt_embeds": "text"}, "prompt_embeds has dtype"),
        ({"max_sequence_length": 0}, "max_length is 0"),
        ({"max_sequence_length": 4097}, "max_sequence_length is 4097, expected at most 4096"),
        ({"max_sequence_length": "512"}, "max_length is '512'"),
        ({"max_sequence_length": None}, "max_length is None"),
        ({"text_encoder_out_layers": (9, 18, 26)}, "the artifacts hold .*--text-layers"),
        ({"text_encoder_out_layers": (9, 18)}, "the artifacts hold"),
        # counts
        ({"num_inference_steps": 0}, "num_inference_steps is 0, expected 1 to 50"),
        ({"num_inference_steps": 51}, "num_inference_steps is 51, expected 1 to 50"),
        ({"num_inference_steps": 4.0}, r"num_inference_steps is 4\.0"),
        ({"num_inference_steps": True}, "num_inference_steps is True"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0, expected 1 or more"),
        ({"num_images_per_prompt": None}, "num_images_per_prompt is None"),
        ({"sigmas": []}, "sigmas"),
        ({"sigmas": [1.0, 1.5]}, r"expected numbers in \[0, 1\]"),
        ({"sigmas": [900, 500]}, "divided by 1000"),
        ({"sigmas": "abc"}, "sigmas"),
        # noise
        (
            {"seed": -(2**63) - 1},
            r"seed is -9\d+9, expected an integer from -2\*\*63 to 2\*\*64 - 1",
        ),
        ({"seed": 2**64}, r"seed is 1\d+6, expected"),
        ({"seed": "0"}, "seed is '0'"),
        ({"seed": 1, "generator": torch.Generator()}, "both generator and seed"),
        ({"generator": 5}, r"expected a torch\.Generator"),
        ({"generator": [torch.Generator()] * 3}, "3 generators for a batch of 1"),
        ({"latents": LATENTS[:, :64]}, r"latents has shape \(1, 64, 8, 8\)"),
        ({"latents": LATENTS[0]}, "latents has shape"),
        ({"latents": LATENTS, "height": 256}, "latents has shape"),
        ({"latents": LATENTS, "num_images_per_prompt": 2}, "latents has shape"),
        ({"latents": np.zeros((1, 128, 8, 4097), np.float32)}, "at most 4096 tokens a side"),
        ({"latents": LATENTS.astype(np.int32)}, "latents has dtype int32"),
        ({"latents": LATENTS + np.inf}, "latents holds values that are not finite"),
        # the rest
        ({"output_type": "jpeg"}, "'pil', 'np', 'pt' or 'latent'"),
        ({"output_type": None}, "output_type is None"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"names \['noise'\]"),
        ({"references": [PICTURE]}, "references is a list, expected a set"),
        ({"image": PICTURE, "references": 1}, "both image and references"),
        ({"image": "photo.png"}, "reference image is a str"),
        ({"image": np.zeros((64, 64, 3), np.uint8)}, "reference image is a ndarray"),
        ({"image": [PICTURE, None]}, "reference image is a NoneType"),
        ({"image": Image.new("RGB", (63, 64))}, "63x64, expected at least 64 pixels on each side"),
        ({"image": Image.new("RGB", (64, 513))}, "expected at most 8:1"),
    ],
)
@pytest.mark.usefixtures("no_graph_runs")
def test_bad_request(request_: dict[str, Any], message: str, tiny_ours: KleinKVPipeline) -> None:
    """One clear error; no graph has run, and the generator stands where it stood."""
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    request = {"prompt": PROMPT} | request_
    if "seed" not in request and "latents" not in request:
        request.setdefault("generator", generator)
    with pytest.raises(RequestError, match=message) as caught:
        tiny_ours(**request)
    assert isinstance(caught.value, ValueError)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: x("kite", prompt="kite"), RequestError, "another prompt or positional argument"),
        (lambda x: x("kite", PICTURE), RequestError, "pass the rest by name"),
        (lambda x: x("kite", guidance_scale=4.0), TypeError, "guidance_scale"),
        (lambda x: x.encode_prompt(None), RequestError, "expected a text or a list of texts"),
        (lambda x: x.encode_prompt(5), RequestError, "expected a text or a list of texts"),
        (lambda x: x.encode_references([]), RequestError, "no reference image was given"),
        (lambda x: x.encode_references(None), RequestError, "reference image is a NoneType"),
        (lambda x: x.encode_references(["a.png"]), RequestError, "reference image is a str"),
        (lambda x: x.encode_references(NARROW), RequestError, "expected at least 64 pixels"),
    ],
)
@pytest.mark.usefixtures("no_graph_runs")
def test_bad_call(
    call: Callable[[KleinKVPipeline], object],
    error: type[Exception],
    message: str,
    tiny_ours: KleinKVPipeline,
) -> None:
    with pytest.raises(error, match=message):
        call(tiny_ours)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"latents": np.zeros((1, 64, 127), np.float32)}, "the callback returned latents of shape"),
        ({"prompt_embeds": np.zeros((1, 7, 96), np.float32)}, "returned prompt_embeds of shape"),
        ({"latents": np.zeros((1, 64, 128), np.int64)}, "latents has dtype int64"),
        ({"latents": np.full((1, 64, 128), np.nan, np.float32)}, "not finite"),
        ([1], "the callback returned a list, expected a dict or None"),
    ],
)
def test_bad_answer_of_a_callback(returned: Any, message: str, tiny_ours: KleinKVPipeline) -> None:
    with pytest.raises(RequestError, match=message):
        tiny_ours(PROMPT, callback_on_step_end=lambda *_: returned, **SQUARE)


def test_error_in_a_callback_passes_through(tiny_ours: KleinKVPipeline) -> None:
    def callback(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_ours(PROMPT, callback_on_step_end=callback, **SQUARE)
    tiny_ours(PROMPT, **SQUARE)


def test_embeds_may_be_torchs_numpys_and_bfloat16(tiny_ours: KleinKVPipeline) -> None:
    embeds = torch.randn(1, 7, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = tiny_ours(prompt_embeds=embeds.float(), seed=0, **SQUARE).images[0]
    wide = embeds.float().numpy()
    for given in (embeds, wide, wide.astype(ml_dtypes.bfloat16)):
        images = tiny_ours(prompt_embeds=given, seed=0, **SQUARE).images
        np.testing.assert_array_equal(images[0], expected)


def test_attention_kwargs_have_no_effect_without_adapters(
    tiny_ours: KleinKVPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    request = SQUARE | {"seed": 0, "output_type": "np"}
    plain = tiny_ours(PROMPT, **request).images
    with caplog.at_level(logging.WARNING, "klein_kv"):
        other = tiny_ours(PROMPT, attention_kwargs={"scale": 2, "gain": 1}, **request).images
    np.testing.assert_array_equal(plain, other)
    assert "attention_kwargs ['gain'] have no effect" in caplog.text


# --- results ---


def test_without_a_seed_every_call_differs(any_ours: KleinKVPipeline) -> None:
    one, other = (any_ours(PROMPT, output_type="latent", **SQUARE).images for _ in range(2))
    assert not np.array_equal(one, other)


def test_small_references_make_small_images(any_ours: KleinKVPipeline, picture: Picture) -> None:
    """As in diffusers; so do small sizes that the caller names."""
    (image,) = any_ours(PROMPT, image=picture(64, 80), **SMALL).images
    assert image.size == (64, 80)
    (image,) = any_ours(PROMPT, height=np.int64(16), width=48, **SMALL).images
    assert image.size == (48, 16)


@pytest.mark.parametrize("given", ["explicit", "by reference"])
def test_one_rule_for_every_size(
    given: str, tiny_ours: KleinKVPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told by users: what came from a wide reference was refused where it was asked for."""
    sizes = []

    def stop(*arguments: Any, **_: Any) -> None:
        sizes.append(arguments[1])
        raise InterruptedError

    monkeypatch.setattr(maker, "_admit", stop)
    sides = {"height": 352, "width": 2896}
    request = sides if given == "explicit" else {"image": Image.new("RGB", (2896, 362))}
    with pytest.raises(InterruptedError):
        tiny_ours(PROMPT, **request)
    assert (sizes[0].height, sizes[0].width) == (352, 2896)
    for width, height in ((2560, 1440), (2048, 2048), (65536, 64)):
        with pytest.raises(InterruptedError):
            tiny_ours(PROMPT, width=width, height=height)


def test_sides_above_2048_are_computed(tiny_ours: KleinKVPipeline) -> None:
    (image,) = tiny_ours(PROMPT, height=16, width=2064, seed=0, **SMALL).images
    assert image.size == (2064, 16)


@pytest.mark.parametrize("matte", ["white", "black", None])
def test_matte(tiny_artifacts: Path, tiny_ours: KleinKVPipeline, matte: str | None) -> None:
    image = Image.new("RGBA", (64, 64), (200, 30, 90, 0))
    request = SMALL | {"seed": 0, "output_type": "np"}
    seen = Image.new("RGB", (64, 64), matte or (200, 30, 90))
    expected = tiny_ours(PROMPT, image=seen, **request).images
    options = {} if matte == "white" else {"matte": matte}
    with KleinKVPipeline.from_pretrained(tiny_artifacts, **options) as ours:
        np.testing.assert_array_equal(ours(PROMPT, image=image, **request).images, expected)


def test_no_tensors_for_the_callback(any_ours: KleinKVPipeline) -> None:
    """diffusers takes None where nothing is wanted."""
    seen: list[Any] = []
    any_ours(
        PROMPT,
        callback_on_step_end=lambda *args: seen.append(args[3]),
        callback_on_step_end_tensor_inputs=None,
        **SQUARE,
    )
    assert seen == [{}]


def test_a_reference_set_serves_many_requests(any_ours: KleinKVPipeline, picture: Picture) -> None:
    references = any_ours.encode_references([picture(70, 100), picture(128, 64)])
    assert references.num_tokens == 4 * 6 + 8 * 4
    assert references.first_size == (96, 64)
    assert references.nbytes == any_ours.config.transformer.kv_bytes(56, "float32")
    download = any_ours.backend.download
    before = {name: download(buffer).copy() for name, buffer in references.kv.items()}
    assert {array.shape for array in before.values()} == {(1, 56, 2, 32)}
    for prompt in (PROMPT, [PROMPT, "snow"]):
        any_ours(prompt, references=references, **SMALL)
    for name, buffer in references.kv.items():
        np.testing.assert_array_equal(download(buffer), before[name])


def test_progress_bar(
    tiny_artifacts: Path, capsys: pytest.CaptureFixture[str], tiny_ours: KleinKVPipeline
) -> None:
    request = SQUARE | {"num_inference_steps": 3}
    tiny_ours(PROMPT, **request)
    assert capsys.readouterr() == ("", "")
    tiny_ours.set_progress_bar_config(desc="drawing")
    try:
        tiny_ours(PROMPT, **request)
    finally:
        tiny_ours.set_progress_bar_config(disable=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "drawing" in err
    assert "3/3" in err


# --- loading ---


def test_loads_from_a_text_path_and_any_backend_name(tiny_artifacts: Path) -> None:
    for options in ({}, {"backend": "auto"}, {"backend": "onnxruntime", "device": "cpu"}):
        pipeline = KleinKVPipeline.from_pretrained(str(tiny_artifacts), **options)
        assert pipeline.backend.name == "onnxruntime"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backend": "openvino"}, BackendError, "backend is 'openvino', expected one of auto"),
        ({"device": "tpu"}, BackendError, "device is 'tpu'"),
        ({"backend": "onnxruntime", "device": "cuda:0"}, BackendError, "no CUDAExecutionProvider"),
        ({"matte": "mauvish"}, RequestError, "matte is 'mauvish', expected a colour"),
        ({"attention": "fp8"}, RequestError, "attention is 'fp8' and no quantized precision"),
        ({"precision": "nvfp4"}, ArtifactError, "klein-kv quantize ARTIFACTS --recipe nvfp4"),
    ],
)
def test_bad_options(
    options: dict[str, Any], error: type[Exception], message: str, tiny_artifacts: Path
) -> None:
    with pytest.raises(error, match=message):
        KleinKVPipeline.from_pretrained(tiny_artifacts, **options)


def test_checkpoint_is_not_an_artifact_folder(tiny_checkpoint: Path) -> None:
    with pytest.raises(ArtifactError, match="export it first"):
        KleinKVPipeline.from_pretrained(tiny_checkpoint)


def test_public_names() -> None:
    names = ["KleinKVInpaintPipeline", "KleinKVPipeline", "__version__"]
    assert sorted(klein_kv.__all__) == names
    assert issubclass(klein_kv.KleinKVInpaintPipeline, KleinKVPipeline)
    assert klein_kv.KleinKVPipeline is KleinKVPipeline
    with pytest.raises(AttributeError, match="no attribute 'Pipeline'"):
        klein_kv.Pipeline  # noqa: B018
    assert not issubclass(CapacityError, ValueError)
