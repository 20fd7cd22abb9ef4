"""Scores training by held-out edits: PSNR against the right answers, by task.

python -m benchmarks.pocket.evaluate OUT --font FILE [--count 12] [--size 192x192] [--steps 4]
"""

import argparse
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import Flux2Transformer2DModel
from PIL import Image

from benchmarks.pocket.denoiser import Positions, forward, make_transformer
from benchmarks.pocket.edits import Latents
from benchmarks.pocket.instructions import TASKS
from benchmarks.pocket.parts import Parts, load_parts
from benchmarks.pocket.scenes import Edit, Size, draw_edit, load_subjects, psnr
from benchmarks.pocket.state import load_averaged
from benchmarks.pocket.text import TEXT_TOKENS
from klein_kv.export.checkpoints.random_model import make_scheduler
from klein_kv.schedule import make_schedule


@torch.no_grad()
def sample(
    model: Flux2Transformer2DModel,
    parts: Parts,
    latents: Latents,
    edits: list[Edit],
    size: Size,
    steps: int,
) -> list[Image.Image]:
    """Runs edits of one task as the pipeline does, all tokens of the padding included."""
    width, height = (side // 16 for side in size)
    references = [latents.of(edit.references) for edit in edits if edit.references]
    tokens = torch.stack([x.flatten(0, 1) for x in references]) if references else None
    positions = Positions.of(
        torch.arange(TEXT_TOKENS),
        torch.zeros(TEXT_TOKENS),
        (height, width),
        len(edits[0].references),
    )
    text = parts.prompts.features([edit.instruction for edit in edits], list(range(TEXT_TOKENS)))
    state = torch.randn(len(edits), height * width, 128)
    if tokens is None:
        tokens = state[:, :0]
    sigmas = make_schedule(dict(make_scheduler().config), steps, height * width).sigmas
    for now, then in pairwise(sigmas):
        velocity = forward(
            model, state, torch.full((len(edits),), float(now)), tokens, text, positions
        )
        state = state + float(then - now) * velocity
    return latents.pictures(state, size)


def sheet(rows: Mapping[str, list[tuple[Edit, Image.Image]]], size: Size) -> Image.Image:
    """References, result and answer of the first edit of every task, one row each."""
    width, height = size
    picture = Image.new("RGB", (6 * width, len(rows) * height), "white")
    for row, pairs in enumerate(rows.values()):
        edit, result = pairs[0]
        for column, reference in enumerate(edit.references):
            picture.paste(reference, (column * width, row * height))
        picture.paste(result, (4 * width, row * height))
        picture.paste(edit.answer, (5 * width, row * height))
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--font", type=Path, required=True)
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--size", default="192x192")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--sheet", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    width, height = map(int, arguments.size.split("x"))
    parts = load_parts(arguments.out)
    latents = Latents(parts.vae, arguments.out / "statistics.safetensors")
    model = make_transformer(parts.text_width)
    model.load_state_dict(load_averaged(arguments.out / "denoiser.safetensors"))
    subjects = load_subjects(arguments.font).held_out
    random = np.random.default_rng(arguments.seed)
    rows, everything = {}, []
    for task in TASKS:
        edits = [draw_edit(task, subjects, random, (width, height)) for _ in range(arguments.count)]
        results: list[Image.Image] = []
        for start in range(0, len(edits), 6):
            part = edits[start : start + 6]
            results += sample(model, parts, latents, part, (width, height), arguments.steps)
        rows[task] = list(zip(edits, results, strict=True))
        scores = [psnr(result, edit.answer) for edit, result in rows[task]]
        bound = [
            psnr(latents.pictures(latents.of([edit.answer]), (width, height))[0], edit.answer)
            for edit in edits[:8]
        ]
        everything += scores
        print(
            f"{task:11s} median {np.median(scores):5.2f}  p10 {np.quantile(scores, 0.1):5.2f}"
            f"  autoencoder {np.median(bound):5.2f}",
            flush=True,
        )
    print(f"above 18 dB: {np.mean(np.array(everything) > 18):.2f}")
    if arguments.sheet:
        sheet(rows, (width, height)).save(arguments.sheet)


if __name__ == "__main__":
    main()
