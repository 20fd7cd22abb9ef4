"""Recipes: what to build and for which sizes, in terms that users think in.

A recipe is a TOML file (see `recipes/default.toml`). Sizes are output pixels, numbers of
references and their pixels, prompt tokens and batch; `profiles` turns them into tensor shapes.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, Self

from klein_kv.artifacts.config import DTYPES
from klein_kv.artifacts.numbers import PRECISION_FORMATS
from klein_kv.artifacts.positions import MAX_OUTPUT_AREA
from klein_kv.errors import BuildError

__all__ = ["WEIGHTS_MODES", "Range", "Recipe", "ShapeProfile", "Size", "recipe_names"]

WEIGHTS_MODES = ("shared", "embedded")
"""Weights as engine inputs, one device copy for all engines; or baked into each engine."""

MAX_REFERENCE_AREA = 1024 * 1024
"""Larger references are resized (diffusers: `Flux2ImageProcessor`)."""


class Range(NamedTuple):
    """Smallest, typical and largest value; all equal where nothing varies."""

    min: int
    opt: int
    max: int

    @property
    def fixed(self) -> bool:
        """Whether there is only one value."""
        return self.min == self.opt == self.max


class Size(NamedTuple):
    """Pixels of an image."""

    width: int
    height: int


class SizeRange(NamedTuple):
    """Smallest, typical and largest image; sides vary independently."""

    min: Size
    opt: Size
    max: Size


@dataclass(frozen=True, slots=True)
class ShapeProfile:
    """One range of requests that the engines serve.

    The largest `reference_size` is an area: references of other proportions (up to 8:1) have as
    many pixels.
    """

    name: str
    batch: Range
    text_tokens: Range
    output: SizeRange
    references: Range
    reference_size: SizeRange

    def __post_init__(self) -> None:
        for field in ("batch", "text_tokens"):
            _check_range(self.name, field, getattr(self, field), 1)
        _check_range(self.name, "references", self.references, 0)
        for field in ("output", "reference_size"):
            sizes: SizeRange = getattr(self, field)
            for side in Size._fields:
                values = Range(*(getattr(size, side) for size in sizes))
                _check_range(self.name, f"{field} {side}", values, 1)
        for field, most, square, why in (
            ("output", MAX_OUTPUT_AREA, 2048, ""),
            ("reference_size", MAX_REFERENCE_AREA, 1024, ": larger references are made smaller"),
        ):
            width, height = getattr(self, field).max
            if width * height > most:
                raise BuildError(
                    f"profile {self.name}: {field} is up to {width}x{height}, expected at most "
                    f"the area of {square}x{square}{why}"
                )

    @property
    def fixed(self) -> bool:
        """Whether this profile is one single shape."""
        ranges = (self.batch, self.text_tokens, self.references)
        sizes = (self.output, self.reference_size)
        return all(r.fixed for r in ranges) and all(s.min == s.opt == s.max for s in sizes)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Reads one `[[profiles]]` table, or says with a `BuildError` what is wrong with it."""
        name = value.get("name")
        if not isinstance(name, str) or not name:
            raise BuildError(f"recipe: a profile's name is {name!r}, expected a text")
        where = f"profile {name}"
        _check_keys(where, value, cls.__slots__, ("output", "references"))
        value = {"batch": 1, "text_tokens": 512, "reference_size": "1024x1024", **value}
        return cls(
            name=name,
            batch=_range(where, "batch", value["batch"]),
            text_tokens=_range(where, "text_tokens", value["text_tokens"]),
            output=_sizes(where, "output", value["output"]),
            references=_range(where, "references", value["references"]),
            reference_size=_sizes(where, "reference_size", value["reference_size"]),
        )


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything a build needs to know besides the artifact folder."""

    name: str  # part of the engines' folder unless it is "default"
    target: str  # a name that `targets.find_target` knows
    # "bf16", "fp16", or a quantized one that the artifacts hold; None builds what they were
    # exported in
    precision: str | None
    weights: str  # one of `WEIGHTS_MODES`
    profiles: tuple[ShapeProfile, ...]  # at least one
    # "fp8" computes the transformer's attention in float8, which a quantized precision and one
    # single shape allow; None leaves it in the type of activations
    attention: str | None = None

    def __post_init__(self) -> None:
        names = [profile.name for profile in self.profiles]
        precisions = (*DTYPES, *PRECISION_FORMATS)
        wrong = None
        if self.precision not in (None, *precisions):
            wrong = f"precision is {self.precision!r}, expected one of {', '.join(precisions)}"
        elif self.attention not in (None, "fp8"):
            wrong = (
                f"attention is {self.attention!r}, expected 'fp8' or 'bf16' (the type of "
                "activations)"
            )
        elif self.attention is not None and not self.fixed:
            wrong = (
                "attention in fp8 has a kernel for a fixed number of keys only; expected one "
                "profile of one single shape, such as static-1024-4ref"
            )
        elif self.weights not in WEIGHTS_MODES:
            wrong = f"weights is {self.weights!r}, expected one of {', '.join(WEIGHTS_MODES)}"
        elif not names or len(set(names)) != len(names):
            wrong = f"profiles are {names}, expected at least one and no name twice"
        if wrong is not None:
            raise BuildError(f"recipe {self.name}: {wrong}")

    @property
    def fixed(self) -> bool:
        """Whether the engines serve one single shape: only then a kernel plan can be priced."""
        return len(self.profiles) == 1 and self.profiles[0].fixed

    @classmethod
    def load(cls, source: str | Path) -> Self:
        """Reads a recipe that comes with the package, by name, or a TOML file, by path."""
        name = str(source)
        if isinstance(source, Path) or name.endswith(".toml"):
            path = Path(source)
            try:
                return cls.from_toml(path.read_text(encoding="utf-8-sig"), path.stem)
            except (OSError, UnicodeDecodeError) as error:
                raise BuildError(f"recipe {path} cannot be read: {error}") from error
        if name not in recipe_names():
            raise BuildError(
                f"unknown recipe {name!r}; expected one of {', '.join(recipe_names())}, or the "
                "path of a .toml file"
            )
        return cls.from_toml(_folder().joinpath(f"{name}.toml").read_text("utf-8"), name)

    @classmethod
    def from_toml(cls, text: str, name: str) -> Self:
        """Reads a recipe's text, or says with a `BuildError` what is wrong with it."""
        where = f"recipe {name}"
        try:
            value = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise BuildError(f"{where} is not TOML: {error}") from error
        known = ("target", "precision", "attention", "weights", "profiles")
        _check_keys(where, value, known, ("profiles",))
        profiles = value["profiles"]
        if not isinstance(profiles, list) or not all(isinstance(p, dict) for p in profiles):
            raise BuildError(f"{where}: profiles must be [[profiles]] tables")
        attention = value.get("attention")  # "bf16" says what is meant by leaving it out
        return cls(
            name=name,
            target=value.get("target", "rtx5090"),
            precision=value.get("precision"),
            weights=value.get("weights", "shared"),
            profiles=tuple(ShapeProfile.from_dict(profile) for profile in profiles),
            attention=None if attention == "bf16" else attention,
        )


def recipe_names() -> list[str]:
    """Recipes that come with the package."""
    entries = (entry.name for entry in _folder().iterdir())
    return sorted(name.removesuffix(".toml") for name in entries if name.endswith(".toml"))


def _folder() -> Any:
    return files("klein_kv.engines.sizes") / "recipes"


def _check_keys(
    where: str, value: Mapping[str, Any], known: Sequence[str], required: Sequence[str]
) -> None:
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise BuildError(
            f"{where}: unknown key {', '.join(unknown)}; expected only {', '.join(known)}"
        )
    for key in required:
        if key not in value:
            raise BuildError(f"{where}: {key} is missing")


def _triple(where: str, key: str, value: Any) -> list[Any]:
    items = value if isinstance(value, list) else [value] * 3
    if len(items) != 3:
        raise BuildError(
            f"{where}: {key} is {value!r}, expected one value or a list [min, opt, max]"
        )
    return items


def _range(where: str, key: str, value: Any) -> Range:
    items = _triple(where, key, value)
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        raise BuildError(f"{where}: {key} is {value!r}, expected whole numbers")
    return Range(*items)


def _sizes(where: str, key: str, value: Any) -> SizeRange:
    sizes = []
    for item in _triple(where, key, value):
        sides = item.split("x") if isinstance(item, str) else []
        if len(sides) != 2 or not all(side.isascii() and side.isdigit() for side in sides):
            raise BuildError(f"{where}: {key} is {item!r}, expected 'WIDTHxHEIGHT' in pixels")
        sizes.append(Size(int(sides[0]), int(sides[1])))
    return SizeRange(*sizes)


def _check_range(profile: str, field: str, values: Range, least: int) -> None:
    if not least <= values.min <= values.opt <= values.max:
        raise BuildError(
            f"profile {profile}: {field} is {list(values)}, expected {least} <= min <= opt <= max"
        )
