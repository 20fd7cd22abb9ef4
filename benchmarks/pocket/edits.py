"""Edits as the denoiser trains on them: latents of references and answer, features of the prompt.

Drawing and encoding pictures costs as much as a training step. So a pool of edits is kept for
every size; each batch takes a few new ones and more that were used before, under new noise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.pocket.instructions import COLOURED_TASKS, COLOURS, SHAPES, TASKS, Meaning, say
from benchmarks.pocket.scenes import Scene, Size, answer, draw_meaning, draw_scene
from benchmarks.pocket.text import TEXT_TOKENS, Prompts, spread
from benchmarks.pocket.vae import decode, encode, pixels_from_picture

__all__ = ["Latents", "Pool", "PromptBank"]

_ONE_REFERENCE = ("background", "night", "gray", "negative", "mirrored")
_KEPT = 1200  # edits per size and number of references


class Latents:
    """Pictures to the denoiser's tokens and back, normalised as the checkpoint says."""

    def __init__(self, vae: AutoencoderKLFlux2, statistics: Path) -> None:
        self.vae = vae
        if statistics.is_file():
            values = load_file(statistics)
            self.mean, self.std = values["mean"], values["std"]
        else:
            self.mean, self.std = torch.zeros(128), torch.ones(128)

    def measure(self, pictures: Sequence[Image.Image], statistics: Path) -> None:
        """Mean and deviation of every channel: the checkpoint's BatchNorm statistics."""
        tokens = self.of(pictures).flatten(0, 1)
        self.mean, self.std = tokens.mean(0), tokens.std(0)
        save_file({"mean": self.mean, "std": self.std}, statistics)

    @torch.no_grad()
    def of(self, pictures: Sequence[Image.Image]) -> Tensor:
        """[pictures, tokens, 128]; all of one size."""
        latents = encode(self.vae, torch.stack([pixels_from_picture(x) for x in pictures]))
        count, channels, height, width = latents.shape
        patches = latents.view(count, channels, height // 2, 2, width // 2, 2)
        tokens = patches.permute(0, 2, 4, 1, 3, 5).reshape(count, -1, channels * 4)
        return (tokens - self.mean) / self.std

    @torch.no_grad()
    def pictures(self, tokens: Tensor, size: Size) -> list[Image.Image]:
        width, height = (side // 16 for side in size)
        patches = (tokens * self.std + self.mean).view(len(tokens), height, width, 32, 2, 2)
        latents = patches.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), 32, height * 2, width * 2)
        pixels = (decode(self.vae, latents) * 127.5 + 127.5).round().clamp(0, 255).byte()
        return [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in pixels]


class PromptBank:
    """Features of many ways to say everything that the tasks can ask."""

    TOKENS = 48  # the longest prompt, chat template included
    SAMPLED = 12  # tokens of the padding behind, standing for all

    @torch.no_grad()
    def __init__(self, prompts: Prompts, random: np.random.Generator, forms: int = 16) -> None:
        self.random = random
        self.grid = np.arange(self.TOKENS, TEXT_TOKENS, 8)
        self.rows: dict[Meaning, list[int]] = {}
        texts = []
        for meaning in _meanings():
            count = max(2, forms // 6) if meaning.task == "shape" else forms
            count *= 2 if not meaning.colour else 1
            self.rows[meaning] = list(range(len(texts), len(texts) + count))
            texts.append(meaning.plain)
            while len(texts) <= self.rows[meaning][-1]:
                text = say(meaning, random, 0)
                if len(prompts.tokens(text)) <= self.TOKENS:  # capitals are many tokens
                    texts.append(text)
        positions = [*range(self.TOKENS), *map(int, self.grid)]
        parts = [
            prompts.features(texts[start : start + 32], positions).half()
            for start in range(0, len(texts), 32)
        ]
        self.features = torch.cat(parts)

    def batch(self, meanings: Sequence[Meaning]) -> tuple[Tensor, Tensor, Tensor]:
        """Features [B, tokens, width], positions [tokens] and log_count [tokens]."""
        rows = [int(self.random.choice(self.rows[meaning])) for meaning in meanings]
        chosen = spread(0, len(self.grid), self.SAMPLED, self.random)
        columns = [*range(self.TOKENS), *(self.TOKENS + index for index in chosen)]
        positions = torch.tensor([*range(self.TOKENS), *(int(self.grid[x]) for x in chosen)])
        log_count = torch.zeros(len(columns))
        log_count[self.TOKENS :] = np.log((TEXT_TOKENS - self.TOKENS) / self.SAMPLED)
        return self.features[rows][:, columns].float(), positions, log_count


def _meanings() -> list[Meaning]:
    everything = [
        Meaning("shape", colour, shape, own)
        for colour in COLOURS
        for own in COLOURS
        for shape in SHAPES
        if own != colour
    ]
    for task in TASKS:
        if task in COLOURED_TASKS:
            everything += [Meaning(task, colour) for colour in COLOURS]
        elif task != "shape":
            everything.append(Meaning(task))
    return everything


@dataclass(frozen=True)
class _Encoded:
    meaning: Meaning
    references: tuple[Tensor, ...]  # each [tokens, 128], float16
    answer: Tensor


class Pool:
    """Edits of one size; `restyle` is what becomes of every answer."""

    def __init__(
        self,
        size: Size,
        latents: Latents,
        subjects: Sequence[Image.Image],
        random: np.random.Generator,
        restyle: Callable[[Image.Image], Image.Image] = lambda picture: picture,
    ) -> None:
        self.restyle = restyle
        self.size = size
        self.latents = latents
        self.subjects = subjects
        self.random = random
        self.scenes: list[tuple[Scene, Tensor]] = []
        self.edits: dict[int, list[_Encoded]] = {count: [] for count in range(5)}
        self.shapes: dict[Meaning, Tensor] = {}

    def batch(self, references: int, count: int, fresh: int) -> list[_Encoded]:
        """Edits with a number of references, some of them new."""
        if references == 0:
            return [self._shape() for _ in range(count)]
        edits = self.edits[references]
        while fresh > 0:
            made = self._one_reference() if references == 1 else [self._several(references)]
            fresh -= len(made)
            for edit in made:
                if len(edits) < _KEPT:
                    edits.append(edit)
                else:
                    edits[self.random.integers(_KEPT)] = edit
        return [edits[index] for index in self.random.integers(len(edits), size=count)]

    def _encoded(self, pictures: Sequence[Image.Image]) -> list[Tensor]:
        return list(self.latents.of(pictures).half())

    def _answer(self, meaning: Meaning, scenes: Sequence[Scene]) -> Image.Image:
        return self.restyle(answer(meaning, scenes, self.size))

    def _shape(self) -> _Encoded:
        meaning = draw_meaning("shape", self.random)
        if meaning not in self.shapes:
            self.shapes[meaning] = self._encoded([self._answer(meaning, ())])[0]
        return _Encoded(meaning, (), self.shapes[meaning])

    def _one_reference(self) -> list[_Encoded]:
        scene = draw_scene(self.subjects, self.random)
        meanings = [draw_meaning(task, self.random) for task in _ONE_REFERENCE]
        pictures = [scene.picture(self.size), *(self._answer(x, [scene]) for x in meanings)]
        reference, *answers = self._encoded(pictures)
        if len(self.scenes) < _KEPT:
            self.scenes.append((scene, reference))
        else:
            self.scenes[self.random.integers(_KEPT)] = (scene, reference)
        return [
            _Encoded(meaning, (reference,), target)
            for meaning, target in zip(meanings, answers, strict=True)
        ]

    def _several(self, references: int) -> _Encoded:
        if len(self.scenes) < 200 or self.random.random() < 0.1:
            self._one_reference()
        tasks = [task for task, count in TASKS.items() if count == references]
        meaning = draw_meaning(str(self.random.choice(tasks)), self.random)
        indices = self.random.integers(len(self.scenes), size=references)
        scenes, tokens = zip(*(self.scenes[index] for index in indices), strict=True)
        target = self._encoded([self._answer(meaning, scenes)])[0]
        return _Encoded(meaning, tokens, target)
