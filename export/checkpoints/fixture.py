"""Klein checkpoints to test and to try with, in the layout that diffusers loads.

Every test, benchmark and demo needs a checkpoint, and the real one is gated and 35 GB. The ones
made here hold random or (pocket) trained weights in the same files, under the same tensor names,
with the same configuration keys; only the sizes differ.
`diffusers.Flux2KleinKVPipeline.from_pretrained` loads them, which makes them a judge of this
project's own graphs.

    pocket       32 MB; trained by us, edits pictures: see `klein_kv.export.checkpoints.pocket`
    tiny         4 MB; made, loaded and run in well under a second each
    small        0.3 GB; an edit of 512x512 with four references takes about 20 s on two CPU cores
    9b-shapes    the shapes of the real 9B model in sparse files: 35 GB to read, 1 MB on the disk

The networks and their weights come from `klein_kv.export.checkpoints.random_model`.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2KleinKVPipeline
from huggingface_hub import split_torch_state_dict_into_shards
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from klein_kv.artifacts.config import DTYPES, tensor_bytes
from klein_kv.artifacts.weights import safetensors_header
from klein_kv.errors import RequestError
from klein_kv.export.checkpoints.pocket import write_pocket
from klein_kv.export.checkpoints.random_model import (
    SIZES,
    FixtureSize,
    fill_random,
    make_scheduler,
    transformer_on_meta,
    vae_on_meta,
)
from klein_kv.export.staging import new_folder

__all__ = ["SIZES", "FixtureSize", "make_fixture", "make_tokenizer"]

_log = logging.getLogger(__name__)


def make_fixture(out: Path, size: str = "tiny", seed: int = 0, dtype: str | None = None) -> None:
    """Writes a checkpoint that `Flux2KleinKVPipeline.from_pretrained(out)` loads.

    The same arguments give the same bytes.

    Args:
        out: folder to make; it may exist if it is empty.
        size: "pocket" or a key of `SIZES`.
        seed: of random weights, 0 to 2**63 - 1; "pocket" and "9b-shapes" have none.
        dtype: "float32", "float16" or "bfloat16"; None takes the size's own.

    Raises:
        RequestError: an unknown size or dtype, a seed out of range, or `out` holds something.
        CapacityError: it cannot be written.
    """
    if size not in ("pocket", *SIZES):
        raise RequestError(f"size is {size!r}; expected one of pocket, {', '.join(SIZES)}")
    if dtype is None:
        dtype = SIZES[size].dtype if size in SIZES else "float32"
    if dtype not in DTYPES.values():
        raise RequestError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES.values())}")
    if not 0 <= seed < 2**63:
        raise RequestError(f"seed is {seed}; expected a number from 0 to 2**63 - 1")
    with new_folder(out) as folder:
        if size == "pocket":
            write_pocket(folder, getattr(torch, dtype))
        else:
            _write_checkpoint(folder, SIZES[size], seed, getattr(torch, dtype))
    _log.info("wrote %s (size %s, seed %d, %s)", out, size, seed, dtype)


def _write_checkpoint(folder: Path, shapes: FixtureSize, seed: int, dtype: torch.dtype) -> None:
    modules = _modules_on_meta(shapes, dtype)
    if not shapes.sparse:
        generator = torch.Generator().manual_seed(seed)
        for module in modules.values():
            fill_random(module.to_empty(device="cpu"), generator)
    pipeline = Flux2KleinKVPipeline(
        scheduler=make_scheduler(), tokenizer=make_tokenizer(), **modules
    )
    if shapes.sparse:
        _save_sparse(folder, pipeline)
    else:
        pipeline.save_pretrained(folder)
    (folder / "LICENSE.md").write_text(_LICENSE, encoding="utf-8")


def _modules_on_meta(shapes: FixtureSize, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The three networks without storage, under the pipeline's names for them."""
    config = Qwen3Config(
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=False,
        **shapes.text_encoder,
    )
    with torch.device("meta"):
        text_encoder = Qwen3ForCausalLM(config)
    return {
        "transformer": transformer_on_meta(shapes, dtype),
        # nn.Module's own `to`: see `random_model`.
        "text_encoder": nn.Module.to(text_encoder, dtype=dtype).eval(),
        "vae": vae_on_meta(shapes, dtype),
    }


def _save_sparse(folder: Path, pipeline: Any) -> None:
    """Saves a pipeline of meta modules: configurations as they are, weights as holes.

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
    """Sparse safetensors files, with an index where there is more than one."""
    split = split_torch_state_dict_into_shards(
        state, filename_pattern=stem + "{suffix}.safetensors", max_shard_size=limit
    )
    for filename, names in split.filename_to_tensors.items():
        # Wider types go first, as the library's own writer puts them: tensors are aligned then.
        ordered = sorted(names, key=lambda name: (-state[name].itemsize, name))
        kinds = {
            name: (str(state[name].dtype).removeprefix("torch."), tuple(state[name].shape))
            for name in ordered
        }
        header = safetensors_header(kinds)
        with (folder / filename).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(tensor_bytes(*kind) for kind in kinds.values()))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        path = folder / f"{stem}.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


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


def make_tokenizer(corpus: Sequence[str] = _CORPUS) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer of Qwen2's class with Qwen3's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = BpeTrainer(
        vocab_size=len(alphabet) + _MERGED_TOKENS,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    learner.train_from_iterator(corpus, trainer)
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
