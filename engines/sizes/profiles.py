"""Optimization profiles: a recipe's sizes as the shapes of one graph's inputs."""

import math
from collections.abc import Mapping

from klein_kv.artifacts.config import ModelConfig
from klein_kv.artifacts.engines.engine_record import ProfileRecord, Shapes
from klein_kv.artifacts.signature import Signature
from klein_kv.engines.sizes.recipe import Range, Recipe, ShapeProfile
from klein_kv.errors import BuildError
from klein_kv.networks.merge import MOST_ROWS, RANKS
from klein_kv.networks.transformer import transformer_parameters

__all__ = ["NEED_REFERENCES", "engine_profiles"]

MAX_ASPECT = 8
"""Longer over shorter side of a reference image (diffusers: `Flux2KleinKVPipeline.check_inputs`
and its image processor)."""

NEED_REFERENCES = ("vae_encoder", "encode_references", "first_step")
"""Graphs that do not run without references."""


def engine_profiles(
    signature: Signature, recipe: Recipe, config: ModelConfig
) -> list[ProfileRecord]:
    """The profiles of one engine; equal ones are kept once.

    A `BuildError` tells of a size that is no multiple of a token's pixels, or of no profile at all.
    """
    profiles: list[ProfileRecord] = []
    merges = _merge_ranges(config)
    for profile in recipe.profiles:
        for part, symbols in _boxes(signature.graph, profile, config.vae.multiple_of):
            used = {symbol: (symbols | merges)[symbol] for symbol in signature.symbols}
            if all(used != other.symbols for other in profiles):
                profiles.append(ProfileRecord(part, {**used}, _shapes(signature, used)))
    if not profiles:
        raise BuildError(
            f"{signature.graph}: no profile of recipe {recipe.name} has reference images; build "
            "without this graph, or add a profile with references"
        )
    return profiles


def _symbol_ranges(profile: ShapeProfile, unit: int) -> dict[str, Range]:
    """Sizes of the symbolic axes of `artifacts.signature`, but for height and width."""
    for field in ("output", "reference_size"):
        for size in getattr(profile, field):
            if size.width % unit or size.height % unit:
                raise BuildError(
                    f"profile {profile.name}: {field} is {size.width}x{size.height}, expected "
                    f"sides that are multiples of {unit} pixels"
                )
    grid = [(size.width // unit, size.height // unit) for size in profile.output]
    reference = [(size.width // unit) * (size.height // unit) for size in profile.reference_size]
    counts = profile.references
    return {
        "batch": profile.batch,
        "text_tokens": profile.text_tokens,
        "image_tokens": Range(*(width * height for width, height in grid)),
        "ref_tokens": Range(*(count * each for count, each in zip(counts, reference, strict=True))),
        "grid_width": Range(*(width for width, _ in grid)),
        "grid_height": Range(*(height for _, height in grid)),
    }


def _merge_ranges(config: ModelConfig) -> dict[str, Range]:
    """Symbol ranges of a merge, the same in every recipe: any weight of the transformer."""
    shapes = transformer_parameters(config.transformer).values()
    columns = [shape[1] for shape in shapes if len(shape) == 2]
    return {
        "rows": Range(1, MOST_ROWS, MOST_ROWS),
        "columns": Range(min(columns), config.transformer.inner_dim, max(columns)),
        "rank": Range(RANKS[0], RANKS[1], RANKS[-1]),
    }


def _boxes(graph: str, profile: ShapeProfile, unit: int) -> list[tuple[str, dict[str, Range]]]:
    """Symbol ranges of one recipe profile for one graph; several for the VAE encoder."""
    symbols = _symbol_ranges(profile, unit)
    tokens = symbols["ref_tokens"]
    if graph in NEED_REFERENCES and not tokens.max:
        return []
    if graph == "vae_encoder":
        return _reference_boxes(profile, unit)
    if graph in NEED_REFERENCES:
        smallest = profile.reference_size.min
        least = (smallest.width // unit) * (smallest.height // unit)
        symbols["ref_tokens"] = Range(*(max(value, least) for value in tokens))
    return [(profile.name, symbols)]


def _reference_boxes(profile: ShapeProfile, unit: int) -> list[tuple[str, dict[str, Range]]]:
    """Ranges of height and width that cover references of every proportion.

    A profile bounds each side, not the area, and scratch memory follows the bounds: one box up to
    the longest side would pay for an image of that side squared. Sides are bounded per proportion
    instead: up to 3:2 (of the square of equal area) and beyond.
    """
    low, typical, high = profile.reference_size
    if low == high:
        exact = {"width": Range(*[low.width] * 3), "height": Range(*[low.height] * 3)}
        return [(profile.name, exact)]
    side = math.sqrt(high.width * high.height)
    boxes = []
    for most_long, most_short in ((1.5, 1), (math.sqrt(MAX_ASPECT), 1 / 1.5)):
        long, short = (math.ceil(side * x / unit) * unit for x in (most_long, most_short))
        for width, height in ((long, short), (short, long)):
            ranges = {
                "width": Range(low.width, min(typical.width, width), width),
                "height": Range(low.height, min(typical.height, height), height),
            }
            boxes.append((f"{profile.name}, up to {width}x{height}", ranges))
    return boxes


def _shapes(signature: Signature, symbols: Mapping[str, Range]) -> Shapes:
    ends = [{symbol: values[i] for symbol, values in symbols.items()} for i in range(3)]
    shapes = {}
    for spec in signature.inputs:
        if any(isinstance(axis, str) for axis in spec.shape):
            low, typical, high = (spec.concrete(sizes) for sizes in ends)
            shapes[spec.name] = (low, typical, high)
    return shapes
