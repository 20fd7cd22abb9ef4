"""Inputs of the transformer's graphs, drawn at random."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klein_kv.artifacts.config import TransformerConfig
from klein_kv.artifacts.positions import grid_ids, reference_ids, text_ids
from klein_kv.artifacts.weights import NUMPY_DTYPES

__all__ = ["Arrays", "cast", "normal", "reference_inputs", "step_inputs"]

Arrays = dict[str, NDArray[Any]]


def normal(seed: int, *shape: int) -> NDArray[Any]:
    """Float32 numbers that both 16-bit types hold: 8 bits of significand."""
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return values.astype(NUMPY_DTYPES["bfloat16"]).astype(np.float32)


def step_inputs(
    net: TransformerConfig,
    seed: int = 0,
    batch: int = 2,
    text_tokens: int = 19,
    grid: tuple[int, int] = (5, 4),
) -> Arrays:
    return {
        "hidden_states": normal(seed, batch, grid[0] * grid[1], net.in_channels),
        "encoder_hidden_states": normal(seed + 1, batch, text_tokens, net.joint_attention_dim),
        "timestep": np.array([700.0 + seed], np.float32),
        "sigma_step": np.array([-0.25], np.float32),
        "img_ids": grid_ids(*grid),
        "txt_ids": text_ids(text_tokens),
    }


def reference_inputs(
    net: TransformerConfig, grids: Sequence[tuple[int, int]] = ((3, 4), (5, 2)), seed: int = 7
) -> Arrays:
    ids = reference_ids(list(grids))
    return {"ref_hidden_states": normal(seed, 1, len(ids), net.in_channels), "ref_ids": ids}


def cast(inputs: Mapping[str, NDArray[Any]], dtype: str) -> Arrays:
    """The same as graphs of a type take them: times and step sizes stay float32."""
    return {
        name: x.astype(NUMPY_DTYPES[dtype])
        if x.dtype == np.float32 and name not in ("timestep", "sigma_step")
        else x
        for name, x in inputs.items()
    }
