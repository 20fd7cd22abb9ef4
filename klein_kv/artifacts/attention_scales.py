"""Scales of queries, keys and values where attention is computed in float8, or keys kept in it.

They are constants of a graph, one per block and tensor: TensorRT's fused float8 attention takes
nothing else, and reads reference keys and values as they are kept. A scale covers `HEADROOM` times
the largest magnitude that calibration saw. That is generous on purpose: e4m3 is a floating point
type, so a loose scale costs no precision but of values 2**-13 times smaller than the largest.

Without calibration, queries and keys still have a bound: each head is RMS-normed, then multiplied
by the norm's weight and rotated, so no element exceeds `sqrt(head_dim) * max |weight|`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from klein_kv.artifacts.config import TransformerConfig
from klein_kv.artifacts.numbers import FP8_MAX
from klein_kv.artifacts.weights import WeightRef, map_weight
from klein_kv.errors import ArtifactError

__all__ = ["HEADROOM", "AttentionScales", "attention_scales", "block_names", "kv_scales"]

HEADROOM = 2.0
"""Largest magnitude that a scale covers, in units of the largest that calibration saw."""

_UNCALIBRATED_VALUE = 1.0
"""Scale of values without calibration: covers up to 448, and 2**-6 is its smallest normal number"""


@dataclass(frozen=True, slots=True)
class AttentionScales:
    """What the e4m3 numbers of one block's attention are multiplied by."""

    q: float
    k: float
    v: float

    def __post_init__(self) -> None:
        for name in ("q", "k", "v"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ArtifactError(
                    f"the scale of {name} in float8 attention is {value}, expected a positive "
                    "number; quantize again"
                )


def block_names(net: TransformerConfig) -> list[str]:
    """`transformer_blocks.0`, ..., `single_transformer_blocks.0`, ... as `kv_names` goes."""
    return [f"transformer_blocks.{i}" for i in range(net.num_layers)] + [
        f"single_transformer_blocks.{i}" for i in range(net.num_single_layers)
    ]


def attention_scales(
    net: TransformerConfig,
    ranges: Mapping[str, Mapping[str, float]],
    weights: Mapping[str, WeightRef],
) -> dict[str, AttentionScales]:
    """The scales of every block.

    `ranges` are largest magnitudes of "q", "k" (after RoPE) and "v" by block, from calibration; a
    block that is absent gets the bound of its norms' weights, which are read, and for values 1.
    """
    scales = {}
    for block in block_names(net):
        largest = ranges.get(block)
        if largest is None:
            bound = _norm_bound(net, block, weights) / FP8_MAX
            scales[block] = AttentionScales(bound, bound, _UNCALIBRATED_VALUE)
        else:
            # A head of zeros alone has the range 0; any scale is right for it.
            q, k, v = (HEADROOM * largest[name] / FP8_MAX or 1.0 for name in ("q", "k", "v"))
            scales[block] = AttentionScales(q, k, v)
    return scales


def kv_scales(net: TransformerConfig, scales: Mapping[str, AttentionScales]) -> list[float]:
    """Scales of keys and values, k and v of every block, in the order of `signature.kv_names`."""
    return [scale for name in block_names(net) for scale in (scales[name].k, scales[name].v)]


def _norm_bound(net: TransformerConfig, block: str, weights: Mapping[str, WeightRef]) -> float:
    names = [name for name in weights if name.startswith(f"{block}.attn.norm_")]
    largest = max(float(np.abs(map_weight(weights[x]).astype(np.float32)).max()) for x in names)
    return math.sqrt(net.attention_head_dim) * largest or 1.0
