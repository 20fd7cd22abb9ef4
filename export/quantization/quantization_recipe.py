"""Recipes of quantization: which format each linear layer of the blocks gets.

A recipe is a TOML file (see `recipes/fp8.toml`). Embedders, modulations, norms and the final
projection are never quantized: they are small, and errors in them reach every token.
"""

import logging
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

from klein_kv.artifacts.numbers import BLOCK, FORMATS, PRECISION_FORMATS, is_block_linear
from klein_kv.errors import RequestError

__all__ = ["QuantizationRecipe"]

_log = logging.getLogger(__name__)

_KEEP = "bf16"
"""Format of an override that leaves a layer in the artifacts' own type, whichever that is."""

_ACTIVATIONS = ("quantized", "kept")


@dataclass(frozen=True, slots=True)
class QuantizationRecipe:
    """How to quantize both networks."""

    name: str  # for people
    transformer: str  # format of the transformer's block linears
    text_encoder: str = _KEEP  # format of the text encoder's, or "bf16" to leave it
    activations: str = "quantized"  # multiplied in the format; "kept" saves memory alone
    # share of a layer's input values, in percent, that its range covers
    percentile: float = 100.0
    # (pattern, format) of layers that differ, by weight name as `fnmatch` reads it; the last counts
    overrides: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        kinds = (*FORMATS, _KEEP)
        for what, value, allowed in (
            ("transformer", self.transformer, FORMATS),
            ("text_encoder", self.text_encoder, kinds),
            ("activations", self.activations, _ACTIVATIONS),
            *((f"the override of {pattern!r}", kind, kinds) for pattern, kind in self.overrides),
        ):
            if value not in allowed:
                raise RequestError(
                    f"recipe {self.name}: {what} is {value!r}, expected one of {', '.join(allowed)}"
                )
        if not 90 <= self.percentile <= 100:
            raise RequestError(
                f"recipe {self.name}: percentile is {self.percentile}, expected 90 to 100"
            )
        if self.activations == "kept" and "nvfp4" in (self.transformer, self.text_encoder):
            raise RequestError(
                f"recipe {self.name}: activations are kept and weights are nvfp4; only fp8 "
                "weights are made without quantized activations"
            )

    def component_precision(self, component: str) -> str | None:
        """What the folder calls the result, one of `PRECISION_FORMATS`; None if it is left."""
        kind = self._format(component)
        if kind == _KEEP:
            return None
        return "fp8-weight-only" if self.activations == "kept" else kind

    def _format(self, component: str) -> str:
        return self.transformer if component == "transformer" else self.text_encoder

    def assign(self, component: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """The format of each layer that is quantized, by weight name.

        A layer whose input features do not fill blocks of 16 stays as it is where nvfp4 is asked
        for; that is logged.
        """
        default, formats = self._format(component), {}
        for name in [name for name, shape in shapes.items() if is_block_linear(name, shape)]:
            kind = default
            if default != _KEEP:
                for pattern, other in self.overrides:
                    kind = other if fnmatchcase(name, pattern) else kind
            if kind == "nvfp4" and shapes[name][1] % BLOCK:
                _log.warning(
                    "%s stays as it is: its %d input features are no multiple of %d",
                    name,
                    shapes[name][1],
                    BLOCK,
                )
            elif kind != _KEEP:
                formats[name] = kind
        return formats

    def component_dict(self, component: str) -> dict[str, Any]:
        """What of the recipe bears on one network; plain values for JSON."""
        return {
            "format": self._format(component),
            "activations": self.activations,
            "percentile": self.percentile,
            "overrides": [list(override) for override in self.overrides],
        }

    def check_overrides(self, names: list[str]) -> None:
        """Refuses, with a `RequestError`, a pattern that means no layer: it is misspelt."""
        for pattern, _ in self.overrides:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise RequestError(
                    f"recipe {self.name}: the override {pattern!r} matches no block linear; "
                    f"expected a pattern of weight names such as {names[0]!r}"
                )

    @classmethod
    def load(cls, source: str | Path) -> Self:
        """Reads a recipe that comes with the package, by name, or a TOML file, by path.

        Raises:
            RequestError: no such recipe, not TOML, unknown or missing keys, wrong values.
        """
        name = str(source)
        if isinstance(source, Path) or name.endswith(".toml"):
            path: Any = Path(source)
            name = path.stem
        elif name in PRECISION_FORMATS:  # each is named after the precision that it makes
            path = files("klein_kv.export.quantization") / "recipes" / f"{name}.toml"
        else:
            raise RequestError(
                f"unknown recipe {name!r}; expected one of {', '.join(PRECISION_FORMATS)}, or the "
                "path of a .toml file"
            )
        try:
            value = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except tomllib.TOMLDecodeError as error:
            raise RequestError(f"recipe {name} is not TOML: {error}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"recipe {path} cannot be read: {error}") from error
        known = ("transformer", "text_encoder", "activations", "percentile", "overrides")
        unknown = sorted(set(value) - set(known))
        if unknown or "transformer" not in value:
            what = f"unknown key {', '.join(unknown)}" if unknown else "transformer is missing"
            raise RequestError(f"recipe {name}: {what}; expected {', '.join(known)}")
        overrides = value.get("overrides", {})
        percentile = value.get("percentile", 100.0)
        if not isinstance(overrides, dict) or not isinstance(percentile, int | float):
            raise RequestError(
                f"recipe {name}: expected a number as percentile and a table "
                "[overrides] of pattern = format"
            )
        return cls(
            name=name,
            transformer=value["transformer"],
            text_encoder=value.get("text_encoder", _KEEP),
            activations=value.get("activations", "quantized"),
            percentile=float(percentile),
            overrides=tuple(overrides.items()),
        )
