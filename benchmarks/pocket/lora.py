"""Trains pocket's adapter, a LoRA that gives every result a style, on a frozen denoiser.

    python -m benchmarks.pocket.lora OUT --font FILE --minutes 10

OUT is what the other scripts filled. Writes OUT/cyanotype.safetensors as PEFT and diffusers name
it. The answers are those of the edits in the style (`scenes.cyanotype`), so that what the adapter
should do is known to the pixel too.
"""

import argparse
import logging
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from benchmarks.pocket.denoiser import forward, make_transformer
from benchmarks.pocket.edits import Latents, Pool, PromptBank
from benchmarks.pocket.parts import load_parts
from benchmarks.pocket.scenes import cyanotype, load_subjects
from benchmarks.pocket.state import load_averaged
from benchmarks.pocket.train import Batches

logger = logging.getLogger(__name__)

RANK = 8
SIZES = ((192, 192), (192, 192), (128, 128), (160, 160), (128, 192), (192, 128))


class LowRank(nn.Module):
    """A weight plus the product of two factors; it changes nothing at first."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.down = nn.Parameter(torch.randn(RANK, columns) / columns**0.5)
        self.up = nn.Parameter(torch.zeros(rows, RANK))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def add_low_rank(model: nn.Module) -> dict[str, LowRank]:
    """Gives every linear layer of the blocks a change to learn, by the layer's name."""
    model.requires_grad_(False)
    changes = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "transformer_blocks" in name:
            changes[name] = LowRank(module.weight)
            parametrize.register_parametrization(module, "weight", changes[name])
    return changes


def train(arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    parts = load_parts(arguments.out)
    subjects = load_subjects(arguments.font).training
    latents = Latents(parts.vae, arguments.out / "statistics.safetensors")
    model = make_transformer(parts.text_width)
    model.load_state_dict(load_averaged(arguments.out / "denoiser.safetensors"))
    changes = add_low_rank(model)
    factors = [factor for change in changes.values() for factor in change.parameters()]
    optimizer = torch.optim.AdamW(factors, betas=(0.9, 0.98), weight_decay=0.0)
    bank = PromptBank(parts.prompts, random, forms=6)
    pools = {size: Pool(size, latents, subjects, random, cyanotype) for size in set(SIZES)}
    batches = Batches(bank, pools, SIZES, random)
    started, step, losses = time.monotonic(), 0, list[float]()
    while (share := (time.monotonic() - started) / (60 * arguments.minutes)) < 1:
        _, (answers, references, text, positions, at) = batches.draw()
        noise = torch.randn_like(answers)
        noisy = torch.lerp(answers, noise, at[:, None, None])
        with parametrize.cached():
            predicted = forward(model, noisy, at, references, text, positions)
        loss = functional.mse_loss(predicted, noise - answers)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(factors, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = arguments.rate * min((step + 1) / 20, 1, (1 - share) / 0.5)
        optimizer.step()
        step += 1
        losses.append(float(loss.detach()))
        if step % 25 == 0:
            logger.info(
                "step %d, %.1f min, loss %.4f", step, share * arguments.minutes, np.mean(losses)
            )
            losses.clear()
    tensors = {}
    for name, change in changes.items():
        tensors[f"transformer.{name}.lora_A.weight"] = change.down.detach().half()
        tensors[f"transformer.{name}.lora_B.weight"] = change.up.detach().half()
    save_file(tensors, arguments.out / "cyanotype.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--font", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--rate", type=float, default=3e-3)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train(parser.parse_args())
