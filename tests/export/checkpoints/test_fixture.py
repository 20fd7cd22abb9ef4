"""Fixture checkpoints: loadable by diffusers, reproducible, and never written over anything."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinKVPipeline
from PIL import Image
from safetensors import safe_open

from klein_kv.errors import CapacityError, RequestError
from klein_kv.export.checkpoints import fixture
from klein_kv.export.checkpoints.fixture import make_fixture
from tests.conftest import KleinExport

TURN = "<|im_start|>user\na red kite<|im_end|>\n"


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- what diffusers makes of it ---


def run(pipeline: Flux2KleinKVPipeline, prompt: str, colours: tuple[str, ...], kind: str) -> Any:
    return pipeline(
        image=[Image.new("RGB", (64, 64), colour) for colour in colours] or None,
        prompt=prompt,
        height=96,
        width=64,
        max_sequence_length=64,
        generator=torch.Generator().manual_seed(0),
        output_type=kind,
    ).images


def test_diffusers_edits_an_image(tiny_theirs: Flux2KleinKVPipeline) -> None:
    (image,) = run(tiny_theirs, "a red kite over the sea", ("teal",), "np")
    assert image.shape == (96, 64, 3)
    assert np.isfinite(image).all()
    assert np.mean((image <= 0) | (image >= 1)) < 0.05  # clipped
    assert image.std() > 0.05


def test_every_input_matters(tiny_theirs: Flux2KleinKVPipeline) -> None:
    base = run(tiny_theirs, "a red kite", ("teal", "orange"), "latent")
    assert 0.7 < base.std().item() < 2.5
    for prompt, colours in (
        ("snow", ("teal", "orange")),
        ("a red kite", ("teal", "navy")),
        ("a red kite", ("orange", "teal")),
        ("a red kite", ("teal",)),
        ("a red kite", ()),
    ):
        other = run(tiny_theirs, prompt, colours, "latent")
        assert (other - base).abs().max() > 1e-2, (prompt, colours)


def test_configuration_is_klein(tiny_theirs: Flux2KleinKVPipeline) -> None:
    assert tiny_theirs.transformer.config.guidance_embeds is False
    assert tiny_theirs.scheduler.config.use_dynamic_shifting is True
    assert tiny_theirs.vae_scale_factor == 8
    assert tiny_theirs.text_encoder.config.num_hidden_layers >= 28
    bn = tiny_theirs.vae.bn  # whose statistics differ from identity
    assert bn.running_mean.abs().mean() > 0.1
    assert (bn.running_var - 1).abs().mean() > 0.1


def test_tokenizer(tiny_theirs: Flux2KleinKVPipeline) -> None:
    tokenizer = tiny_theirs.tokenizer
    message = [{"role": "user", "content": "a red kite"}]
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    text = tokenizer.apply_chat_template(message, **options)
    assert text == TURN + "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    tokens = tokenizer.tokenize(TURN + "<think></think><|endoftext|>")
    assert tokens[0] == "<|im_start|>"
    assert tokens[-3:] == ["<think>", "</think>", "<|endoftext|>"]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert len(tokenizer) <= tiny_theirs.text_encoder.config.vocab_size
    prompt = "a red kite over the sea at night"
    assert len(tokenizer(prompt)["input_ids"]) < len(prompt) / 2


# --- reproducible ---


@pytest.mark.parametrize("seed", [0, 1])
def test_a_seed_gives_the_same_bytes_and_another_one_other_weights_alone(
    seed: int, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    make_fixture(tmp_path / "again", "tiny", seed=seed)
    assert torch.equal(torch.rand(3), expected)  # the caller's random state is left alone
    first, again = digests(tiny_checkpoint), digests(tmp_path / "again")
    assert first.keys() == again.keys()
    weights = {name for name in first if name.endswith(".safetensors")}
    assert {name for name in first if first[name] != again[name]} == (weights if seed else set())


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


def test_what_is_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(RequestError, match="already exists"):
        make_fixture(tmp_path)
    assert digests(tmp_path).keys() == {"note.txt"}


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


# --- the real shapes ---


@pytest.mark.parametrize(
    ("component", "files", "gigabytes", "tensor", "shape"),
    [
        (
            "transformer",
            2,
            18.16,
            "single_transformer_blocks.23.attn.to_qkv_mlp_proj.weight",
            [36864, 4096],
        ),
        ("text_encoder", 4, 16.38, "model.layers.26.self_attn.k_proj.weight", [1024, 4096]),
        ("vae", 1, 0.17, None, None),
    ],
)
def test_real_shapes(
    component: str,
    files: int,
    gigabytes: float,
    tensor: str | None,
    shape: list[int] | None,
    klein_export: KleinExport,
) -> None:
    folder = klein_export.checkpoint / component
    shards = list(folder.glob("*.safetensors"))
    assert len(shards) == files
    assert sum(path.stat().st_size for path in shards) / 1e9 == pytest.approx(gigabytes, abs=0.01)
    assert sum(512 * path.stat().st_blocks for path in shards) < 50e6  # and take no room
    if tensor is None:
        return
    (path,) = folder.glob("*.safetensors.index.json")
    table = json.loads(path.read_text())["weight_map"]
    assert set(table.values()) == {shard.name for shard in shards}
    with safe_open(folder / table[tensor], "pt") as file:
        weight = file.get_slice(tensor)
        assert (weight.get_shape(), weight.get_dtype()) == (shape, "BF16")
        assert not weight[:2].any()
