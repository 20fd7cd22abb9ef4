import json
import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from klein_kv.artifacts.attention_scales import (
    HEADROOM,
    AttentionScales,
    attention_scales,
    block_names,
)
from klein_kv.artifacts.numbers import FP8_MAX
from klein_kv.artifacts.signature import kv_names
from klein_kv.artifacts.weights import WeightRef, read_header, safetensors_header
from klein_kv.errors import ArtifactError
from tests.klein_configs import KLEIN_9B

NET = KLEIN_9B.transformer
RANGES = {block: {"q": 9.0, "k": 8.0 + i, "v": 5.0} for i, block in enumerate(block_names(NET))}


def save_norms(folder: Path, values: dict[str, NDArray[np.float32]]) -> dict[str, WeightRef]:
    path = folder / "norms.safetensors"
    header = safetensors_header({name: ("float32", x.shape) for name, x in values.items()})
    path.write_bytes(header + b"".join(x.tobytes() for x in values.values()))
    return read_header(path)


def test_calibrated_scales_leave_headroom() -> None:
    scales = attention_scales(NET, RANGES, {})  # no weight is read
    assert len(scales) == len(kv_names(NET.num_blocks)) // 2
    assert scales["transformer_blocks.3"].k == pytest.approx(HEADROOM * 11 / 448)
    assert scales["single_transformer_blocks.23"] == AttentionScales(
        HEADROOM * 9 / FP8_MAX, HEADROOM * 39 / FP8_MAX, HEADROOM * 5 / FP8_MAX
    )


def test_a_head_of_zeros_has_a_scale() -> None:
    ranges = {**RANGES, "transformer_blocks.0": {"q": 0.0, "k": 0.0, "v": 0.0}}
    assert attention_scales(NET, ranges, {})["transformer_blocks.0"] == AttentionScales(1, 1, 1)


def test_without_calibration_the_norms_bound_queries_and_keys(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    block = "single_transformer_blocks.4"
    weight = rng.normal(1, 0.5, 128).astype(np.float32)
    weight[7] = -3
    weights = save_norms(
        tmp_path,
        {f"{block}.attn.norm_q.weight": weight / 2, f"{block}.attn.norm_k.weight": weight},
    )
    ranges = {name: value for name, value in RANGES.items() if name != block}
    scales = attention_scales(NET, ranges, weights)[block]
    assert scales.k * FP8_MAX == pytest.approx(math.sqrt(128) * 3)
    assert scales.v == 1
    # The worst head there is: all of its length in the channel of the largest weight, rotated.
    head = np.zeros(128, np.float32)
    head[7] = 1
    normed = head / np.sqrt(np.mean(head**2)) * weight
    assert np.abs(normed).max() <= scales.k * FP8_MAX * (1 + 1e-6)


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_damaged_ranges_are_refused(value: float) -> None:
    ranges = json.loads(json.dumps(RANGES))
    ranges["transformer_blocks.0"]["v"] = value
    with pytest.raises(ArtifactError, match="the scale of v in float8 attention is"):
        attention_scales(NET, ranges, {})
