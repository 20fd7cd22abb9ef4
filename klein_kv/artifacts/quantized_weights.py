"""Where an artifact folder keeps quantized weights, and what it says of them.

    COMPONENT/FORMAT.safetensors   numbers `NAME` and, for nvfp4, block scales `NAME.block_scales`
    COMPONENT/FORMAT.json          scales, how they were found, and the range of q, k and v

Numbers and block scales are what engines get as inputs, row by row in the checkpoint's own
[out, in] layout; scales are constants of graphs. Nothing here reads a weight.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from klein_kv.artifacts.numbers import PRECISION_FORMATS, QuantizedLinear
from klein_kv.artifacts.weights import read_header
from klein_kv.errors import MALFORMED, ArtifactError, CheckpointError
from klein_kv.json_values import read_document

__all__ = [
    "BLOCK_SCALES",
    "QuantizedComponent",
    "load_quantized",
    "quantized_files",
    "save_quantized_scales",
]

BLOCK_SCALES = ".block_scales"
"""What follows a weight's name in the name of its block scales."""

_FORMAT = "klein-kv quantized weights"
_FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class QuantizedComponent:
    """The quantized layers of one network, by weight name."""

    linears: dict[str, QuantizedLinear]
    # transformer: largest magnitude of "q", "k" (after RoPE) and "v" by block; empty if no
    # calibration was run
    attention: dict[str, dict[str, float]] = field(default_factory=dict)
    # how numbers and scales were found, for people
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all numbers and block scales."""
        return sum(linear.nbytes for linear in self.linears.values())


def quantized_files(component: str, precision: str) -> tuple[str, str]:
    """Paths of weights and scales, relative to the artifact folder."""
    return f"{component}/{precision}.safetensors", f"{component}/{precision}.json"


def save_quantized_scales(
    path: Path,
    linears: Mapping[str, tuple[str, float, float | None]],
    attention: Mapping[str, Mapping[str, float]],
    origin: Mapping[str, Any],
) -> None:
    """Writes the .json file of one network: format, weight scale and input scale by weight name."""
    value = {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "linears": {
            name: {"format": kind, "weight_scale": weight_scale, "input_scale": input_scale}
            for name, (kind, weight_scale, input_scale) in linears.items()
        },
        "attention": {block: dict(ranges) for block, ranges in attention.items()},
        "origin": dict(origin),
    }
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def load_quantized(artifacts: Path, component: str, precision: str) -> QuantizedComponent:
    """Reads scales, and where the numbers lie; `precision` is what the files are called.

    An `ArtifactError` if files are missing or do not belong together.
    """
    if precision not in PRECISION_FORMATS:
        raise ArtifactError(
            f"precision is {precision!r}, expected one of {', '.join(PRECISION_FORMATS)}"
        )
    weights, scales = (artifacts / name for name in quantized_files(component, precision))
    try:
        value = read_document(scales, _FORMAT, _FORMAT_VERSION, "quantize again")
        refs = read_header(weights, quantized=True)
        linears = {
            name: QuantizedLinear(
                entry["format"],
                refs.pop(name),
                float(entry["weight_scale"]),
                refs.pop(name + BLOCK_SCALES, None),
                None if entry["input_scale"] is None else float(entry["input_scale"]),
            )
            for name, entry in value["linears"].items()
        }
        attention = {
            block: {name: float(ranges[name]) for name in ("q", "k", "v")}
            for block, ranges in value["attention"].items()
        }
        quantized = QuantizedComponent(linears, attention, {**value["origin"]})
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{artifacts} has no {component} in {precision}: {scales} is missing; make it with "
            f"`klein-kv quantize {artifacts} --recipe {precision}`"
        ) from error
    except (OSError, CheckpointError, *MALFORMED) as error:
        raise ArtifactError(
            f"{scales} and {weights.name} cannot be read together "
            f"({type(error).__name__}: {error}); quantize again"
        ) from error
    if refs:
        raise ArtifactError(
            f"{weights} holds {next(iter(refs))}, of which {scales.name} says nothing; quantize "
            "again"
        )
    return quantized
