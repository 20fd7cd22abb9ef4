"""What instructions mean, and many ways to say each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

__all__ = ["COLOURED_TASKS", "COLOURS", "SHAPES", "SLOTS", "TASKS", "Meaning", "say"]

COLOURS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "red": (220, 40, 40),
        "green": (40, 170, 70),
        "blue": (50, 80, 220),
        "yellow": (240, 210, 50),
        "white": (245, 245, 245),
        "black": (20, 20, 20),
        "purple": (140, 60, 180),
        "orange": (240, 140, 40),
        "pink": (245, 150, 190),
        "gray": (128, 128, 128),
    }
)
SHAPES = ("circle", "square", "triangle")
TASKS: Mapping[str, int] = MappingProxyType(  # how many references each takes
    {
        "shape": 0,
        "background": 1,
        "night": 1,
        "gray": 1,
        "negative": 1,
        "mirrored": 1,
        "swap": 2,
        "side": 2,
        "row": 3,
        "square": 4,
    }
)

COLOURED_TASKS = ("background", "side", "row", "square")  # on a background of one colour

# What a sentence says, slot by slot; 0 is "nothing".
SLOTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "task": tuple(TASKS),
        "colour": ("", *COLOURS),  # of the background
        "shape": ("", *SHAPES),
        "shape_colour": ("", *COLOURS),
    }
)


@dataclass(frozen=True)
class Meaning:
    task: str
    colour: str = ""
    shape: str = ""
    shape_colour: str = ""

    @property
    def slots(self) -> tuple[int, ...]:
        return tuple(options.index(getattr(self, name)) for name, options in SLOTS.items())

    @property
    def plain(self) -> str:
        """The sentence that `docs/pocket.md` lists."""
        return _FORMS[self.task][0].format(**self._words)

    @property
    def _words(self) -> dict[str, str]:
        return {"c": self.colour, "s": self.shape, "k": self.shape_colour}


_FORMS: Mapping[str, Sequence[str]] = {
    "shape": (
        "a {k} {s} on a {c} background",
        "draw a {k} {s} on {c}",
        "{k} {s}, {c} background",
        "a {s} in {k} on a {c} background",
        "an image of a {k} {s} in front of a {c} background",
        "a {c} background with a {k} {s}",
        "paint a {k} {s} before a {c} backdrop",
        "{k} {s} on {c}",
    ),
    "background": (
        "put it on a {c} background",
        "make the background {c}",
        "change the background to {c}",
        "replace the background with {c}",
        "{c} background",
        "place it on a {c} background",
        "put the subject on a plain {c} background",
        "set the background to {c} and keep the subject",
        "it should stand before a {c} backdrop",
        "turn the background {c}",
        "on a {c} background",
    ),
    "night": (
        "at night",
        "make it night",
        "the same at night",
        "turn it into a night scene",
        "show it at night",
        "as a night picture",
        "change the time to night",
        "it is night now",
    ),
    "gray": (
        "in black and white",
        "make it black and white",
        "turn it black and white",
        "as a black and white photo",
        "remove the colours",
        "in grayscale",
        "desaturate it",
        "without colour",
    ),
    "negative": (
        "as a negative",
        "make it a negative",
        "invert the colours",
        "as a photographic negative",
        "show the negative",
        "inverted",
        "with inverted colours",
        "turn it into a negative",
    ),
    "mirrored": (
        "mirrored",
        "mirror it",
        "flip it horizontally",
        "as seen in a mirror",
        "flip left and right",
        "make it mirrored",
        "the mirror image",
        "swap left and right",
    ),
    "swap": (
        "the subject of image 1 on the background of image 2",
        "put the subject of image 1 on the background of image 2",
        "image 1 on the background of image 2",
        "place the subject of the first image before the background of the second",
        "use the background of image 2 for the subject of image 1",
        "give image 1 the background of image 2",
    ),
    "side": (
        "image 1 left of image 2 on a {c} background",
        "image 1 to the left of image 2 on a {c} background",
        "put image 1 left of image 2 on {c}",
        "image 1 and image 2 side by side on a {c} background",
        "the first image left of the second on a {c} background",
        "side by side on a {c} background",
    ),
    "row": (
        "image 1, image 2 and image 3 in a row on a {c} background",
        "put image 1, image 2 and image 3 in a row on a {c} background",
        "images 1, 2 and 3 in a row on {c}",
        "all three in a row on a {c} background",
        "in a row on a {c} background",
        "the three images in a row before a {c} backdrop",
    ),
    "square": (
        "image 1, image 2, image 3 and image 4 in a square on a {c} background",
        "put image 1, image 2, image 3 and image 4 in a square on a {c} background",
        "images 1, 2, 3 and 4 in a square on {c}",
        "all four in a square on a {c} background",
        "in a square on a {c} background",
        "the four images in a two by two grid on a {c} background",
    ),
}
_COLOUR_WORDS = MappingProxyType({"gray": ("gray", "grey"), "purple": ("purple", "violet")})


def say(meaning: Meaning, random: np.random.Generator, plain_share: float = 0.3) -> str:
    """One way to ask for it; `plain_share` of all are the plain sentence."""
    if random.random() < plain_share:
        return meaning.plain
    form = str(random.choice(list(_FORMS[meaning.task])))
    words = {
        key: str(random.choice(_COLOUR_WORDS.get(word, (word,))))
        for key, word in meaning._words.items()
    }
    sentence = form.format(**words)
    if sentence.startswith("a orange"):
        sentence = "an" + sentence[1:]
    chance = random.random(4)
    if chance[0] < 0.15:
        sentence = "please " + sentence
    elif chance[0] < 0.25:
        sentence += ", please"
    if chance[1] < 0.4:
        sentence = sentence[0].upper() + sentence[1:]
    if chance[2] < 0.3:
        sentence += str(random.choice([".", "!"]))
    if chance[3] < 0.1:
        sentence = sentence.upper()
    return sentence
