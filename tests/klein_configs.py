"""Configurations of the released models, for tests that need shapes and no weights; a recipe."""

from klein_kv.artifacts.config import ModelConfig, TextEncoderConfig, TransformerConfig, VaeConfig

__all__ = ["KLEIN_4B", "KLEIN_9B", "TINY_PROFILE"]


def _klein(double: int, single: int, heads: int, text_hidden: int) -> ModelConfig:
    return ModelConfig(
        TransformerConfig.from_dict(
            {
                "in_channels": 128,
                "num_layers": double,
                "num_single_layers": single,
                "attention_head_dim": 128,
                "num_attention_heads": heads,
                "joint_attention_dim": 3 * text_hidden,
                "guidance_embeds": False,
            }
        ),
        TextEncoderConfig.from_dict(
            {
                "model_type": "qwen3",
                "hidden_size": text_hidden,
                "intermediate_size": 3 * text_hidden,
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "vocab_size": 151936,
                "rope_theta": 1_000_000,
            }
        ),
        VaeConfig.from_dict({}),
    )


KLEIN_9B = _klein(8, 24, 32, 4096)
KLEIN_4B = _klein(5, 20, 24, 2560)

TINY_PROFILE = """
[[profiles]]
name = "tiny"
text_tokens = 64
output = "256x192"
references = 2
reference_size = "128x128"
"""
"""One shape that the tiny model's engines build for in a second."""
