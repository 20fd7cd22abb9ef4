"""Runs the graphs once at given sizes, so that a first call finds everything loaded.

What happens only then: sessions and engines are opened, weights uploaded, kernels compiled, memory
taken and CUDA graphs captured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.signature import GraphSet
from klein_kv.artifacts.weights import NUMPY_DTYPES
from klein_kv.errors import RequestError
from klein_kv.runtime.loop import denoise_loop, loop_inputs, no_references
from klein_kv.runtime.outputs.results import decode_latents
from klein_kv.runtime.references.reference_encoder import PreparedReferences, ReferenceEncoder
from klein_kv.runtime.session import Session
from klein_kv.schedule import Schedule

__all__ = ["Sizes", "blank_references", "run_sizes", "with_encode_references"]

_LONGEST_SIDE = 16384


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a call.

    Attributes:
        grid: tokens of the output, (height, width).
        images_per_prompt: images made of each prompt.
    """

    grid: tuple[int, int]
    images_per_prompt: int


def blank_references(sizes: Sequence[tuple[int, int]]) -> list[Image.Image]:
    """Black pictures of these sizes, (height, width) in pixels each.

    Raises:
        RequestError: no size.
    """
    for size in sizes:
        if not (
            isinstance(size, tuple | list)
            and len(size) == 2
            and all(isinstance(side, int) and 0 < side <= _LONGEST_SIDE for side in size)
        ):
            raise RequestError(
                f"size of a reference is {size!r}, expected (height, width) in pixels, at most "
                f"{_LONGEST_SIDE} each"
            )
    return [Image.new("RGB", (width, height)) for height, width in sizes]


def with_encode_references(stages: Sequence[str]) -> tuple[str, ...]:
    """Stages of a first edit, and the graph that `run_sizes` runs besides before its first step."""
    return tuple(
        name
        for stage in stages
        for name in (("encode_references", stage) if stage == "first_step" else (stage,))
    )


def run_sizes(
    session: Session,
    encoder: ReferenceEncoder,
    manifest: Manifest,
    graphs: GraphSet,
    schedule: Schedule,
    sizes: Sizes,
    prompts: Mapping[str, NDArray[np.int64]],
    references: PreparedReferences | None,
) -> None:
    """Runs every graph that a call of these sizes can need; keeps nothing.

    At least two steps make all that later ones replay. `encode_references` runs besides
    `first_step`, for references that are sent before the prompt.
    """
    tokens = {name: session.upload(array) for name, array in prompts.items()}
    embeds = session.run("text_encoder", tokens)["encoder_hidden_states"]
    batch, length = prompts["input_ids"].shape
    count = batch * sizes.images_per_prompt
    width = manifest.config.transformer.joint_attention_dim
    rows = [session.view(embeds, (length, width), i * length * width) for i in range(batch)]
    text = session.assemble(
        (count, length, width), [row for row in rows for _ in range(sizes.images_per_prompt)]
    )
    channels = manifest.config.transformer.in_channels
    noise = np.zeros((count, channels, *sizes.grid), NUMPY_DTYPES[manifest.dtype])
    inputs = loop_inputs(session, noise, text, length, sizes.grid)
    if references is None and manifest.variant == "kv":
        inputs.kv = no_references(session, manifest.config.transformer, graphs)
    else:
        inputs.references = encoder.tokens(references)
        if manifest.variant == "kv":
            session.run("encode_references", inputs.references)
    denoise_loop(session, schedule, inputs, graphs)
    inputs.kv, inputs.references = {}, None  # as a call does before it decodes
    decode_latents(session, inputs.latents, (count, *sizes.grid, channels), "pil")
