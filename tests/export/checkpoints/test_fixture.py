"""Fixture checkpoints: loadable by diffusers, reproducible, and never written over anything."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinKVPipeline
from PIL import Image
from safetensors import safe_open
from transformers import AutoTokenizer

from klein_kv.errors import CapacityError, RequestError
from klein_kv.export.checkpoints import fixture
from klein_kv.export.checkpoints.fixture import make_fixture

USER = [{"role": "user", "content": "a red kite"}]
TURN = "<|im_start|>user\na red kite<|im_end|>\n"


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint: Path) -> Flux2KleinKVPipeline:
    pipeline = Flux2KleinKVPipeline.from_pretrained(tiny_checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# --- what diffusers makes of it ---


@pytest.fixture(scope="module")
def latents(pipeline: Flux2KleinKVPipeline) -> Callable[..., torch.Tensor]:
    def run(prompt: str, colours: tuple[str, ...]) -> torch.Tensor:
        return pipeline(
            image=[Image.new("RGB", (64, 64), colour) for colour in colours] or None,
            prompt=prompt,
            height=96,
            width=64,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images

    return run


def test_diffusers_edits_an_image(pipeline: Flux2KleinKVPipeline) -> None:
    image = pipeline(
        image=[Image.new("RGB", (64, 80), "teal")],
        prompt="a red kite over the sea",
        height=96,
        width=64,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images[0]
    assert image.shape == (96, 64, 3)
    assert np.isfinite(image).all()
    clipped = np.mean((image <= 0) | (image >= 1))
    assert clipped < 0.05
    assert image.std() > 0.05


@pytest.mark.parametrize(
    ("prompt", "colours"),
    [
        ("snow", ("teal", "orange")),
        ("a red kite", ("teal", "navy")),
        ("a red kite", ("orange", "teal")),
        ("a red kite", ("teal",)),
        ("a red kite", ()),
    ],
    ids=["prompt", "reference", "order", "fewer", "none"],
)
def test_every_input_matters(
    prompt: str, colours: tuple[str, ...], latents: Callable[..., torch.Tensor]
) -> None:
    base = latents("a red kite", ("teal", "orange"))
    assert 0.7 < base.std().item() < 2.5
    assert (latents(prompt, colours) - base).abs().max() > 1e-2


def test_configuration_is_klein(pipeline: Flux2KleinKVPipeline) -> None:
    assert pipeline.transformer.config.guidance_embeds is False
    assert pipeline.scheduler.config.use_dynamic_shifting is True
    assert pipeline.vae_scale_factor == 8
    assert pipeline.text_encoder.config.num_hidden_layers >= 28
    bn = pipeline.vae.bn  # whose statistics differ from identity
    assert bn.running_mean.abs().mean() > 0.1
    assert (bn.running_var - 1).abs().mean() > 0.1


# --- reproducible ---


def test_same_seed_gives_the_same_bytes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    make_fixture(tmp_path / "again", "tiny", seed=0)
    assert digests(tmp_path / "again") == digests(tiny_checkpoint)
    assert torch.equal(torch.rand(3), expected)  # the caller's random state is left alone


def test_another_seed_gives_other_weights_alone(tiny_checkpoint: Path, tmp_path: Path) -> None:
    make_fixture(tmp_path / "other", "tiny", seed=1)
    first, second = digests(tiny_checkpoint), digests(tmp_path / "other")
    assert first.keys() == second.keys()
    assert {name for name in first if first[name] != second[name]} == {
        name for name in first if name.endswith(".safetensors")
    }


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype_is_what_is_stored(dtype: str, tmp_path: Path) -> None:
    make_fixture(tmp_path / "out", "tiny", dtype=dtype)
    for path in (tmp_path / "out").rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            dtypes = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
        assert dtypes <= {getattr(torch, dtype), torch.int64}
    config = json.loads((tmp_path / "out/text_encoder/config.json").read_text())
    assert config["dtype"] == dtype


# --- nothing is written over, nothing half-made stays ---


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_there_is_refused(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    mine = out / "note.txt" if kind == "folder" else out
    mine.write_text("mine")
    with pytest.raises(RequestError, match="already exists"):
        make_fixture(out)
    assert mine.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [out]


def test_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fixture, "fill_random", fail)
    with pytest.raises(CapacityError, match="No space"):
        make_fixture(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "huge"}, "tiny, small, 9b-shapes"),
        ({"dtype": "fp8"}, "float32, float16, bfloat16"),
        ({"seed": -1}, "from 0"),
        ({"seed": 2**63}, "from 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=message):
        make_fixture(tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


# --- tokenizer ---


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, TURN),
        ({"add_generation_prompt": True}, TURN + "<|im_start|>assistant\n"),
        (
            {"add_generation_prompt": True, "enable_thinking": False},
            TURN + "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        ),
    ],
)
def test_chat_template(options: dict[str, bool], expected: str, tiny_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint / "tokenizer")
    assert tokenizer.apply_chat_template(USER, tokenize=False, **options) == expected


def test_special_tokens_are_single_tokens(pipeline: Flux2KleinKVPipeline) -> None:
    tokenizer = pipeline.tokenizer
    tokens = tokenizer.tokenize(TURN + "<think></think><|endoftext|>")
    assert tokens[0] == "<|im_start|>"
    assert tokens[-3:] == ["<think>", "</think>", "<|endoftext|>"]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert len(tokenizer) <= pipeline.text_encoder.config.vocab_size
    prompt = "a red kite over the sea at night"
    assert len(tokenizer(prompt)["input_ids"]) < len(prompt) / 2


# --- the real shapes ---


@pytest.fixture(scope="module")
def real_shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real") / "9b"
    make_fixture(folder, "9b-shapes")
    return folder


@pytest.mark.parametrize(
    ("component", "files", "gigabytes"),
    [("transformer", 2, 18.16), ("text_encoder", 4, 16.38), ("vae", 1, 0.17)],
)
def test_real_shapes_have_the_real_size(
    component: str, files: int, gigabytes: float, real_shapes: Path
) -> None:
    shards = list((real_shapes / component).glob("*.safetensors"))
    assert len(shards) == files
    assert sum(path.stat().st_size for path in shards) / 1e9 == pytest.approx(gigabytes, abs=0.01)
    assert sum(512 * path.stat().st_blocks for path in shards) < 50e6  # and take no room


@pytest.mark.parametrize(
    ("component", "stem", "name", "shape"),
    [
        (
            "transformer",
            "diffusion_pytorch_model",
            "single_transformer_blocks.23.attn.to_qkv_mlp_proj.weight",
            [36864, 4096],
        ),
        ("text_encoder", "model", "model.layers.26.self_attn.k_proj.weight", [1024, 4096]),
    ],
)
def test_real_shapes_are_read_through_the_index(
    component: str, stem: str, name: str, shape: list[int], real_shapes: Path
) -> None:
    folder = real_shapes / component
    index = json.loads((folder / f"{stem}.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert shards == {path.name for path in folder.glob("*.safetensors")}
    with safe_open(folder / index["weight_map"][name], "pt") as file:
        weight = file.get_slice(name)
        assert weight.get_shape() == shape
        assert weight.get_dtype() == "BF16"
        assert not weight[:2].any()
