"""What happens to latents between steps where a part of an image is to stay as it is."""

from typing import TypeVar

import numpy as np

from klein_kv.networks.ops import Ops

__all__ = ["blend"]

T = TypeVar("T")


def blend(ops: Ops[T], hidden_states: T, image_latents: T, noise: T, mask: T, sigma: T) -> T:
    """The latents [B, S, C] where the mask is 1; the image with noise of level sigma where it is 0.

    `hidden_states` and `noise` are [B, S, C], `image_latents` [1, S, C], `mask` [B, S, 1], `sigma`
    float32 [1]; everything is computed in the model's dtype, as there. Source: diffusers,
    `Flux2KleinInpaintPipeline.__call__` (part 7) and `FlowMatchEulerDiscreteScheduler.scale_noise`.
    """

    def rest(x: T) -> T:
        return ops.add(ops.mul(x, number(-1)), number(1))

    def number(value: float) -> T:
        return ops.to_model_dtype(ops.constant(np.array(value, np.float32)))

    level = ops.to_model_dtype(sigma)
    noised = ops.add(ops.mul(level, noise), ops.mul(rest(level), image_latents))
    return ops.add(ops.mul(rest(mask), noised), ops.mul(mask, hidden_states))
