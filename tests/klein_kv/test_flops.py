"""The count against numbers worked out by hand for klein 9B, and against itself."""

from math import prod

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3Model

from klein_kv.artifacts.config import ModelConfig, TextEncoderConfig
from klein_kv.flops import (
    block_weights,
    diffusers_kv_edit_flops,
    edit_flops,
    plain_edit_flops,
    reference_flops,
    step_flops,
    text_block_weights,
    text_operations,
)
from klein_kv.networks.text_encoder import text_encoder_parameters
from klein_kv.networks.transformer import transformer_parameters
from tests.klein_configs import KLEIN_4B, KLEIN_9B

NET = KLEIN_9B.transformer
SIZES = {"batch": 1, "image_tokens": 4096, "text_tokens": 512}


# Teraflops at 1024x1024 with one, two and four references of that size:
# 13.96 GFLOP per token, 524,288 per pair of query and key.
@pytest.mark.parametrize(
    ("references", "first", "cached", "plain"),
    [(1, 151, 85, 161), (2, 245, 95, 265), (4, 484, 115, 524)],
)
def test_klein_9b(references: int, first: int, cached: int, plain: int) -> None:
    tokens = 4096 * references
    step = step_flops(NET, ref_tokens=tokens, **SIZES)
    assert step == pytest.approx(cached * 1e12, rel=0.01)
    assert step + reference_flops(NET, tokens) == pytest.approx(first * 1e12, rel=0.03)
    assert plain_edit_flops(NET, steps=1, ref_tokens=tokens, **SIZES) == pytest.approx(
        plain * 1e12, rel=0.01
    )


def test_request_is_the_sum_of_its_steps() -> None:
    step, encode = step_flops(NET, ref_tokens=4096, **SIZES), reference_flops(NET, 4096)
    request = {"steps": 4, "ref_tokens": 4096, **SIZES}
    assert edit_flops(NET, references_known=True, **request) == 4 * step
    assert edit_flops(NET, references_known=False, **request) == 4 * step + encode
    none = request | {"ref_tokens": 0}
    assert edit_flops(NET, references_known=False, **none) == 4 * step_flops(
        NET, ref_tokens=0, **SIZES
    )
    both = step_flops(NET, ref_tokens=4096, **(SIZES | {"batch": 2}))
    assert 1.99 * step < both < 2 * step  # the timestep is embedded once


def test_text_encoder_counts_what_torch_counts() -> None:
    """torch's own counter over transformers' Qwen3, on tensors without data."""
    config = TextEncoderConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=100,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        layers=(1, 3),
    )
    with torch.device("meta"):
        model = Qwen3Model(
            Qwen3Config(
                hidden_size=64,
                intermediate_size=160,
                num_hidden_layers=3,
                num_attention_heads=6,
                num_key_value_heads=2,
                head_dim=16,
                vocab_size=100,
                attn_implementation="eager",
            )
        )
        ids = torch.zeros((2, 37), dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids)
    # Positions times frequencies of RoPE are a product too, which is not counted here.
    rope = 2 * 2 * 37 * 8
    counted = counter.get_total_flops() - rope
    assert text_operations(config, batch=2, text_tokens=37).total == pytest.approx(
        counted, abs=rope
    )
    ours = text_operations(config, batch=2, text_tokens=37)
    assert ours.linears == 2 * 2 * 37 * text_block_weights(config)


@pytest.mark.parametrize("config", [KLEIN_9B, KLEIN_4B], ids=["9b", "4b"])
def test_block_weights_are_those_of_the_checkpoint(config: ModelConfig) -> None:
    def matrices(shapes: dict[str, tuple[int, ...]], *prefixes: str) -> int:
        return sum(
            prod(shape) for name, shape in shapes.items() if name.startswith(prefixes) and shape[1:]
        )

    blocks = ("transformer_blocks.", "single_transformer_blocks.")
    shapes = transformer_parameters(config.transformer)
    assert block_weights(config.transformer) == matrices(shapes, *blocks)
    shapes = text_encoder_parameters(config.text_encoder)
    assert text_block_weights(config.text_encoder) == matrices(shapes, "model.layers.")


# Four steps at 1024x1024: plain over KV, plain over known references, KV over known references.
@pytest.mark.parametrize(
    ("references", "plain_kv", "plain_known", "kv_known"),
    [(1, 1.58, 1.89, 1.197), (2, 1.99, 2.79, 1.397), (4, 2.53, 4.57, 1.808)],
)
def test_diffusers_kv_pipeline(
    references: int, plain_kv: float, plain_known: float, kv_known: float
) -> None:
    request = {"steps": 4, "ref_tokens": 4096 * references, **SIZES}
    plain = plain_edit_flops(NET, **request)
    kv = diffusers_kv_edit_flops(NET, **request)
    known = edit_flops(NET, references_known=True, **request)
    assert plain / kv == pytest.approx(plain_kv, abs=0.006)
    assert plain / known == pytest.approx(plain_known, abs=0.01)
    assert kv / known == pytest.approx(kv_known, abs=0.006)
    # What we leave out of the last block is not much, but not nothing.
    assert 1 < kv / edit_flops(NET, references_known=False, **request) < 1.02
    none = request | {"ref_tokens": 0}
    assert diffusers_kv_edit_flops(NET, **none) == plain_edit_flops(NET, **none)
    text = plain_edit_flops(NET, **none) / edit_flops(NET, references_known=True, **none)
    assert text == pytest.approx(1.003, abs=0.0005)  # of which the last block reads keys alone
