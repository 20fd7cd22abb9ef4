"""Model configurations as the checkpoint's own `config.json` files give them.

Nothing here is assumed: klein 9B, 4B and any smaller Flux2 klein shape read the same way. What the
exported graphs cannot express (guidance embeddings, sliding windows, biases, ...) is refused here,
so that no later module has to ask.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from klein_kv.errors import CheckpointError

__all__ = [
    "DTYPES",
    "ITEM_SIZE",
    "ModelConfig",
    "TextEncoderConfig",
    "TransformerConfig",
    "VaeConfig",
    "dtype_name",
    "read_json",
    "tensor_bytes",
]

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Command-line names of the floating point types that a graph can compute in."""

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

ITEM_SIZE = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "int64": 8,
    "uint8": 1,
}
"""Bytes per element."""


def dtype_name(dtype: str) -> str:
    """Command-line name of a type of `DTYPES`: "bf16" of "bfloat16"."""
    return _DTYPE_NAMES[dtype]


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor, also of "float4_e2m1fn", of which two elements share a byte."""
    count = math.prod(shape)
    return -(-count // 2) if dtype == "float4_e2m1fn" else count * ITEM_SIZE[dtype]


DEFAULT_TEXT_LAYERS = (9, 18, 27)
"""Hidden states that klein reads (diffusers: `Flux2KleinKVPipeline.__call__`)."""


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Reads one JSON object.

    Raises:
        CheckpointError: the file is missing, is not JSON or does not hold an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{what} is missing: {path} does not exist; expected a checkpoint in diffusers layout"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} cannot be read: {path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} must be a JSON object, got {type(value).__name__}: {path}")
    return value


def _require(config: Mapping[str, Any], component: str, expected: Mapping[str, Any]) -> None:
    """Refuses options that the exported graph does not implement; absent options pass."""
    for key, value in expected.items():
        if key in config and config[key] != value and config[key] is not None:
            raise CheckpointError(
                f"{component} config: {key} is {config[key]!r}, expected {value!r}: "
                "this is not a FLUX.2 [klein] component that klein-kv can export"
            )


def _get(config: Mapping[str, Any], component: str, key: str) -> Any:
    if config.get(key) is None:
        raise CheckpointError(
            f"{component} config: {key} is missing; expected the config.json that diffusers or "
            "transformers saves"
        )
    return config[key]


def _number(config: Mapping[str, Any], component: str, key: str, default: float) -> float:
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(f"{component} config: {key} is {value!r}, expected a number")
    return float(value)


def _integers(
    config: Mapping[str, Any], component: str, key: str, default: tuple[int, ...]
) -> tuple[int, ...]:
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, list | tuple) or not all(type(item) is int for item in value):
        raise CheckpointError(
            f"{component} config: {key} is {value!r}, expected a list of integers"
        )
    return tuple(value)


def _positive(component: str, **values: int) -> None:
    for key, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(
                f"{component} config: {key} is {value!r}, expected a positive integer"
            )


@dataclass(frozen=True, slots=True)
class TransformerConfig:
    """Shape of the denoiser (diffusers: `Flux2Transformer2DModel.__init__`)."""

    in_channels: int
    out_channels: int
    num_layers: int
    num_single_layers: int
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int
    timestep_guidance_channels: int
    mlp_ratio: float
    axes_dims_rope: tuple[int, ...]
    rope_theta: float
    eps: float

    def __post_init__(self) -> None:
        _positive(
            "transformer",
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            num_layers=self.num_layers,
            num_single_layers=self.num_single_layers,
            attention_head_dim=self.attention_head_dim,
            num_attention_heads=self.num_attention_heads,
            joint_attention_dim=self.joint_attention_dim,
            timestep_guidance_channels=self.timestep_guidance_channels,
        )
        if len(self.axes_dims_rope) != 4 or sum(self.axes_dims_rope) != self.attention_head_dim:
            raise CheckpointError(
                f"transformer config: axes_dims_rope is {self.axes_dims_rope}, expected four axes "
                f"(T, H, W, L) that add up to attention_head_dim {self.attention_head_dim}"
            )
        if any(axis % 2 for axis in self.axes_dims_rope):
            raise CheckpointError(
                f"transformer config: axes_dims_rope is {self.axes_dims_rope}, expected even sizes"
            )
        if self.timestep_guidance_channels % 2:
            raise CheckpointError(
                f"transformer config: timestep_guidance_channels is "
                f"{self.timestep_guidance_channels}, expected an even number: half of them are "
                "sines, half cosines"
            )
        if self.in_channels != self.out_channels:
            raise CheckpointError(
                f"transformer config: out_channels is {self.out_channels}, expected in_channels "
                f"{self.in_channels}: the Euler update adds the two"
            )

    @property
    def inner_dim(self) -> int:
        """Width of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_hidden_dim(self) -> int:
        """Width of one half of the SwiGLU projection."""
        return int(self.inner_dim * self.mlp_ratio)

    @property
    def num_blocks(self) -> int:
        """Double blocks, then single blocks: the number of K/V pairs."""
        return self.num_layers + self.num_single_layers

    def kv_bytes(self, ref_tokens: int, dtype: str) -> int:
        """Bytes of all reference K and V of `ref_tokens` tokens."""
        return 2 * self.num_blocks * ref_tokens * self.inner_dim * ITEM_SIZE[dtype]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Reads a diffusers `transformer/config.json`.

        Raises:
            CheckpointError: another class of model, or an option that klein does not have.
        """
        _require(
            config,
            "transformer",
            {"_class_name": "Flux2Transformer2DModel", "guidance_embeds": False, "patch_size": 1},
        )
        part = "transformer"
        in_channels = _get(config, part, "in_channels")
        return cls(
            in_channels=in_channels,
            out_channels=config.get("out_channels") or in_channels,
            num_layers=_get(config, part, "num_layers"),
            num_single_layers=_get(config, part, "num_single_layers"),
            attention_head_dim=_get(config, part, "attention_head_dim"),
            num_attention_heads=_get(config, part, "num_attention_heads"),
            joint_attention_dim=_get(config, part, "joint_attention_dim"),
            timestep_guidance_channels=config.get("timestep_guidance_channels", 256),
            mlp_ratio=_number(config, part, "mlp_ratio", 3.0),
            axes_dims_rope=_integers(config, part, "axes_dims_rope", (32, 32, 32, 32)),
            rope_theta=_number(config, part, "rope_theta", 2000),
            eps=_number(config, part, "eps", 1e-6),
        )


@dataclass(frozen=True, slots=True)
class TextEncoderConfig:
    """Shape of the text encoder (transformers: `Qwen3Config`) up to its last tapped block."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rope_theta: float
    rms_norm_eps: float
    layers: tuple[int, ...] = DEFAULT_TEXT_LAYERS

    def __post_init__(self) -> None:
        _positive(
            "text_encoder",
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab_size,
        )
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"text_encoder config: {self.num_attention_heads} attention heads are not a "
                f"multiple of {self.num_key_value_heads} key/value heads"
            )
        bad = [layer for layer in self.layers if not 0 <= layer <= self.num_hidden_layers]
        if bad or not self.layers:
            raise CheckpointError(
                f"text_encoder: hidden states {list(self.layers)} are to be read, but the encoder "
                f"has {self.num_hidden_layers} layers; name the hidden states of this checkpoint "
                "with --text-layers (diffusers: text_encoder_out_layers)"
            )

    @property
    def num_exported_layers(self) -> int:
        """Blocks that the tapped hidden states need; later ones are never read."""
        return max(self.layers)

    @property
    def output_dim(self) -> int:
        """Width of `encoder_hidden_states`."""
        return len(self.layers) * self.hidden_size

    @classmethod
    def from_dict(
        cls, config: Mapping[str, Any], layers: tuple[int, ...] = DEFAULT_TEXT_LAYERS
    ) -> Self:
        """Reads a transformers `text_encoder/config.json` (Qwen3, before and after version 5).

        Raises:
            CheckpointError: another architecture, or an option that the graph does not implement.
        """
        part = "text_encoder"
        _require(
            config,
            part,
            {
                "model_type": "qwen3",
                "hidden_act": "silu",
                "attention_bias": False,
                "use_sliding_window": False,
            },
        )
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(rope, Mapping) or rope.get("rope_type", "default") != "default":
            raise CheckpointError(
                f"text_encoder config: the RoPE parameters are {rope!r}, expected those of "
                "rope_type 'default'"
            )
        kinds = config.get("layer_types") or []
        if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
            raise CheckpointError(
                f"text_encoder config: layer_types is {kinds!r:.80}, expected full_attention alone"
            )
        heads = _get(config, part, "num_attention_heads")
        hidden = _get(config, part, "hidden_size")
        _positive(part, num_attention_heads=heads, hidden_size=hidden)
        return cls(
            hidden_size=hidden,
            intermediate_size=_get(config, part, "intermediate_size"),
            num_hidden_layers=_get(config, part, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            vocab_size=_get(config, part, "vocab_size"),
            rope_theta=_number(
                {"rope_theta": rope.get("rope_theta") or config.get("rope_theta")},
                part,
                "rope_theta",
                10000.0,
            ),
            rms_norm_eps=_number(config, part, "rms_norm_eps", 1e-6),
            layers=tuple(layers),
        )


@dataclass(frozen=True, slots=True)
class VaeConfig:
    """What the runtime needs to know of the VAE (diffusers: `AutoencoderKLFlux2`)."""

    latent_channels: int
    num_levels: int
    batch_norm_eps: float

    @property
    def scale_factor(self) -> int:
        """Pixels per latent cell and side (diffusers: `vae_scale_factor`)."""
        return int(2 ** (self.num_levels - 1))

    @property
    def multiple_of(self) -> int:
        """Pixels per token and side: one token is a 2x2 patch of latent cells."""
        return 2 * self.scale_factor

    @property
    def token_channels(self) -> int:
        """Channels of one token."""
        return 4 * self.latent_channels

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Reads a diffusers `vae/config.json`.

        Raises:
            CheckpointError: another class of autoencoder.
        """
        _require(config, "vae", {"_class_name": "AutoencoderKLFlux2", "in_channels": 3})
        if _integers(config, "vae", "patch_size", (2, 2)) != (2, 2):
            raise CheckpointError(f"vae config: patch_size is {config['patch_size']}, expected 2x2")
        latent_channels = config.get("latent_channels", 32)
        _positive("vae", latent_channels=latent_channels)
        return cls(
            latent_channels=latent_channels,
            num_levels=len(_integers(config, "vae", "block_out_channels", (0, 0, 0, 0))),
            batch_norm_eps=_number(config, "vae", "batch_norm_eps", 1e-4),
        )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The three networks of one checkpoint, checked against each other."""

    transformer: TransformerConfig
    text_encoder: TextEncoderConfig
    vae: VaeConfig

    def __post_init__(self) -> None:
        if self.text_encoder.output_dim != self.transformer.joint_attention_dim:
            raise CheckpointError(
                f"text encoder and transformer do not fit: {len(self.text_encoder.layers)} hidden "
                f"states {list(self.text_encoder.layers)} of width {self.text_encoder.hidden_size} "
                f"make {self.text_encoder.output_dim}, the transformer's joint_attention_dim is "
                f"{self.transformer.joint_attention_dim}; set the hidden states with --text-layers"
            )
        if self.vae.token_channels != self.transformer.in_channels:
            raise CheckpointError(
                f"vae and transformer do not fit: {self.vae.latent_channels} latent channels make "
                f"tokens of {self.vae.token_channels}, the transformer's in_channels is "
                f"{self.transformer.in_channels}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_saved` reads them back."""
        return asdict(self)

    @classmethod
    def from_saved(cls, value: Mapping[str, Any]) -> Self:
        """Reads what `to_dict` wrote."""
        transformer = dict(value["transformer"])
        transformer["axes_dims_rope"] = tuple(transformer["axes_dims_rope"])
        text = dict(value["text_encoder"])
        text["layers"] = tuple(text["layers"])
        return cls(
            TransformerConfig(**transformer), TextEncoderConfig(**text), VaeConfig(**value["vae"])
        )
