"""Trains pocket's autoencoder: 8x8 pixels to 32 numbers.

    python -m benchmarks.pocket.vae OUT [--minutes 40] [--font FILE]

Random crops of drawn pictures (references and answers of every task) are encoded, noise is added
to the latents as the denoiser's errors will do, and the decoder learns the picture back. A penalty
on the latents' size against that noise keeps them small and equally important. OUT/vae.safetensors
is written every few minutes, and training goes on from it.
"""

import argparse
import logging
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2
from PIL import Image
from torch import Tensor

from benchmarks.pocket.instructions import TASKS
from benchmarks.pocket.scenes import Subjects, draw_edit, load_subjects
from benchmarks.pocket.state import load_state, save_state

__all__ = ["decode", "encode", "make_vae", "pixels_from_picture"]

logger = logging.getLogger(__name__)

SIZES = (128, 160, 192, 224, 256)
NOISE = 0.1
WEIGHT_OF_SIZE = 1e-4


def make_vae() -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2(
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=32,
        norm_num_groups=8,
    )


def pixels_from_picture(picture: Image.Image) -> Tensor:
    """[3, height, width], -1 to 1."""
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 127.5 - 1


def encode(vae: AutoencoderKLFlux2, pixels: Tensor) -> Tensor:
    """[B, 3, H, W] to [B, 32, H/8, W/8], the mode of the posterior."""
    return vae.quant_conv(vae.encoder(pixels))[:, :32]


def decode(vae: AutoencoderKLFlux2, latents: Tensor) -> Tensor:
    return vae.decoder(vae.post_quant_conv(latents))


class _Pictures:
    """A store of drawn pictures that is renewed all the time; gives crops."""

    def __init__(self, subjects: Subjects, seed: int, count: int) -> None:
        self.random = np.random.default_rng(seed)
        self.subjects = subjects.training
        self.pictures: list[np.ndarray] = []
        while len(self.pictures) < count:
            self.pictures += self._drawn()

    def _drawn(self) -> list[np.ndarray]:
        task = str(self.random.choice(list(TASKS)))
        width, height = (int(side) for side in self.random.choice(SIZES, 2))
        edit = draw_edit(task, self.subjects, self.random, (width, height))
        return [np.asarray(picture) for picture in (*edit.references[:1], edit.answer)]

    def crops(self, count: int, side: int) -> Tensor:
        for picture in self._drawn():
            self.pictures[self.random.integers(len(self.pictures))] = picture
        crops = []
        for index in self.random.integers(len(self.pictures), size=count):
            picture = self.pictures[index]
            y = self.random.integers(picture.shape[0] - side + 1)
            x = self.random.integers(picture.shape[1] - side + 1)
            crops.append(picture[y : y + side, x : x + side])
        batch = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return batch.contiguous()


def evaluate(vae: AutoencoderKLFlux2, subjects: Subjects, count: int = 60) -> float:
    """Median PSNR of whole pictures of held-out subjects, 192x192."""
    random = np.random.default_rng(1)
    scores = []
    with torch.no_grad():
        for index in range(count):
            task = list(TASKS)[index % len(TASKS)]
            answer = draw_edit(task, subjects.held_out, random).answer
            pixels = pixels_from_picture(answer)[None]
            error = (decode(vae, encode(vae, pixels)).clamp(-1, 1) - pixels) / 2
            scores.append(-10 * float(error.square().mean().log10()))
    return float(np.median(scores))


def _schedule(share: float, peak: float) -> float:
    """A short rise, then a cosine fall to nothing."""
    return peak * min(share / 0.02, 1) * (0.5 + 0.5 * float(np.cos(np.pi * share)))


def train(out: Path, font: Path, minutes: float) -> None:
    torch.manual_seed(0)
    subjects = load_subjects(font)
    vae = make_vae()
    matrices = [x for x in vae.parameters() if x.ndim >= 2]
    vectors = [x for x in vae.parameters() if x.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-3,
        betas=(0.9, 0.98),
        weight_decay=1e-3,
    )
    path = out / "vae.safetensors"
    averaged = {name: value.detach().clone() for name, value in vae.state_dict().items()}
    spent, step = load_state(path, vae, averaged, [optimizer])
    pictures = _Pictures(subjects, seed=step, count=1500)
    started, saved = time.monotonic() - spent, time.monotonic()
    while (spent := time.monotonic() - started) < minutes * 60:
        share = spent / (minutes * 60)
        for group in optimizer.param_groups:
            group["lr"] = _schedule(share, 2.5e-3)
        side, count = (32, 32) if share < 0.5 else (64, 12) if share < 0.85 else (128, 4)
        pixels = pictures.crops(count, side)
        latents = encode(vae, pixels)
        noisy = latents + NOISE * torch.randn_like(latents)
        error = decode(vae, noisy) - pixels
        fine = sum(error.diff(dim=axis).abs().mean() for axis in (2, 3))
        loss = (
            0.3 * error.abs().mean()
            + 2 * error.square().mean()
            + 0.1 * fine
            + WEIGHT_OF_SIZE * latents.square().mean()
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            keep = 0.999 if share < 0.9 else 0.998
            for name, value in vae.state_dict().items():
                if value.is_floating_point():
                    averaged[name].lerp_(value, 1 - keep)
        if step % 500 == 0:
            logger.info(
                "%5.1f min, step %d: error %.2f dB, latents %.2f",
                spent / 60,
                step,
                -10 * float((error.detach() / 2).square().mean().log10()),
                float(latents.square().mean().sqrt()),
            )
        if time.monotonic() - saved > 240:
            saved = time.monotonic()
            save_state(path, vae, averaged, [optimizer], spent, step)
            _report(averaged, subjects, spent)
    save_state(path, vae, averaged, [optimizer], spent, step)
    _report(averaged, subjects, spent)


def _report(averaged: dict[str, Tensor], subjects: Subjects, spent: float) -> None:
    judge = make_vae()
    judge.load_state_dict(averaged)
    logger.info("%5.1f min: held-out pictures %.2f dB", spent / 60, evaluate(judge, subjects))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--font", type=Path, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments.out.mkdir(parents=True, exist_ok=True)
    train(arguments.out, arguments.font, arguments.minutes)
