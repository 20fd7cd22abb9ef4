"""Sizes that a self-test runs at: the smallest that the engines serve, or small ones."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klein_kv.config import ModelConfig
from klein_kv.engines.manifest import EngineManifest
from klein_kv.runtime.references import grid_ids, reference_ids, text_ids
from klein_kv.signature import KV_FLOAT8, GraphSet

__all__ = ["CaseSizes", "engine_sizes", "random_inputs", "small_sizes"]

_LEAST_SIDE, _LEAST_REFERENCE = 128, 64
_TIMESTEP, _SIGMA_STEP = 743.5, -0.25
_FLOAT8_SPREAD = 64
"""Standard deviation of keys and values in float8, which reach 448."""
Grid = tuple[int, int]


@dataclass(frozen=True, slots=True)
class CaseSizes:
    """Sizes of one request.

    Attributes:
        output: (height, width) in pixels.
        references: the same of each reference image.
        text_tokens: T.
        without_references: whether text-to-image is served too.
    """

    output: Grid
    references: tuple[Grid, ...]
    text_tokens: int
    without_references: bool = True

    def grids(self, unit: int) -> tuple[Grid, list[Grid]]:
        """The output and the references in tokens."""
        output, *references = (
            (height // unit, width // unit) for height, width in (self.output, *self.references)
        )
        return output, references

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes them."""
        return {
            "output": list(self.output),
            "references": [list(size) for size in self.references],
            "text_tokens": self.text_tokens,
        }


def small_sizes(unit: int) -> CaseSizes:
    """Sizes that take a CPU little time, none of them equal.

    Args:
        unit: pixels of a token and side.
    """
    side, reference = math.ceil(_LEAST_SIDE / unit), math.ceil(_LEAST_REFERENCE / unit)
    return CaseSizes(
        output=(side * unit, (side + 2) * unit),
        references=(
            ((reference + 2) * unit, reference * unit),
            (reference * unit, reference * unit),
        ),
        text_tokens=32,
    )


def engine_sizes(engines: EngineManifest, config: ModelConfig, *, typical: bool) -> CaseSizes:
    """The smallest, or the typical, request that a folder of engines serves.

    Args:
        engines: the folder's manifest.
        config: gives the pixels of a token.
        typical: the sizes that the profiles are tuned for, not their smallest.
    """
    unit, at = config.vae.multiple_of, 1 if typical else 0

    def axis(graph: str, symbol: str, default: int) -> int:
        record = engines.engines.get(graph)
        if record is None or not record.profiles:
            return default
        found = record.profiles[0].symbols.get(symbol)
        return default if found is None else found[at]

    small = small_sizes(unit)
    output = (
        axis("vae_decoder", "grid_height", small.output[0] // unit) * unit,
        axis("vae_decoder", "grid_width", small.output[1] // unit) * unit,
    )
    each = (
        axis("vae_encoder", "height", small.references[0][0]),
        axis("vae_encoder", "width", small.references[0][1]),
    )
    tokens = (each[0] // unit) * (each[1] // unit)
    step = "plain_step" if "plain_step" in engines.engines else "first_step"
    wanted = axis(step, "ref_tokens", tokens)
    record = engines.engines.get("plain_step") or engines.engines.get("cached_step")
    least = record.profiles[0].symbols.get("ref_tokens", (0, 0, 0))[0] if record else 0
    return CaseSizes(
        output=output,
        references=(each,) * max(1, round(wanted / tokens)),
        text_tokens=axis(step, "text_tokens", axis("text_encoder", "text_tokens", 32)),
        without_references=least == 0,
    )


def random_inputs(
    graphs: GraphSet, config: ModelConfig, graph: str, sizes: CaseSizes, seed: int
) -> dict[str, NDArray[Any]]:
    """Inputs of one graph: normal numbers in float32, positions and masks as requests have them.

    Keys and values in float8 are the numbers themselves, spread as their type has room.

    Args:
        graphs: gives the contract.
        config: the networks.
        graph: its name.
        sizes: of the request.
        seed: of the numbers.
    """
    rng = np.random.default_rng(seed)
    output, references = sizes.grids(config.vae.multiple_of)
    symbols = {
        "batch": 1,
        "image_tokens": output[0] * output[1],
        "text_tokens": sizes.text_tokens,
        "ref_tokens": sum(height * width for height, width in references),
        "grid_height": output[0],
        "grid_width": output[1],
        "height": sizes.references[0][0],
        "width": sizes.references[0][1],
    }
    mask = np.ones((1, sizes.text_tokens), np.int64)
    mask[:, sizes.text_tokens - sizes.text_tokens // 4 :] = 0  # padding behind the prompt
    vocabulary = config.text_encoder.vocab_size
    known: dict[str, NDArray[Any]] = {
        "input_ids": rng.integers(0, vocabulary, (1, sizes.text_tokens)),
        "attention_mask": mask,
        "timestep": np.array([_TIMESTEP], np.float32),
        "sigma_step": np.array([_SIGMA_STEP], np.float32),
        "img_ids": grid_ids(*output),
        "txt_ids": text_ids(sizes.text_tokens),
        "ref_ids": reference_ids(references),
    }
    inputs = {}
    for spec in graphs.signature(graph, config).inputs:
        shape = spec.concrete(symbols)
        if spec.name in known:
            inputs[spec.name] = known[spec.name]
        elif "_scale." in spec.name:
            inputs[spec.name] = rng.uniform(0.005, 0.02, shape).astype(np.float32)
        elif spec.dtype == "uint8":
            inputs[spec.name] = rng.integers(0, 256, shape, dtype=np.uint8)
        elif spec.dtype == KV_FLOAT8:
            inputs[spec.name] = _FLOAT8_SPREAD * rng.standard_normal(shape, np.float32)
        else:
            inputs[spec.name] = rng.standard_normal(shape, np.float32)
    return inputs
