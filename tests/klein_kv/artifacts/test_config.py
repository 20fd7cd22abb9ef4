"""Configurations: read as the checkpoints' own classes write them, refused where not klein's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from transformers import Qwen3Config

from klein_kv.artifacts.config import (
    ModelConfig,
    TextEncoderConfig,
    TransformerConfig,
    VaeConfig,
    read_json,
)
from klein_kv.errors import CheckpointError
from tests.klein_configs import KLEIN_4B, KLEIN_9B

TRANSFORMER: dict[str, Any] = {
    "_class_name": "Flux2Transformer2DModel",
    "in_channels": 128,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 96,
    "axes_dims_rope": [8, 8, 8, 8],
    "guidance_embeds": False,
}
TEXT: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 28,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 640,
}
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKLFlux2",
    "latent_channels": 32,
    "block_out_channels": [8, 8, 8, 8],
    "norm_num_groups": 4,
}


def test_transformer_defaults_are_diffusers() -> None:
    """Options that a config.json leaves out mean what the class takes them for."""
    model = Flux2Transformer2DModel(
        **{key: value for key, value in TRANSFORMER.items() if key != "_class_name"}
    )
    written = json.loads(model.to_json_string())
    assert TransformerConfig.from_dict(written) == TransformerConfig.from_dict(TRANSFORMER)
    assert TransformerConfig.from_dict(written).mlp_hidden_dim == 192


def test_vae_defaults_are_diffusers() -> None:
    with torch.device("meta"):
        written = json.loads(AutoencoderKLFlux2().to_json_string())
    assert VaeConfig.from_dict(written) == VaeConfig.from_dict({})


def test_text_encoder_reads_what_transformers_writes() -> None:
    written = Qwen3Config(
        **TEXT, rope_parameters={"rope_type": "default", "rope_theta": 5000.0}
    ).to_dict()
    config = TextEncoderConfig.from_dict(written)
    assert config.rope_theta == 5000.0
    assert config.head_dim == 16
    assert config.layers == (9, 18, 27)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_theta": 1_000_000}, 1_000_000.0),  # transformers before 5
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.5}}, 7.5),
        ({"rope_scaling": None, "rope_theta": 3.0}, 3.0),
        ({}, 10000.0),
    ],
)
def test_rope_theta_and_defaults(rope: dict[str, Any], expected: float) -> None:
    few = {k: v for k, v in TEXT.items() if k not in ("num_key_value_heads", "head_dim")}
    read = TextEncoderConfig.from_dict(few | rope)
    assert (read.rope_theta, read.num_key_value_heads, read.head_dim) == (expected, 4, 8)


@pytest.mark.parametrize("layers", [(9, 18, 27), (28,), (0, 27)])
def test_only_the_blocks_that_are_read(layers: tuple[int, ...]) -> None:
    config = TextEncoderConfig.from_dict(TEXT, layers)
    assert config.num_exported_layers == max(layers)
    assert config.output_dim == 32 * len(layers)


def test_klein_sizes() -> None:
    net = KLEIN_9B.transformer
    assert (net.inner_dim, net.mlp_hidden_dim, net.num_blocks) == (4096, 12288, 32)
    assert KLEIN_9B.text_encoder.output_dim == 12288
    assert net.kv_bytes(4096, "bfloat16") == 2 << 30
    assert (KLEIN_4B.transformer.inner_dim, KLEIN_4B.transformer.num_blocks) == (3072, 25)
    vae = KLEIN_9B.vae
    assert (vae.scale_factor, vae.multiple_of, vae.token_channels) == (8, 16, 128)


# --- refused ---


READERS = {
    "transformer": (TransformerConfig, TRANSFORMER),
    "text_encoder": (TextEncoderConfig, TEXT),
    "vae": (VaeConfig, VAE),
}
BAD: dict[str, list[tuple[dict[str, Any], str]]] = {
    "transformer": [
        ({"_class_name": "FluxTransformer2DModel"}, "_class_name is 'FluxTransformer2DModel'"),
        ({"guidance_embeds": True}, "guidance_embeds is True, expected False"),
        ({"patch_size": 2}, "patch_size is 2"),
        ({"num_layers": None}, "num_layers is missing"),
        ({"num_layers": 10**9}, "num_layers is 1000000000, expected an integer of 1 to 1024"),
        ({"num_attention_heads": True}, "an integer of 1 to"),
        ({"attention_head_dim": 32.0}, "an integer of 1 to"),
        ({"in_channels": 10**30}, "expected an integer of 1 to 16777216"),
        ({"out_channels": 64}, "out_channels is 64, expected in_channels 128"),
        ({"axes_dims_rope": [8, 8, 8, 4]}, "add up to attention_head_dim 32"),
        ({"axes_dims_rope": [16, 8, 8]}, "four axes"),
        ({"axes_dims_rope": [7, 9, 8, 8]}, "even sizes"),
        ({"axes_dims_rope": 32}, "expected a list of integers"),
        ({"axes_dims_rope": ["8", 8, 8, 8]}, "expected a list of integers"),
        ({"timestep_guidance_channels": 33}, "33, expected an even number"),
        ({"mlp_ratio": "3"}, "mlp_ratio is '3', expected a number"),
        ({"eps": float("nan")}, "expected a number"),
        ({"eps": 10**400}, "expected a number of 0 to 1e9"),
    ],
    "text_encoder": [
        ({"model_type": "llama"}, "model_type is 'llama', expected 'qwen3'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "full_attention alone"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'default'"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "rope_type 'default'"),
        ({"rope_parameters": {"rope_theta": "1e6"}}, "rope_theta is '1e6', expected a number"),
        ({"rms_norm_eps": None, "vocab_size": None}, "vocab_size is missing"),
        ({"hidden_size": "32", "head_dim": None}, "an integer of 1 to"),
        ({"num_attention_heads": 0, "head_dim": None}, "an integer of 1 to"),
        ({"num_key_value_heads": 3}, "4 attention heads are not a multiple of 3"),
        ({"num_hidden_layers": 26}, "hidden states .*27.* has 26 layers; .*--text-layers"),
    ],
    "vae": [
        ({"_class_name": "AutoencoderKL"}, "_class_name"),
        ({"in_channels": 4}, "in_channels is 4, expected 3"),
        ({"patch_size": [1, 1]}, r"patch_size is \[1, 1\], expected \[2, 2\]"),
        ({"act_fn": "gelu"}, "act_fn is 'gelu', expected 'silu'"),
        ({"use_quant_conv": False}, "use_quant_conv is False, expected True"),
        ({"down_block_types": ["DownEncoderBlock2D"] * 3}, "down_block_types is"),
        ({"up_block_types": ["UpBlock2D"] * 4}, "up_block_types is"),
        ({"norm_num_groups": 3}, r"block_out_channels is \(8, .*multiples of norm_num_groups 3"),
        ({"block_out_channels": 8}, "list of integers"),
        ({"decoder_block_out_channels": [8, 8, 0, 8]}, "decoder_block_out_channels .* multiples"),
        ({"decoder_block_out_channels": [8, 8]}, r"channels is \(8, 8\), expected 4 levels"),
        ({"batch_norm_eps": "x"}, "expected a number"),
    ],
}


@pytest.mark.parametrize(
    ("component", "change", "message"),
    [(component, *row) for component, rows in BAD.items() for row in rows],
)
def test_bad_configuration(component: str, change: dict[str, Any], message: str) -> None:
    kind, good = READERS[component]
    with pytest.raises(CheckpointError, match=message) as caught:
        kind.from_dict(good | change)
    assert str(caught.value).startswith(component)


def test_null_stands_for_the_default() -> None:
    nulls = dict.fromkeys(("mlp_ratio", "rope_theta", "eps", "out_channels", "patch_size"))
    expected = TransformerConfig.from_dict(TRANSFORMER)
    assert TransformerConfig.from_dict(TRANSFORMER | nulls) == expected


@pytest.mark.parametrize("layers", [(), (-1,), (9, 18, 29)])
def test_hidden_states_that_do_not_exist(layers: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match="--text-layers"):
        TextEncoderConfig.from_dict(TEXT, layers)


@pytest.mark.parametrize(
    ("transformer", "vae", "message"),
    [
        ({"joint_attention_dim": 64}, {}, "joint_attention_dim is 64; .*--text-layers"),
        ({}, {"latent_channels": 16}, "vae and transformer do not fit: 16 latent channels"),
    ],
)
def test_parts_that_do_not_fit(
    transformer: dict[str, Any], vae: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        ModelConfig(
            TransformerConfig.from_dict(TRANSFORMER | transformer),
            TextEncoderConfig.from_dict(TEXT),
            VaeConfig.from_dict(VAE | vae),
        )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing: .*config.json does not exist"),
        (b"\xff", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"[1]", "must be a JSON object, got list"),
    ],
)
def test_unreadable_json(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"vae config {message}"):
        read_json(path, "vae config")
