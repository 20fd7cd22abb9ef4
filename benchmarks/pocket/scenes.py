"""Edits with known right answers: references, an instruction, and the picture that it asks for.

A subject is one emoji of Noto Color Emoji, pasted at a random size and place on a plain, graded,
checked or striped background. Everything is drawn, so every edit's right answer is known to the
pixel. `docs/pocket.md` states the geometry. Subjects whose code point modulo 8 is 3 are held out:
no training ever sees them.

    subjects = load_subjects(Path("NotoColorEmoji.ttf"))
    edit = draw_edit("night", subjects.held_out, np.random.default_rng(0), (192, 192))
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps

from benchmarks.pocket.instructions import COLOURED_TASKS, COLOURS, SHAPES, TASKS, Meaning
from klein_kv.export.checks import compare

__all__ = [
    "Edit",
    "Scene",
    "Subjects",
    "answer",
    "cyanotype",
    "draw_edit",
    "draw_meaning",
    "draw_scene",
    "load_subjects",
    "psnr",
    "sample_subjects",
    "write_samples",
]

Size = tuple[int, int]  # width, height

NIGHT = (0.25, 0.30, 0.55)  # of red, green, blue
CYANOTYPE = ((12, 30, 92), (236, 240, 228))
SHAPE_SHARE = 0.6  # of the shorter side

_FONT_SIZE = 109  # the one size of the font's bitmaps
_DEBIAN = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")


@dataclass(frozen=True)
class Subjects:
    """RGBA pictures by code point, cut to their outline."""

    training: tuple[Image.Image, ...]
    held_out: tuple[Image.Image, ...]


def load_subjects(font: Path = _DEBIAN) -> Subjects:
    """Every single-character emoji of a font (Debian package fonts-noto-color-emoji).

    Raises:
        FileNotFoundError: there is no such font.
    """
    from fontTools.ttLib import TTFont

    if not font.is_file():
        raise FileNotFoundError(
            f"{font} is not there; expected Noto Color Emoji "
            "(Debian: apt install fonts-noto-color-emoji), or another path to it"
        )
    drawn = ImageFont.truetype(str(font), _FONT_SIZE)
    training, held_out = [], []
    for code in sorted(TTFont(font, lazy=True).getBestCmap()):
        # Below lie digits; then letters of flags, and colours of skin.
        if code < 0x203C or 0x1F1E6 <= code <= 0x1F1FF or 0x1F3FB <= code <= 0x1F3FF:
            continue
        picture = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(picture).text((10, 10), chr(code), font=drawn, embedded_color=True)
        box = picture.getbbox()
        if box is None or np.asarray(picture)[..., 3].mean() < 0.05 * 255:
            continue
        (held_out if code % 8 == 3 else training).append(picture.crop(box))
    return Subjects(tuple(training), tuple(held_out))


_SAMPLE = Path(__file__).with_name("subjects.png")  # a grid of held-out subjects
_CELL = 136


def sample_subjects() -> tuple[Image.Image, ...]:
    """Forty held-out subjects that lie beside this file: no font is needed for them."""
    grid = Image.open(_SAMPLE).convert("RGBA")
    cells = [
        grid.crop((x, y, x + _CELL, y + _CELL))
        for y in range(0, grid.height, _CELL)
        for x in range(0, grid.width, _CELL)
    ]
    return tuple(cell.crop(cell.getbbox()) for cell in cells)


@dataclass(frozen=True)
class Scene:
    """A subject before a background: what a reference shows.

    Attributes:
        subject: RGBA, cut to its outline.
        centre: of the subject, as shares of width and height.
        share: the subject's longer side, of the frame's shorter one.
        background: draws the background at a size.
    """

    subject: Image.Image
    centre: tuple[float, float]
    share: float
    background: Callable[[Size], Image.Image]

    def picture(self, size: Size) -> Image.Image:
        return self.on(self.background(size))

    def on(self, background: Image.Image) -> Image.Image:
        """The subject before another background, where and as it is."""
        return self.pasted(background, (0.0, 0.0, *map(float, background.size)))

    def pasted(self, canvas: Image.Image, frame: tuple[float, float, float, float]) -> Image.Image:
        """The subject on a canvas, this scene's frame being (left, top, width, height) there."""
        left, top, width, height = frame
        scale = self.share * min(width, height) / max(self.subject.size)
        wide, high = (max(1, round(side * scale)) for side in self.subject.size)
        subject = self.subject.resize((wide, high), Image.Resampling.LANCZOS)
        x = round(left + self.centre[0] * width - wide / 2)
        y = round(top + self.centre[1] * height - high / 2)
        layer = Image.new("RGBA", canvas.size)
        layer.paste(subject, (x, y))
        return Image.alpha_composite(canvas.convert("RGBA"), layer).convert("RGB")


def draw_scene(subjects: Sequence[Image.Image], random: np.random.Generator) -> Scene:
    share = random.uniform(0.5, 0.85)
    room = (1 - share) / 2
    x, y = 0.5 + random.uniform(-room, room, 2)
    return Scene(
        subjects[random.integers(len(subjects))], (float(x), float(y)), share, _background(random)
    )


def _colour(random: np.random.Generator) -> tuple[int, int, int]:
    if random.random() < 0.4:
        return list(COLOURS.values())[random.integers(len(COLOURS))]
    red, green, blue = random.integers(0, 256, 3)
    return int(red), int(green), int(blue)


def _background(random: np.random.Generator) -> Callable[[Size], Image.Image]:
    first, second = (np.array(_colour(random), np.float32) for _ in range(2))
    kind = random.choice(["plain", "graded", "checked", "striped"], p=[0.4, 0.3, 0.15, 0.15])
    angle = random.uniform(0, np.pi)
    cell = random.uniform(0.12, 0.3)  # of the shorter side

    def draw(size: Size) -> Image.Image:
        width, height = size
        y, x = np.mgrid[:height, :width].astype(np.float32)
        if kind == "plain":
            share = np.zeros((height, width), np.float32)
        elif kind == "graded":
            along = (x / width - 0.5) * np.cos(angle) + (y / height - 0.5) * np.sin(angle)
            share = np.clip(along / (abs(np.cos(angle)) + abs(np.sin(angle))) + 0.5, 0, 1)
        else:
            pixels = cell * min(size)
            if kind == "checked":
                share = (x // pixels + y // pixels) % 2
            else:
                share = ((x * np.cos(angle) + y * np.sin(angle)) // pixels) % 2
        colours = first + share[..., None] * (second - first)
        return Image.fromarray(np.rint(colours).astype(np.uint8))

    return draw


@dataclass(frozen=True)
class Edit:
    """What is asked, and the answer. All pictures are RGB."""

    meaning: Meaning
    instruction: str
    references: tuple[Image.Image, ...]
    answer: Image.Image


def _plain(colour: str, size: Size) -> Image.Image:
    return Image.new("RGB", size, COLOURS[colour])


def cell_frame(
    cell: tuple[float, float, float, float], size: Size
) -> tuple[float, float, float, float]:
    """Where a frame of `size` lies in a cell (left, top, width, height): whole, in its middle."""
    left, top, width, height = cell
    scale = min(width / size[0], height / size[1])
    wide, high = size[0] * scale, size[1] * scale
    return left + (width - wide) / 2, top + (height - high) / 2, wide, high


def cells(task: str, size: Size) -> tuple[tuple[float, float, float, float], ...]:
    """Cells of a composition (left, top, width, height), by the order of images."""
    width, height = size
    if task == "square":
        half = (width / 2, height / 2)
        return tuple((x * half[0], y * half[1], *half) for y in (0, 1) for x in (0, 1))
    columns = {"side": 2, "row": 3}[task]
    return tuple((x * width / columns, 0.0, width / columns, height) for x in range(columns))


def _composed(task: str, scenes: Sequence[Scene], colour: str, size: Size) -> Image.Image:
    canvas = _plain(colour, size)
    for scene, cell in zip(scenes, cells(task, size), strict=True):
        canvas = scene.pasted(canvas, cell_frame(cell, size))
    return canvas


def draw_shape(shape: str, colour: str, background: str, size: Size) -> Image.Image:
    """A shape in the middle, `SHAPE_SHARE` of the shorter side wide and high."""
    fine = 4
    width, height = (side * fine for side in size)
    picture = _plain(background, (width, height))
    half = SHAPE_SHARE * min(width, height) / 2
    left, top, right, bottom = (
        width / 2 - half,
        height / 2 - half,
        width / 2 + half,
        height / 2 + half,
    )
    drawing = ImageDraw.Draw(picture)
    if shape == "circle":
        drawing.ellipse((left, top, right, bottom), COLOURS[colour])
    elif shape == "square":
        drawing.rectangle((left, top, right, bottom), COLOURS[colour])
    else:
        drawing.polygon([(left, bottom), (right, bottom), (width / 2, top)], COLOURS[colour])
    return picture.resize(size, Image.Resampling.BOX)


def cyanotype(picture: Image.Image) -> Image.Image:
    """The style of pocket's adapter: brightness (ITU-R 601) from deep blue to the tone of paper."""
    bright = np.asarray(picture.convert("L"), np.float32)[..., None] / 255
    dark, paper = (np.array(colour, np.float32) for colour in CYANOTYPE)
    return Image.fromarray(np.rint(dark + bright * (paper - dark)).astype(np.uint8))


def at_night(picture: Image.Image) -> Image.Image:
    return Image.fromarray(np.rint(np.asarray(picture) * np.array(NIGHT)).astype(np.uint8))


def draw_meaning(task: str, random: np.random.Generator) -> Meaning:
    """What is asked in a task, its colours and shape drawn at random."""
    colour, other = (str(name) for name in random.choice(list(COLOURS), 2, replace=False))
    if task == "shape":
        return Meaning(task, colour, str(random.choice(SHAPES)), other)
    return Meaning(task, colour if task in COLOURED_TASKS else "")


def answer(meaning: Meaning, scenes: Sequence[Scene], size: Size) -> Image.Image:
    """The right answer at a size, for as many scenes as the task takes references."""
    task = meaning.task
    if task == "shape":
        return draw_shape(meaning.shape, meaning.shape_colour, meaning.colour, size)
    if task == "background":
        return scenes[0].on(_plain(meaning.colour, size))
    if task == "swap":
        return scenes[0].on(scenes[1].background(size))
    if task in ("side", "row", "square"):
        return _composed(task, scenes, meaning.colour, size)
    picture = scenes[0].picture(size)
    if task == "night":
        return at_night(picture)
    if task == "gray":
        return picture.convert("L").convert("RGB")
    if task == "negative":
        return ImageChops.invert(picture)
    return ImageOps.mirror(picture)


def draw_edit(
    task: str,
    subjects: Sequence[Image.Image],
    random: np.random.Generator,
    size: Size = (192, 192),
) -> Edit:
    """One edit of a task with subjects, places, backgrounds and colours drawn at random.

    Raises:
        KeyError: the task is none of `TASKS`.
    """
    scenes = [draw_scene(subjects, random) for _ in range(TASKS[task])]
    meaning = draw_meaning(task, random)
    references = tuple(scene.picture(size) for scene in scenes)
    return Edit(meaning, meaning.plain, references, answer(meaning, scenes, size))


def psnr(picture: Image.Image, answer: Image.Image) -> float:
    """In dB over all pixels and channels of 8 bits; infinite for equal pictures."""
    return compare.psnr(np.asarray(picture), np.asarray(answer))


def write_samples(folder: Path, count: int = 8) -> None:
    """References and prompts to calibrate with: FOLDER/references/*.png and FOLDER/prompts.txt."""
    random = np.random.default_rng(21)
    subjects, tasks = sample_subjects(), [task for task, images in TASKS.items() if images]
    (folder / "references").mkdir(parents=True, exist_ok=True)
    prompts = []
    for number in range(count):
        edit = draw_edit(tasks[number % len(tasks)], subjects, random)
        edit.references[0].save(folder / "references" / f"{number}.png")
        prompts.append(edit.instruction)
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_samples(Path(sys.argv[1]))
