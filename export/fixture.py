"""Random klein checkpoints in the layout that diffusers loads.

Every test, benchmark and demo needs a checkpoint, and the real one is gated and 35 GB. The ones
made here hold random weights in the same files, under the same tensor names, with the same
configuration keys; only the sizes differ. `diffusers.Flux2KleinKVPipeline.from_pretrained` loads
them, which makes them a judge of this project's own graphs.

    tiny         4 MB; made, loaded and run in well under a second each
    small        0.3 GB; an edit of 512x512 with four references takes about 20 s on two CPU cores
    9b-shapes    the shapes of the real 9B model in sparse files: 35 GB to read, 1 MB on the disk

Weights are scaled so that activations stay of order one through all blocks, and the modulations,
norms and BatchNorm statistics differ from their identity: a graph that drops one gives another
image.
"""

import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    Flux2Transformer2DModel,
)
from huggingface_hub import split_torch_state_dict_into_shards
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from klein_kv.errors import CheckpointError, RequestError

__all__ = ["SIZES", "FixtureSize", "make_fixture"]

logger = logging.getLogger(__name__)

_DTYPES = MappingProxyType(
    {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
)
_SAFETENSORS_DTYPES = MappingProxyType(
    {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
)

_LATENT_CHANNELS = 32  # FLUX.2's; the transformer reads 2x2 patches of it, so 128 channels
_TEXT_TAPS = 3  # hidden states 9, 18 and 27, side by side on the feature axis
_LAST_TEXT_TAP = 27


@dataclass(frozen=True, slots=True)
class FixtureSize:
    """Shapes of one fixture checkpoint. Counts and widths in elements.

    Attributes:
        double_blocks: Two-stream transformer blocks.
        single_blocks: One-stream transformer blocks.
        heads: Attention heads of the transformer.
        head_dim: Features per head; a multiple of 8, split evenly over the four RoPE axes.
        text_layers: Decoder layers of the text encoder. At least 28, because the last hidden
            state of a Qwen3 model is normalised and must not be the last tap.
        text_hidden: Width of the text encoder.
        text_heads: Query heads of the text encoder.
        text_kv_heads: Key and value heads of the text encoder.
        text_head_dim: Features per head of the text encoder.
        text_intermediate: Width of the text encoder's feed-forward.
        text_vocabulary: Rows of the embedding; more than the tokenizer has tokens.
        vae_channels: Channels of the four levels of the autoencoder (a scale factor of 8).
        vae_groups: Groups of its GroupNorms; divides every entry of `vae_channels`.
        vae_layers: Residual blocks per level.
        dtype: Data type of the weights when the caller names none.
        sparse: Write holes in place of values. Every weight reads as zero.

    Raises:
        RequestError: A shape that the model classes cannot be built with.
    """

    double_blocks: int
    single_blocks: int
    heads: int
    head_dim: int
    text_layers: int
    text_hidden: int
    text_heads: int
    text_kv_heads: int
    text_head_dim: int
    text_intermediate: int
    text_vocabulary: int
    vae_channels: tuple[int, int, int, int]
    vae_groups: int
    vae_layers: int
    dtype: str = "float32"
    sparse: bool = False

    def __post_init__(self) -> None:
        if self.head_dim % 8:
            raise RequestError(
                f"head_dim is {self.head_dim}; expected a multiple of 8, so that four RoPE axes "
                "get an even share each"
            )
        if self.text_layers <= _LAST_TEXT_TAP:
            raise RequestError(
                f"text_layers is {self.text_layers}; expected more than {_LAST_TEXT_TAP}, the "
                "last hidden state that is read"
            )
        if any(channels % self.vae_groups for channels in self.vae_channels):
            raise RequestError(
                f"vae_channels {self.vae_channels} are not all multiples of vae_groups "
                f"{self.vae_groups}; choose a common divisor"
            )

    @property
    def joint_attention_dim(self) -> int:
        """Width of the text that the transformer reads."""
        return _TEXT_TAPS * self.text_hidden

    @property
    def axes_dims_rope(self) -> tuple[int, int, int, int]:
        """Features per RoPE axis (T, H, W, L)."""
        axis = self.head_dim // 4
        return (axis, axis, axis, axis)


SIZES: Mapping[str, FixtureSize] = MappingProxyType(
    {
        "tiny": FixtureSize(
            double_blocks=1,
            single_blocks=2,
            heads=2,
            head_dim=32,
            text_layers=28,
            text_hidden=32,
            text_heads=4,
            text_kv_heads=2,
            text_head_dim=16,
            text_intermediate=80,
            text_vocabulary=640,
            vae_channels=(16, 16, 24, 24),
            vae_groups=8,
            vae_layers=1,
        ),
        "small": FixtureSize(
            double_blocks=4,
            single_blocks=10,
            heads=4,
            head_dim=128,
            text_layers=28,
            text_hidden=128,
            text_heads=4,
            text_kv_heads=2,
            text_head_dim=32,
            text_intermediate=384,
            text_vocabulary=640,
            vae_channels=(32, 64, 96, 96),
            vae_groups=16,
            vae_layers=1,
        ),
        # Transformer: klein-9b in diffusers' scripts/convert_flux2_to_diffusers.py. Text encoder:
        # the configuration of Qwen/Qwen3-8B. Autoencoder: the defaults of AutoencoderKLFlux2.
        "9b-shapes": FixtureSize(
            double_blocks=8,
            single_blocks=24,
            heads=32,
            head_dim=128,
            text_layers=36,
            text_hidden=4096,
            text_heads=32,
            text_kv_heads=8,
            text_head_dim=128,
            text_intermediate=12288,
            text_vocabulary=151936,
            vae_channels=(128, 256, 512, 512),
            vae_groups=32,
            vae_layers=2,
            dtype="bfloat16",
            sparse=True,
        ),
    }
)


def make_fixture(out: Path, size: str = "tiny", seed: int = 0, dtype: str | None = None) -> None:
    """Write a random checkpoint that `Flux2KleinKVPipeline.from_pretrained(out)` loads.

    The same arguments give the same bytes. The folder appears whole or not at all: it is written
    beside `out` and renamed.

    Args:
        out: Folder to make. It may exist if it is empty.
        size: A key of `SIZES`.
        seed: Seed of the weights, 0 to 2**63 - 1. Sparse sizes have none, and ignore it.
        dtype: "float32", "float16" or "bfloat16"; None takes the size's own.

    Raises:
        RequestError: An unknown size or dtype, or a seed out of range.
        CheckpointError: `out` is a file, or a folder that holds something.
    """
    if size not in SIZES:
        raise RequestError(f"size is {size!r}; expected one of {', '.join(SIZES)}")
    shapes = SIZES[size]
    dtype = shapes.dtype if dtype is None else dtype
    if dtype not in _DTYPES:
        raise RequestError(f"dtype is {dtype!r}; expected one of {', '.join(_DTYPES)}")
    if not 0 <= seed < 2**63:
        raise RequestError(f"seed is {seed}; expected a number from 0 to 2**63 - 1")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(
            f"{out} is already there; expected a new or an empty folder. "
            "Choose another folder or remove this one"
        )

    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_checkpoint(partial, shapes, seed, _DTYPES[dtype])
        if out.exists():  # Windows renames onto no folder, not even an empty one
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    logger.info("wrote %s (size %s, seed %d, %s)", out, size, seed, dtype)


def _write_checkpoint(folder: Path, shapes: FixtureSize, seed: int, dtype: torch.dtype) -> None:
    """Build every component and save it, with its values or with holes."""
    tokenizer = _tokenizer()
    if len(tokenizer) > shapes.text_vocabulary:
        raise RequestError(
            f"text_vocabulary is {shapes.text_vocabulary}; expected at least the tokenizer's "
            f"{len(tokenizer)}"
        )
    modules = _modules_on_meta(shapes, dtype)
    if not shapes.sparse:
        generator = torch.Generator().manual_seed(seed)
        for module in modules.values():
            _fill(module.to_empty(device="cpu"), generator)
    pipeline = Flux2KleinKVPipeline(
        scheduler=_scheduler(),
        tokenizer=tokenizer,
        **modules,
    )
    if shapes.sparse:
        _save_sparse(folder, pipeline)
    else:
        pipeline.save_pretrained(folder)
    (folder / "LICENSE.md").write_text(_LICENSE, encoding="utf-8")


def _modules_on_meta(shapes: FixtureSize, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The three networks without storage, under the pipeline's names for them."""
    with torch.device("meta"):
        transformer = Flux2Transformer2DModel(
            in_channels=4 * _LATENT_CHANNELS,
            num_layers=shapes.double_blocks,
            num_single_layers=shapes.single_blocks,
            attention_head_dim=shapes.head_dim,
            num_attention_heads=shapes.heads,
            joint_attention_dim=shapes.joint_attention_dim,
            axes_dims_rope=shapes.axes_dims_rope,
            guidance_embeds=False,
        )
        text_encoder = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=shapes.text_vocabulary,
                hidden_size=shapes.text_hidden,
                intermediate_size=shapes.text_intermediate,
                num_hidden_layers=shapes.text_layers,
                num_attention_heads=shapes.text_heads,
                num_key_value_heads=shapes.text_kv_heads,
                head_dim=shapes.text_head_dim,
                max_position_embeddings=40960,
                rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
                tie_word_embeddings=False,
            )
        )
        vae = AutoencoderKLFlux2(
            block_out_channels=shapes.vae_channels,
            layers_per_block=shapes.vae_layers,
            latent_channels=_LATENT_CHANNELS,
            norm_num_groups=shapes.vae_groups,
        )
    modules = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}
    # nn.Module's own `to`: the override of diffusers 0.42 warns of layers to keep in float32 even
    # when the model names none.
    return {name: nn.Module.to(module, dtype=dtype).eval() for name, module in modules.items()}


def _scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1 [dev]'s schedule, which diffusers' conversion script gives to FLUX.2 too."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


# --- weights ---------------------------------------------------------------------------------

# Where 1/sqrt(fan-in) is not enough, by the end of the name. Measured on `tiny` (two references)
# and `small` (four): the noise prediction and the final latents have a standard deviation of 1.1 to
# 1.5, the blocks of at most 2.9, and every input, the references' order too, shows in the pixels.
_GAINS = MappingProxyType(
    {
        # SiLU halves what passes, and there are two on the way from the timestep to a modulation.
        "timestep_embedder.linear_1.weight": 1.5,
        "timestep_embedder.linear_2.weight": 1.5,
        # 28 residual layers and no final norm: the text arrives four times too large.
        "context_embedder.weight": 0.25,
        # Queries of unit scale attend almost evenly, and then it hardly matters to what.
        "attn.norm_q.weight": 2.0,
        "attn.norm_added_q.weight": 2.0,
        # Most pixels inside the range of an image, few of them clipped.
        "decoder.conv_out.weight": 0.5,
    }
)


def _fill(module: nn.Module, generator: torch.Generator) -> None:
    """Draw every tensor of a module's state, in the order of its state_dict, in float32."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(_random(name, tensor.shape, generator))
        else:
            tensor.zero_()  # BatchNorm's num_batches_tracked


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Values for one tensor: normal with 1/sqrt(fan-in) for matrices, near identity for norms."""
    normal = torch.randn(shape, generator=generator)
    if name == "bn.running_var":
        return (0.3 * normal).exp()
    if name == "bn.running_mean":
        return 0.3 * normal
    if name.endswith(".bias"):
        return 0.1 * normal
    if name.endswith("embed_tokens.weight"):
        return normal
    gain = next((gain for suffix, gain in _GAINS.items() if name.endswith(suffix)), 1.0)
    if len(shape) == 1:
        return gain * (1.0 + 0.1 * normal)
    return normal * (gain / math.sqrt(shape[1:].numel()))


# --- sparse files ----------------------------------------------------------------------------


def _save_sparse(folder: Path, pipeline: Flux2KleinKVPipeline) -> None:
    """Save a pipeline of meta modules: configurations as they are, weights as holes.

    Shards are cut as the published repositories cut them: the transformer at 10 GB (diffusers'
    default), the text encoder at 5 GB (transformers' default at the time).
    """
    pipeline.save_config(folder)
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    for name, stem, limit in (
        ("transformer", "diffusion_pytorch_model", "10GB"),
        ("text_encoder", "model", "5GB"),
        ("vae", "diffusion_pytorch_model", "10GB"),
    ):
        module = getattr(pipeline, name)
        target = folder / name
        target.mkdir()
        if name == "text_encoder":
            module.config.architectures = [type(module).__name__]
            module.config.dtype = module.dtype
            module.config.save_pretrained(target)
            module.generation_config.save_pretrained(target)
        else:
            module.save_config(target)
        _write_shards(target, stem, module.state_dict(), limit)


def _write_shards(folder: Path, stem: str, state: dict[str, Tensor], limit: str) -> None:
    """Write a state as sparse safetensors files, with an index when there is more than one."""
    split = split_torch_state_dict_into_shards(
        state, filename_pattern=stem + "{suffix}.safetensors", max_shard_size=limit
    )
    for filename, names in split.filename_to_tensors.items():
        _write_sparse_safetensors(folder / filename, {name: state[name] for name in names})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        path = folder / f"{stem}.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_sparse_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors header, then extend the file to its full length without data.

    The format (huggingface/safetensors, README): 8 bytes of header length, little endian; a JSON
    header padded with spaces; the tensors back to back. Wider types go first, as the library's
    own writer puts them, so that every tensor starts on a multiple of its item size.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):
        begin, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {
            "dtype": _SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


# --- tokenizer -------------------------------------------------------------------------------

# Qwen2's split into words (transformers, models/qwen2/tokenization_qwen2.py, PRETOKENIZE_REGEX).
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MERGED_TOKENS = 256  # tokens made of more than one byte

# Text to learn merges from: enough that ordinary prompts shorten to about a third of their bytes.
_CORPUS = (
    "A photograph of a red kite over the sea at night, seen from the harbour in the evening light.",
    "Change the colour of the coat to green and keep everything else in the picture as it was.",
    "Put the cat from the first image on the chair in the second image, facing the window.",
    "Replace the background with a street in the rain; the person stays where she is standing.",
    "Make it look like a watercolour painting with soft shadows and a warm, golden morning sky.",
    "Remove the text from the sign above the door, then add a small wooden boat to the foreground.",
    "The same scene in winter: snow on the roofs, bare trees, and people walking with lanterns.",
    "user assistant system think 0 1 2 3 4 5 6 7 8 9 in the style of the other reference images",
)

# Qwen3's form of a conversation, as far as one message needs it: an empty block of thoughts tells
# the model that the caller wants none.
_CHAT_TEMPLATE = r"""{%- for message in messages %}
    {{- "<|im_start|>" ~ message["role"] ~ "\n" ~ message["content"] ~ "<|im_end|>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\n" }}
    {%- if not enable_thinking | default(true) %}
        {{- "<think>\n\n</think>\n\n" }}
    {%- endif %}
{%- endif %}
"""


def _tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer of Qwen2's class with Qwen3's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = BpeTrainer(
        vocab_size=len(alphabet) + _MERGED_TOKENS,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    learner.train_from_iterator(_CORPUS, trainer)
    learned = json.loads(learner.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=40960,
        chat_template=_CHAT_TEMPLATE,
    )
    # Part of the text for a decoder that skips special tokens, as in Qwen3.
    tokenizer.add_tokens(
        [AddedToken(text, normalized=False, special=False) for text in ("<think>", "</think>")]
    )
    return tokenizer


_LICENSE = """\
# Licence of this checkpoint

The weights in this folder are random numbers, drawn from a seed by klein-kv. Nothing was learned
from any data and nothing was taken from another model. They are licensed under the Apache License,
Version 2.0 (https://www.apache.org/licenses/LICENSE-2.0), like klein-kv itself.
"""
