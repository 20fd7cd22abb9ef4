"""The denoising loop: backend calls and nothing else.

`first_step` takes the references' tokens and leaves their keys and values on the device; every
later step is `cached_step` on those buffers. With keys and values at hand from the start, or
without references (R = 0), all steps are `cached_step`. Plain weights have nothing to keep: each of
their steps is `plain_step`, which takes the references' tokens. `blend` follows every step where a
part of an image is to stay.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klein_kv.artifacts.config import TransformerConfig
from klein_kv.artifacts.positions import grid_ids, text_ids
from klein_kv.artifacts.signature import GraphSet
from klein_kv.artifacts.weights import NUMPY_DTYPES
from klein_kv.runtime.backends.backend import Buffer
from klein_kv.runtime.session import Session
from klein_kv.schedule import Schedule

__all__ = ["Blend", "LoopInputs", "denoise_loop", "loop_inputs", "no_references"]


@dataclass(frozen=True, slots=True)
class Blend:
    """Buffers of the graph `blend`, which mixes latents with an image."""

    image_latents: Buffer  # [1, S, C]
    noise: Buffer  # [B, S, C]
    mask: Buffer  # [B, S, 1]

    def __call__(self, backend: Session, latents: Buffer, sigma: Buffer) -> Buffer:
        """The latents where the mask is 1, the image at noise level `sigma` where it is 0."""
        feeds = {"hidden_states": latents, "sigma": sigma, "mask": self.mask}
        feeds |= {"image_latents": self.image_latents, "noise": self.noise}
        return backend.run("blend", feeds)["latents"]


@dataclass(slots=True)
class LoopInputs:
    """Buffers of one request; exactly one of `references` and `kv` is given."""

    latents: Buffer  # [B, S, C]
    latents_shape: tuple[int, ...]
    text: Buffer  # [B, T, 3 * hidden]
    img_ids: Buffer  # int64 [S, 4]
    txt_ids: Buffer  # int64 [T, 4]
    # `ref_hidden_states` and `ref_ids`, R > 0; R >= 0 for plain weights
    references: dict[str, Buffer] | None = None
    kv: dict[str, Buffer] = field(default_factory=dict)  # `k_ref.{i}` and `v_ref.{i}`, R >= 0
    noise_pred: Buffer | None = None  # [B, S, C] of the step that just ran; None while one runs
    blend: Blend | None = None  # what the latents are mixed with after each step


def loop_inputs(
    backend: Session, noise: NDArray[Any], text: Buffer, length: int, grid: tuple[int, int]
) -> LoopInputs:
    """Uploads what a request starts from; its references are still to be filled in.

    From noise [B, C, h, w] of a grid (h, w), and text [B, T, 3 * hidden] of length T on the device.
    """
    batch, channels = noise.shape[:2]
    tokens = noise.reshape(batch, channels, -1).transpose(0, 2, 1)  # [B, S, C]
    return LoopInputs(
        latents=backend.upload(tokens),
        latents_shape=tokens.shape,
        text=text,
        img_ids=backend.upload(grid_ids(*grid)),
        txt_ids=backend.upload(text_ids(length)),
    )


def no_references(backend: Session, net: TransformerConfig, graphs: GraphSet) -> dict[str, Buffer]:
    """Keys and values of R = 0 tokens; their scales, where they have some, are 1."""
    return backend.upload_kv(
        {
            spec.name: np.ones(spec.concrete({}), NUMPY_DTYPES[spec.dtype])
            for spec in graphs.kv_tensors(net, ref_tokens=0)
        }
    )


AfterStep = Callable[[int, LoopInputs], bool]
"""Called after each step with its index and the buffers, which it may replace; True stops."""


def denoise_loop(
    backend: Session,
    schedule: Schedule,
    inputs: LoopInputs,
    graphs: GraphSet,
    after_step: AfterStep | None = None,
) -> None:
    """Runs all steps; `inputs.latents` holds the result, `inputs.kv` the keys and values."""
    scalars = [
        (
            backend.upload(np.array([schedule.model_timestep(i, graphs.dtype)], np.float32)),
            backend.upload(schedule.sigma_steps[i : i + 1]),
            backend.upload(schedule.sigmas[i + 1 : i + 2]) if inputs.blend else None,
        )
        for i in range(schedule.num_steps)
    ]
    for i, (timestep, sigma_step, sigma) in enumerate(scalars):
        feeds = {
            "hidden_states": inputs.latents,
            "encoder_hidden_states": inputs.text,
            "timestep": timestep,
            "sigma_step": sigma_step,
            "img_ids": inputs.img_ids,
            "txt_ids": inputs.txt_ids,
        }
        if inputs.references is None:
            graph = "cached_step"
            feeds |= inputs.kv
        else:
            graph = "plain_step" if graphs.variant == "plain" else "first_step"
            feeds |= inputs.references
        outputs = backend.run(graph, feeds)
        inputs.latents = outputs.pop("latents")
        inputs.noise_pred = outputs.pop("noise_pred")
        if graph == "first_step":
            inputs.kv, inputs.references = outputs, None
        if inputs.blend is not None:
            inputs.latents = inputs.blend(backend, inputs.latents, sigma)
        stop = after_step is not None and after_step(i, inputs)
        inputs.noise_pred = None
        if stop:
            break
