"""The benchmark of a switch, and what it counts at klein 9B's shapes."""

from pathlib import Path

import pytest

from benchmarks.lora_switch import switch
from tests.conftest import KleinExport


@pytest.mark.slow
def test_a_switch_of_all_linear_layers_reads_each_once(
    klein_export: KleinExport, tmp_path: Path
) -> None:
    result = switch(klein_export.artifacts, tmp_path, rank=4, rounds=2)
    assert result["weight_bytes"] == result["touched_bytes"] == 17_448_304_640
    assert result["factor_bytes"] < 0.02 * result["touched_bytes"]
    assert (result["loads"], result["captures"]) == (0, 0)
    assert 0.27 < result["pcie_seconds"] < 0.28
    assert 0.15 < result["memory_seconds"] < 0.16
