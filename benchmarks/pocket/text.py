"""Trains pocket's text encoder: a narrow Qwen3 of 28 layers that knows what is asked.

    python -m benchmarks.pocket.text OUT [--minutes 8]

From the end of the prompt on, the hidden states that the denoiser reads (9, 18 and 27, side by
side) are taught to tell task, colours and shape by a linear reading, however it was said. That
holds for the padding too, which the denoiser attends to: it says the same as the last word.
"""

import argparse
import logging
import math
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from benchmarks.pocket.instructions import SLOTS, TASKS, say
from benchmarks.pocket.scenes import draw_meaning
from benchmarks.pocket.state import load_state, save_state
from klein_kv.export.checkpoints import fixture

__all__ = ["TAPS", "TEXT_TOKENS", "Prompts", "make_text_encoder", "make_tokenizer", "spread"]

logger = logging.getLogger(__name__)

TAPS = (9, 18, 27)
TEXT_TOKENS = 512
SAMPLED = 16  # tokens of the padding in a training batch


def spread(start: int, stop: int, count: int, random: np.random.Generator) -> list[int]:
    """Numbers of start to stop - 1 in order, one drawn from each of `count` equal parts."""
    edges = np.linspace(start, stop, count + 1).astype(int)
    return [int(random.integers(low, high)) for low, high in pairwise(edges)]


def make_tokenizer() -> Qwen2Tokenizer:
    """A byte-level tokenizer with merges learnt from instructions."""
    random = np.random.default_rng(0)
    tasks = list(TASKS)
    corpus = [say(draw_meaning(tasks[index % len(tasks)], random), random) for index in range(4000)]
    return fixture.make_tokenizer([*corpus, "user assistant system think"])


def make_text_encoder(vocabulary: int) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=28,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=40960,
            rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
            tie_word_embeddings=True,
        )
    )


class Prompts:
    """Token features of prompts, as many as one batch needs."""

    def __init__(self, tokenizer: Qwen2Tokenizer, encoder: Qwen3ForCausalLM) -> None:
        self.tokenizer = tokenizer
        self.encoder = encoder

    def features(self, prompts: Sequence[str], positions: Sequence[int]) -> Tensor:
        """What the denoiser reads of each prompt at some positions, of 0 to 511, in order.

        Every token of every prompt has to be among them; what lies behind its end is padding.

        Returns:
            [B, positions, 3 x width].
        """
        rows = [self.tokens(prompt) for prompt in prompts]
        lengths = torch.tensor([len(row) for row in rows])
        longest = int(lengths.max())
        if list(positions[:longest]) != list(range(longest)):
            raise ValueError(f"positions are {positions}; expected every one of {longest} tokens")
        ids = torch.full((len(rows), len(positions)), self.tokenizer.pad_token_id)
        for row, values in zip(ids, rows, strict=True):
            row[: len(values)] = torch.tensor(values)
        real = torch.arange(len(positions))[None] < lengths[:, None]
        causal = torch.ones(len(positions), len(positions), dtype=torch.bool).tril()
        output = self.encoder.model(
            input_ids=ids,
            attention_mask={"full_attention": (causal & real[:, None])[:, None]},
            position_ids=torch.tensor(positions)[None],
            output_hidden_states=True,
            use_cache=False,
        )
        return torch.cat([output.hidden_states[tap] for tap in TAPS], dim=-1)

    def tokens(self, prompt: str) -> list[int]:
        """A prompt's tokens, chat template included, without padding."""
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        tokens: list[int] = self.tokenizer(text)["input_ids"]
        return tokens


def train(out: Path, minutes: float) -> None:
    torch.manual_seed(0)
    if not (out / "tokenizer").is_dir():  # weights learnt with another one are worthless
        make_tokenizer().save_pretrained(out / "tokenizer")
    tokenizer = Qwen2Tokenizer.from_pretrained(out / "tokenizer")
    encoder = make_text_encoder(len(tokenizer))
    width = len(TAPS) * encoder.config.hidden_size
    reader = nn.Linear(width, sum(map(len, SLOTS.values())))
    both = nn.ModuleDict({"encoder": encoder, "reader": reader})
    optimizer = torch.optim.AdamW(both.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    averaged = {name: value.detach().clone() for name, value in both.state_dict().items()}
    path = out / "text.safetensors"
    spent, step = load_state(path, both, averaged, [optimizer])
    random = np.random.default_rng(step + 1)
    prompts = Prompts(tokenizer, encoder)
    tasks = list(TASKS)
    started = time.monotonic() - spent
    while (spent := time.monotonic() - started) < minutes * 60:
        share = spent / (minutes * 60)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(step / 100, 1) * (0.5 + 0.5 * math.cos(math.pi * share))
        meanings = [draw_meaning(str(task), random) for task in random.choice(tasks, 32)]
        texts = [say(meaning, random) for meaning in meanings]
        lengths = [len(prompts.tokens(text)) for text in texts]
        sampled = spread(max(lengths), TEXT_TOKENS, SAMPLED, random)
        positions = [*range(max(lengths)), *sampled]
        features = prompts.features(texts, positions)
        after = torch.arange(len(positions))[None] >= torch.tensor(lengths)[:, None] - 1
        logits = reader(features)[after]
        wanted = torch.tensor([meaning.slots for meaning in meanings])
        wanted = wanted[:, None].expand(-1, len(positions), -1)[after]
        losses, right, start = [], torch.ones(len(wanted), dtype=torch.bool), 0
        for slot, options in enumerate(SLOTS.values()):
            part = logits[:, start : start + len(options)]
            losses.append(functional.cross_entropy(part, wanted[:, slot]))
            right &= part.argmax(-1) == wanted[:, slot]
            start += len(options)
        size = features.square().mean(-1).sqrt()
        loss = torch.stack(losses).sum() + 0.02 * (size - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            for name, value in both.state_dict().items():
                averaged[name].lerp_(value, 0.005 if step > 200 else 1.0)
        if step % 50 == 0:
            logger.info(
                "%4.1f min, step %d: loss %.4f, right %.2f %%, size %.2f",
                spent / 60,
                step,
                float(loss.detach()),
                100 * float(right.float().mean()),
                float(size.detach().mean()),
            )
        if step % 500 == 0:
            save_state(path, both, averaged, [optimizer], spent, step)
    save_state(path, both, averaged, [optimizer], spent, step)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=8)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments.out.mkdir(parents=True, exist_ok=True)
    train(arguments.out, arguments.minutes)
