"""Trains pocket's denoiser on edits, in several processes of one thread each.

    torchrun --nproc-per-node 2 -m benchmarks.pocket.train OUT --font FILE --minutes 90

OUT holds the trained autoencoder and text encoder (`vae`, `text`). OUT/denoiser.safetensors is
written every few minutes and training goes on from it; with `--fall` the learning rate goes to
nothing over the last minutes of a run.

The pictures are fully determined, so flow matching is regression here: x = (1 - t) answer +
t noise, the network predicts noise - answer. Times are those that the sampler visits (mostly four
steps). With `--own SHARE` a share of x is made of the network's own first guess instead of the
answer, as when sampling: it learns to mend what it did, not to copy what it is shown.
"""

import argparse
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from benchmarks.pocket.denoiser import Positions, forward, make_transformer
from benchmarks.pocket.edits import Latents, Pool, PromptBank
from benchmarks.pocket.muon import Muon
from benchmarks.pocket.parts import load_parts
from benchmarks.pocket.scenes import Size, draw_scene, load_subjects
from benchmarks.pocket.state import load_state, save_state
from klein_kv.export.checkpoints.random_model import make_scheduler
from klein_kv.schedule import make_schedule

logger = logging.getLogger(__name__)

REFERENCES = {0: 0.10, 1: 0.29, 2: 0.26, 3: 0.15, 4: 0.20}  # share of batches
STEPS = {4: 0.6, 8: 0.15, 3: 0.08, 2: 0.08, 1: 0.09}
TOKENS = 4200  # of one process's batch


class Times:
    """Timesteps as the sampler visits them at a size, slightly spread."""

    def __init__(self, tokens: int) -> None:
        config = dict(make_scheduler().config)
        self.sigmas = {steps: make_schedule(config, steps, tokens).sigmas[:-1] for steps in STEPS}

    def draw(self, count: int, random: np.random.Generator) -> Tensor:
        steps = random.choice(list(STEPS), count, p=list(STEPS.values()))
        times = np.array([random.choice(self.sigmas[number]) for number in steps])
        return torch.from_numpy(np.clip(times + random.uniform(-0.012, 0.012, count), 0, 1)).float()


class Batch(NamedTuple):
    """Edits of one size and number of references, as `forward` reads them."""

    answers: Tensor  # [B, tokens, 128]
    references: Tensor  # [B, tokens of all, 128]
    text: Tensor
    positions: Positions
    at: Tensor  # times [B]


class Batches:
    """Draws batches of edits; sizes that are named more often come more often."""

    def __init__(
        self,
        bank: PromptBank,
        pools: Mapping[Size, Pool],
        sizes: Sequence[Size],
        random: np.random.Generator,
    ) -> None:
        self.bank, self.pools, self.sizes, self.random = bank, pools, sizes, random
        self.times = {size: Times(size[0] * size[1] // 256) for size in pools}

    def draw(self) -> tuple[int, Batch]:
        """The number of references, and the batch."""
        random, bank = self.random, self.bank
        size = self.sizes[random.integers(len(self.sizes))]
        count_refs = int(random.choice(list(REFERENCES), p=list(REFERENCES.values())))
        tokens = size[0] * size[1] // 256
        count = max(2, TOKENS // (tokens * (1 + count_refs) + PromptBank.TOKENS + bank.SAMPLED))
        edits = self.pools[size].batch(count_refs, count, fresh=max(1, count // 4))
        answers = torch.stack([edit.answer for edit in edits]).float()
        references = answers[:, :0]
        if count_refs:
            references = torch.stack([torch.cat(edit.references) for edit in edits]).float()
        text, lines, log_count = bank.batch([edit.meaning for edit in edits])
        positions = Positions.of(lines, log_count, (size[1] // 16, size[0] // 16), count_refs)
        at = self.times[size].draw(count, random)
        return count_refs, Batch(answers, references, text, positions, at)


def _optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest."""
    inner = {
        name: value
        for name, value in model.named_parameters()
        if value.ndim == 2 and "transformer_blocks" in name
    }
    rest = [value for name, value in model.named_parameters() if name not in inner]
    return [
        Muon(inner.values()),
        torch.optim.AdamW(rest, lr=1.0, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def _share_gradients(model: nn.Module) -> None:
    gradients = [value.grad for value in model.parameters() if value.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    nn.utils.vector_to_parameters(flat, gradients)


def train(arguments: argparse.Namespace) -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parts = load_parts(arguments.out)
    subjects = load_subjects(arguments.font)
    statistics = arguments.out / "statistics.safetensors"
    latents = Latents(parts.vae, statistics)
    if not statistics.is_file() and rank == 0:
        random = np.random.default_rng(0)
        latents.measure(
            [draw_scene(subjects.training, random).picture((192, 192)) for _ in range(300)],
            statistics,
        )
    distributed.barrier()
    latents = Latents(parts.vae, statistics)

    model = make_transformer(parts.text_width)
    optimizers = _optimizers(model)
    averaged = {name: value.detach().clone() for name, value in model.state_dict().items()}
    path = arguments.out / "denoiser.safetensors"
    spent, step = load_state(path, model, averaged, optimizers)
    first_step, before = step, spent
    random = np.random.default_rng([step, rank])
    torch.manual_seed(int(random.integers(2**31)))
    bank = PromptBank(parts.prompts, random)
    sizes = [tuple(map(int, text.split("x"))) for text in arguments.sizes]
    pools = {size: Pool(size, latents, subjects.training, random) for size in set(sizes)}
    batches = Batches(bank, pools, sizes, random)
    compiled = torch.compile(forward, dynamic=True) if arguments.compile else forward
    logger.info("rank %d: ready at step %d, %.1f min", rank, step, spent / 60)

    losses: dict[str, list[float]] = {}
    started = saved = time.monotonic()
    while True:
        passed = torch.tensor(time.monotonic() - started)
        distributed.broadcast(passed, 0)
        share = float(passed) / (arguments.minutes * 60)
        if share >= 1:
            break
        count_refs, (answers, references, text, positions, at) = batches.draw()
        run = compiled if count_refs else forward
        noise = torch.randn_like(answers)
        shown = answers
        if random.random() < arguments.own:
            with torch.no_grad():
                guess = noise - run(model, noise, torch.ones(len(at)), references, text, positions)
            shown = torch.where(at[:, None, None] < 0.99, guess, answers)
        wide = at[:, None, None]
        noisy = (1 - wide) * shown + wide * noise
        # Whatever was shown, the step from here to 0 has to end at the answer.
        velocity = (noisy - answers) / wide
        predicted = run(model, noisy, at, references, text, positions)
        loss = functional.mse_loss(predicted, velocity)
        model.zero_grad()
        loss.backward()
        _share_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = arguments.rate * min((step + 1) / 200, 1, (step - first_step + 1) / 50)
        if arguments.fall and share > 1 - arguments.fall:
            rate *= (1 - share) / arguments.fall
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        step += 1
        keep = min(0.9995, (1 + step) / (20 + step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(averaged.values()), list(model.state_dict().values()), 1 - keep
            )
        losses.setdefault(f"{count_refs}", []).append(float(loss.detach()))
        if rank == 0 and step % 100 == 0:
            text_losses = ", ".join(
                f"{name}: {np.mean(values):.4f}" for name, values in sorted(losses.items())
            )
            logger.info(
                "%6.1f min, step %d, rate %.5f, loss by references %s",
                (before + float(passed)) / 60,
                step,
                rate,
                text_losses,
            )
            losses.clear()
        if rank == 0 and time.monotonic() - saved > 180:
            saved = time.monotonic()
            save_state(path, model, averaged, optimizers, before + float(passed), step)
    if rank == 0:
        save_state(path, model, averaged, optimizers, before + float(passed), step)
    distributed.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--font", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--fall", type=float, default=0.0, help="share of the run")
    parser.add_argument("--own", type=float, default=0.0, help="share of batches")
    parser.add_argument("--sizes", nargs="+", default=["128x128"], help="repeat for more of one")
    parser.add_argument("--compile", action="store_true")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train(parser.parse_args())
