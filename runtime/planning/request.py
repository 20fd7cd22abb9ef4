"""What is to be made: sizes of an edit, and the graphs that it runs."""

import math
from dataclasses import dataclass, replace

from klein_kv.artifacts.config import ModelConfig
from klein_kv.artifacts.signature import GraphSet

__all__ = ["Request", "edit_stages", "flagship_request"]

_FLAGSHIP_SIDE, _FLAGSHIP_REFERENCES = 1024, 4
"""The edit that a GPU should keep the references of: as large as klein takes them."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be made; sizes in pixels."""

    height: int
    width: int
    references: tuple[tuple[int, int], ...]  # (height, width) of each image
    stages: tuple[str, ...]  # graphs that run, in order
    batch: int = 1  # images at once
    prompts: int = 1  # whose texts are encoded at once
    text_tokens: int = 512
    # Keys and values are on the device from the start, or `first_step` or `encode_references` makes
    # them; kept, they stay after the steps if they fit beside the VAE.
    kv_held: bool = False
    kv_kept: bool = False

    def ref_tokens(self, config: ModelConfig) -> int:
        """R, tokens of all references."""
        unit = config.vae.multiple_of
        return sum((height // unit) * (width // unit) for height, width in self.references)

    def sizes(self, graph: str, config: ModelConfig) -> dict[str, int]:
        """Sizes of the symbols of one graph's signature; for the VAE encoder the largest image."""
        unit = config.vae.multiple_of
        height, width = self.height, self.width
        if graph == "vae_encoder":
            height, width = max(self.references, key=math.prod, default=(0, 0))
        grid = height // unit, width // unit
        return {
            "batch": self.prompts if graph == "text_encoder" else self.batch,
            "text_tokens": self.text_tokens,
            "image_tokens": grid[0] * grid[1],
            "ref_tokens": self.ref_tokens(config),
            "grid_height": grid[0],
            "grid_width": grid[1],
            "height": height,
            "width": width,
        }

    def runs(self, graph: str, config: ModelConfig) -> list[dict[str, int]]:
        """Sizes of each different run of one graph: the VAE encoder has one per reference size."""
        if graph != "vae_encoder":
            return [self.sizes(graph, config)]
        different = dict.fromkeys(self.references)
        return [replace(self, references=(size,)).sizes(graph, config) for size in different]

    def shapes(
        self, graph: str, config: ModelConfig, graphs: GraphSet
    ) -> list[dict[str, tuple[int, ...]]]:
        """Shapes of a graph's inputs, for each different run."""
        inputs = graphs.signature(graph, config).inputs
        return [
            {spec.name: spec.concrete(sizes) for spec in inputs}
            for sizes in self.runs(graph, config)
        ]


def edit_stages(
    variant: str, references: int, *, known: bool = False, blends: bool = False
) -> tuple[str, ...]:
    """The graphs that a request runs, in order, each once.

    Of `known` references the keys and values (for plain weights, the tokens) are at hand; an edit
    from a start image `blends` latents with it.
    """
    encode = ("vae_encoder",) if references and not known else ()
    blend = ("blend",) if blends else ()
    if variant == "plain":
        return ("text_encoder", *encode, *blend, "plain_step", "vae_decoder")
    first = ("first_step",) if encode else ()
    return ("text_encoder", *encode, *first, *blend, "cached_step", "vae_decoder")


def flagship_request(variant: str, config: ModelConfig) -> Request:
    """A first edit of 1024x1024 pixels with four references of that size."""
    unit = config.vae.multiple_of
    side = -(-_FLAGSHIP_SIDE // unit) * unit
    references = ((side, side),) * _FLAGSHIP_REFERENCES
    return Request(side, side, references, edit_stages(variant, len(references)))
