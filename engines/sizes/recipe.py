"""Recipes: what to build and for which sizes, in terms that users think in.

A recipe is a TOML file (see `recipes/default.toml`). Sizes are output pixels, numbers of
references and their pixels, prompt tokens and batch; `profiles` turns them into tensor shapes.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, Self

from klein_kv.artifacts.config import DTYPES
from klein_kv.artifacts.numbers import PRECISION_FORMATS
from klein_kv.errors import BuildError

__all__ = ["WEIGHTS_MODES", "Range", "Recipe", "ShapeProfile", "Size", "recipe_names"]

WEIGHTS_MODES = ("shared", "embedded")
"""Weights as engine inputs, one device copy for all engines; or baked into each engine."""

MAX_SIDE = 2048
"""Largest output side in pixels that klein is made for."""

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

    Attributes:
        name: for people and error messages.
        batch: images made at once.
        text_tokens: prompt tokens.
        output: size of the images made.
        references: number of reference images; 0 is text-to-image.
        reference_size: size of one reference image. The largest is an area: references of other
            proportions (up to 8:1) have as many pixels.
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
        if max(self.output.max) > MAX_SIDE:
            raise BuildError(
                f"profile {self.name}: output is up to {max(self.output.max)} pixels wide or "
                f"high, expected at most {MAX_SIDE}"
            )
        largest = self.reference_size.max
        if largest.width * largest.height > MAX_REFERENCE_AREA:
            raise BuildError(
                f"profile {self.name}: reference_size is up to {largest.width}x{largest.height}, "
                "expected at most the area of 1024x1024: larger references are made smaller"
            )

    @property
    def fixed(self) -> bool:
        """Whether this profile is one single shape."""
        ranges = (self.batch, self.text_tokens, self.references)
        sizes = (self.output, self.reference_size)
        return all(r.fixed for r in ranges) and all(s.min == s.opt == s.max for s in sizes)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Reads one `[[profiles]]` table.

        Raises:
            BuildError: unknown or missing keys, wrong types, ranges out of order.
        """
        name = value.get("name")
        if not isinstance(name, str) or not name:
            raise BuildError(f"recipe: a profile's name is {name!r}, expected a text")
        where = f"profile {name}"
        keys = ("name", "batch", "text_tokens", "output", "references", "reference_size")
        _check_keys(where, value, keys)
        return cls(
            name=name,
            batch=_range(where, "batch", value.get("batch", 1)),
            text_tokens=_range(where, "text_tokens", value.get("text_tokens", 512)),
            output=_sizes(where, "output", _required(where, value, "output")),
            references=_range(where, "references", _required(where, value, "references")),
            reference_size=_sizes(
                where, "reference_size", value.get("reference_size", "1024x1024")
            ),
        )


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything a build needs to know besides the artifact folder.

    Attributes:
        name: the recipe's name; part of the engines' folder unless it is "default".
        target: a name that `targets.find_target` knows.
        precision: "bf16" or "fp16", or a quantized one ("fp8", "nvfp4", "fp8-weight-only") that
            the artifacts hold; None builds what they were exported in.
        attention: "fp8" computes the transformer's attention in float8, which a quantized
            precision and one single shape allow; None leaves it in the type of activations.
        weights: one of `WEIGHTS_MODES`.
        profiles: at least one.
    """

    name: str
    target: str
    precision: str | None
    weights: str
    profiles: tuple[ShapeProfile, ...]
    attention: str | None = None

    def __post_init__(self) -> None:
        precisions = (*DTYPES, *PRECISION_FORMATS)
        if self.precision is not None and self.precision not in precisions:
            raise BuildError(
                f"recipe {self.name}: precision is {self.precision!r}, expected one of "
                f"{', '.join(precisions)}"
            )
        if self.attention not in (None, "fp8"):
            raise BuildError(
                f"recipe {self.name}: attention is {self.attention!r}, expected 'fp8' or "
                "'bf16' (the type of activations)"
            )
        if self.attention is not None and not self.fixed:
            raise BuildError(
                f"recipe {self.name}: attention in fp8 has a kernel for a fixed number of keys "
                "only; expected one profile of one single shape, such as static-1024-4ref"
            )
        if self.weights not in WEIGHTS_MODES:
            raise BuildError(
                f"recipe {self.name}: weights is {self.weights!r}, expected one of "
                f"{', '.join(WEIGHTS_MODES)}"
            )
        names = [profile.name for profile in self.profiles]
        if not names or len(set(names)) != len(names):
            raise BuildError(
                f"recipe {self.name}: profiles are {names}, expected at least one and no name twice"
            )

    @property
    def fixed(self) -> bool:
        """Whether the engines serve one single shape: only then a kernel plan can be priced."""
        return len(self.profiles) == 1 and self.profiles[0].fixed

    @classmethod
    def load(cls, source: str | Path) -> Self:
        """Reads a recipe that comes with the package, by name, or a TOML file, by path.

        Raises:
            BuildError: no such recipe, or its content is not valid.
        """
        name = str(source)
        if isinstance(source, Path) or name.endswith(".toml"):
            path = Path(source)
            return cls.from_toml(_read(path), path.stem)
        if name not in recipe_names():
            raise BuildError(
                f"unknown recipe {name!r}; expected one of {', '.join(recipe_names())}, or the "
                "path of a .toml file"
            )
        return cls.from_toml(_folder().joinpath(f"{name}.toml").read_text("utf-8"), name)

    @classmethod
    def from_toml(cls, text: str, name: str) -> Self:
        """Reads a recipe's text.

        Raises:
            BuildError: not TOML, unknown or missing keys, wrong types.
        """
        where = f"recipe {name}"
        try:
            value = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise BuildError(f"{where} is not TOML: {error}") from error
        _check_keys(where, value, ("target", "precision", "attention", "weights", "profiles"))
        profiles = _required(where, value, "profiles")
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
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in _folder().iterdir()
        if entry.name.endswith(".toml")
    )


def _folder() -> Any:
    return files("klein_kv.engines.sizes") / "recipes"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BuildError(f"recipe {path} cannot be read: {error}") from error


def _check_keys(where: str, value: Mapping[str, Any], known: tuple[str, ...]) -> None:
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise BuildError(
            f"{where}: unknown key {', '.join(unknown)}; expected only {', '.join(known)}"
        )


def _required(where: str, value: Mapping[str, Any], key: str) -> Any:
    if key not in value:
        raise BuildError(f"{where}: {key} is missing")
    return value[key]


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
