"""The text encoder's description, computed by torch, against transformers' `Qwen3ForCausalLM`."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from klein_kv.artifacts.config import TextEncoderConfig
from klein_kv.networks.text_encoder import encode_text, text_encoder_parameters
from klein_kv.networks.torch_ops import TorchOps
from tests.checkpoints import MODELS, randomize
from tests.klein_configs import KLEIN_9B
from tests.tolerances import assert_close

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LENGTH = 40


def build(name: str) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=300,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        **MODELS[name].text_encoder,
    )
    module = Qwen3ForCausalLM(config).eval()
    randomize(module, torch.Generator().manual_seed(0))
    return module


@pytest.fixture(scope="module", params=[(n, d) for n in MODELS for d in DTYPES], ids="-".join)
def subject(request: pytest.FixtureRequest) -> tuple[Qwen3ForCausalLM, str, tuple[int, ...]]:
    name, dtype = request.param
    return build(name).to(DTYPES[dtype]), dtype, MODELS[name].text_layers


def masks() -> dict[str, Any]:
    mask = {name: torch.ones(2, LENGTH, dtype=torch.int64) for name in ("none", "right", "left")}
    mask["right"][0, 25:] = mask["right"][1, 39:] = 0
    mask["left"][0, :15] = mask["left"][1, :1] = 0
    return mask


@torch.no_grad()
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_hidden_states(
    padding: str, subject: tuple[Qwen3ForCausalLM, str, tuple[int, ...]]
) -> None:
    """Padding included: the denoiser reads those positions too."""
    module, dtype, layers = subject
    config = TextEncoderConfig.from_dict(module.config.to_dict(), layers)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 300, (2, LENGTH)))
    mask = masks()[padding]
    ops = TorchOps(module.state_dict(), DTYPES[dtype])
    ours = encode_text(ops, config, ids, mask)
    states = module(
        input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
    ).hidden_states
    assert ours.dtype == DTYPES[dtype]
    assert_close("torch encode_text", dtype, ours, torch.cat([states[i] for i in layers], dim=-1))


@torch.no_grad()
@pytest.mark.parametrize("layers", [(0, 3), (2, 1), (1, 1)])
def test_any_hidden_states(layers: tuple[int, ...]) -> None:
    module = build("short")
    config = TextEncoderConfig.from_dict(module.config.to_dict(), layers)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 300, (1, LENGTH)))
    mask = torch.ones_like(ids)
    ours = encode_text(TorchOps(module.state_dict(), torch.float32), config, ids, mask)
    states = module(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    expected = torch.cat([states[i] for i in layers], dim=-1)
    assert_close("torch encode_text", "float32", ours, expected)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_the_modules(name: str) -> None:
    module, layers = build(name), MODELS[name].text_layers
    config = TextEncoderConfig.from_dict(module.config.to_dict(), layers)
    held = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    wanted = text_encoder_parameters(config)
    assert wanted.items() <= held.items()
    unread = {key for key in held.keys() - wanted.keys() if not key.startswith("lm_head")}
    last = config.num_exported_layers
    if last == config.num_hidden_layers:
        assert not unread
    else:
        later = tuple(f"model.layers.{i}." for i in range(last, config.num_hidden_layers))
        assert all(key.startswith((*later, "model.norm.")) for key in unread)


def test_klein_reads_27_of_36_blocks() -> None:
    shapes = text_encoder_parameters(KLEIN_9B.text_encoder)
    blocks = {name.split(".")[2] for name in shapes if ".layers." in name}
    assert blocks == {str(i) for i in range(27)}
    assert "model.norm.weight" not in shapes
    assert sum(int(np.prod(shape)) for shape in shapes.values()) * 2 == pytest.approx(
        11.6e9, rel=0.01
    )
