"""Model configurations as the checkpoint's own `config.json` files give them.

Nothing here is assumed: klein 9B, 4B and any smaller Flux2 klein shape read the same way. What the
exported graphs cannot express (guidance embeddings, sliding windows, biases, ...) is refused here,
so that no later module has to ask.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self, TypeVar

from klein_kv.artifacts.digest import stand_in
from klein_kv.errors import MALFORMED, CheckpointError

__all__ = [
    "DTYPES",
    "ITEM_SIZE",
    "ModelConfig",
    "TextEncoderConfig",
    "TransformerConfig",
    "VaeConfig",
    "check_text_width",
    "dtype_name",
    "read_json",
    "tensor_bytes",
]

T = TypeVar("T")

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Command-line names of the floating point types that a graph can compute in."""

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

ITEM_SIZE = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "uint8": 1,
}
"""Bytes per element."""

DEFAULT_TEXT_LAYERS = (9, 18, 27)
"""Hidden states that klein reads (diffusers: `Flux2KleinKVPipeline.__call__`)."""


def dtype_name(dtype: str) -> str:
    """Command-line name of a type of `DTYPES`: "bf16" of "bfloat16"."""
    return _DTYPE_NAMES[dtype]


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor, also of "float4_e2m1fn", of which two elements share a byte."""
    count = math.prod(shape)
    return -(-count // 2) if dtype == "float4_e2m1fn" else count * ITEM_SIZE[dtype]


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Reads one JSON object; a `CheckpointError` names `what` is missing or no such thing."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{what} is missing: {path} does not exist; expected a checkpoint in diffusers layout"
        ) from error
    except (OSError, *MALFORMED) as error:
        raise CheckpointError(
            f"{what} cannot be read: {path}: {stand_in(path) or error}"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} must be a JSON object, got {type(value).__name__}: {path}")
    return value


def _require(config: Mapping[str, Any], component: str, expected: Mapping[str, Any]) -> None:
    """Refuses options that the exported graph does not implement; absent options pass."""
    for key, value in expected.items():
        if config.get(key) not in (None, value):
            raise CheckpointError(
                f"{component} config: {key} is {config[key]!r}, expected {value!r}: "
                "this is not a FLUX.2 [klein] component that klein-kv can export"
            )


def _read(kind: type[T], component: str, config: Mapping[str, Any], **defaults: Any) -> T:
    """Fills the fields of a configuration; absent ones and null take their default."""
    values: dict[str, Any] = {}
    for field in fields(kind):  # type: ignore[arg-type]
        value = config.get(field.name)
        value = defaults.get(field.name) if value is None else value
        if value is None:
            raise CheckpointError(
                f"{component} config: {field.name} is missing; expected the config.json that "
                "diffusers or transformers saves"
            )
        if field.type is float and type(value) is int and abs(value) < 1 << 53:
            value = float(value)
        values[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def _check(component: str, name: str, value: Any, kind: Any) -> None:
    """Refuses a value of another type than its field's; integers are sizes, so positive.

    No network is near the limits: beyond them naming its tensors alone would take the memory.
    """
    if kind is int:
        most = 1024 if "layers" in name else 1 << 24
        good, expected = type(value) is int and 0 < value <= most, f"an integer of 1 to {most}"
    elif kind is float:
        good, expected = type(value) in (int, float) and 0 <= value <= 1e9, "a number of 0 to 1e9"
    else:
        good = isinstance(value, tuple) and all(type(item) is int for item in value)
        expected = "a list of integers"
    if not good:
        raise CheckpointError(f"{component} config: {name} is {value!r}, expected {expected}")


def _check_fields(component: str, config: Any) -> None:
    for field in fields(config):
        _check(component, field.name, getattr(config, field.name), field.type)


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
        _check_fields("transformer", self)
        axes, channels = self.axes_dims_rope, self.timestep_guidance_channels
        wrong = None
        if len(axes) != 4 or sum(axes) != self.attention_head_dim:
            wrong = (
                f"axes_dims_rope is {axes}, expected four axes (T, H, W, L) that add up to "
                f"attention_head_dim {self.attention_head_dim}"
            )
        elif any(axis % 2 for axis in axes):
            wrong = f"axes_dims_rope is {axes}, expected even sizes"
        elif channels % 2:
            wrong = (
                f"timestep_guidance_channels is {channels}, expected an even number: half of them "
                "are sines, half cosines"
            )
        elif self.in_channels != self.out_channels:
            wrong = (
                f"out_channels is {self.out_channels}, expected in_channels {self.in_channels}: "
                "the Euler update adds the two"
            )
        if wrong is not None:
            raise CheckpointError(f"transformer config: {wrong}")

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
        """Reads a diffusers `transformer/config.json`; a `CheckpointError` if it is not klein's."""
        klein = {"_class_name": "Flux2Transformer2DModel", "guidance_embeds": False}
        _require(config, "transformer", klein | {"patch_size": 1})
        return _read(
            cls,
            "transformer",
            config,
            out_channels=config.get("in_channels"),
            timestep_guidance_channels=256,
            mlp_ratio=3.0,
            axes_dims_rope=(32, 32, 32, 32),
            rope_theta=2000.0,
            eps=1e-6,
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
        _check_fields("text_encoder", self)
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

        A `CheckpointError` tells of another architecture, or an option that no graph implements.
        """
        qwen3 = {"model_type": "qwen3", "hidden_act": "silu"}
        off = {"attention_bias": False, "use_sliding_window": False}
        _require(config, "text_encoder", qwen3 | off)
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
        hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
        for name, size in (("hidden_size", hidden), ("num_attention_heads", heads)):
            if size is not None:
                _check("text_encoder", name, size, int)
        own = {"rope_theta": rope.get("rope_theta") or config.get("rope_theta"), "layers": layers}
        return _read(
            cls,
            "text_encoder",
            {**config, **own},
            num_key_value_heads=heads,
            head_dim=hidden // heads if hidden and heads else 1,
            rope_theta=10000.0,
            rms_norm_eps=1e-6,
        )


@dataclass(frozen=True, slots=True)
class VaeConfig:
    """Shape of the VAE (diffusers: `AutoencoderKLFlux2.__init__`)."""

    latent_channels: int
    block_out_channels: tuple[int, ...]  # of the encoder's levels, from the image down
    decoder_block_out_channels: tuple[int, ...]  # of the decoder's, in the same order
    layers_per_block: int
    norm_num_groups: int
    batch_norm_eps: float

    def __post_init__(self) -> None:
        _check_fields("vae", self)
        groups = self.norm_num_groups
        for name in ("block_out_channels", "decoder_block_out_channels"):
            channels = getattr(self, name)
            if not channels or any(x < groups or x % groups for x in channels):
                raise CheckpointError(
                    f"vae config: {name} is {channels}, expected multiples of norm_num_groups "
                    f"{groups}"
                )
        if len(self.decoder_block_out_channels) != self.num_levels:
            raise CheckpointError(
                f"vae config: decoder_block_out_channels is {self.decoder_block_out_channels}, "
                f"expected {self.num_levels} levels, as the encoder has"
            )

    @property
    def num_levels(self) -> int:
        """Sizes that an image passes through, each half of the one before."""
        return len(self.block_out_channels)

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
        """Reads a diffusers `vae/config.json`; a `CheckpointError` if it is not klein's."""
        own = {"_class_name": "AutoencoderKLFlux2", "in_channels": 3, "out_channels": 3}
        on = ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention")
        _require(config, "vae", own | {"act_fn": "silu", "patch_size": [2, 2]})
        _require(config, "vae", dict.fromkeys(on, True))
        channels = config.get("block_out_channels") or (128, 256, 512, 512)
        read = _read(
            cls,
            "vae",
            config,
            latent_channels=32,
            block_out_channels=channels,
            decoder_block_out_channels=channels,
            layers_per_block=2,
            norm_num_groups=32,
            batch_norm_eps=1e-4,
        )
        blocks = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
        _require(config, "vae", {key: [kind] * read.num_levels for key, kind in blocks.items()})
        return read


_SIZES = {2560: "4B, which reads Qwen3-4B", 4096: "9B, which reads Qwen3-8B"}
"""Released models by the width of their text encoder."""


def check_text_width(transformer: TransformerConfig, text_encoder: Mapping[str, Any]) -> None:
    """Refuses a text encoder of another model, before anything is said of its hidden states.

    A `CheckpointError` names both models; every klein reads three hidden states, so that no choice
    of others mends it.
    """
    states, width = len(DEFAULT_TEXT_LAYERS), text_encoder.get("hidden_size")
    wanted, rest = divmod(transformer.joint_attention_dim, states)
    if rest or type(width) is not int or width == wanted:
        return
    models = (f" (klein {_SIZES[x]})" if x in _SIZES else "" for x in (wanted, width))
    raise CheckpointError(
        f"text encoder and transformer are of different models and do not fit: the transformer "
        f"reads {states} hidden states of width {wanted}{next(models)}, the text encoder has width "
        f"{width}{next(models)}; take transformer/ and text_encoder/ of the same model, or for a "
        "single file a base of its size"
    )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The three networks of one checkpoint, checked against each other."""

    transformer: TransformerConfig
    text_encoder: TextEncoderConfig
    vae: VaeConfig

    def __post_init__(self) -> None:
        text, net = self.text_encoder, self.transformer
        if text.output_dim != net.joint_attention_dim:
            raise CheckpointError(
                f"text encoder and transformer do not fit: {len(text.layers)} hidden states "
                f"{list(text.layers)} of width {text.hidden_size} make {text.output_dim}, the "
                f"transformer's joint_attention_dim is {net.joint_attention_dim}; set the hidden "
                "states with --text-layers"
            )
        if self.vae.token_channels != net.in_channels:
            raise CheckpointError(
                f"vae and transformer do not fit: {self.vae.latent_channels} latent channels make "
                f"tokens of {self.vae.token_channels}, the transformer's in_channels is "
                f"{net.in_channels}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_json` reads them back."""
        return asdict(self)
