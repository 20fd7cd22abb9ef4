"""Merged weights as graphs read them: exact in floating point, anew on the grid when quantized."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.numbers import QuantizedLinear, dequantize_fp8, dequantize_nvfp4
from klein_kv.artifacts.quantized_weights import BLOCK_SCALES, load_quantized
from klein_kv.artifacts.signature import GraphSet
from klein_kv.artifacts.weights import map_weight
from klein_kv.export.checks.artifact_weights import component_weights
from klein_kv.networks.transformer import transformer_parameters
from klein_kv.runtime.lora import merge
from klein_kv.runtime.lora.lora_file import Adapter, read_adapter
from klein_kv.runtime.lora.merge import WeightMerger

NAME = "transformer_blocks.0.ff.linear_in.weight"


@pytest.fixture(scope="module")
def own(quantized_artifacts: Path) -> NDArray[np.float32]:
    """The tensor before."""
    weights = component_weights(
        quantized_artifacts, Manifest.load(quantized_artifacts), "transformer"
    )
    return map_weight(weights[NAME]).astype(np.float32)


def adapter_of(quantized_artifacts: Path, size: float) -> tuple[Adapter, NDArray[np.float32]]:
    """An adapter of one tensor, whose change has this deviation, and the change."""
    shapes = transformer_parameters(Manifest.load(quantized_artifacts).config.transformer)
    rows, columns = shapes[NAME]
    rng = np.random.default_rng(0)
    up = rng.standard_normal((rows, 4)).astype(np.float32) * size / 2
    down = rng.standard_normal((4, columns)).astype(np.float32)
    base = f"transformer.{NAME.removesuffix('.weight')}"
    tensors = {f"{base}.lora_A.weight": down, f"{base}.lora_B.weight": up}
    return read_adapter(tensors, shapes), up @ down


def open_merger(quantized_artifacts: Path, precision: str | None = None) -> WeightMerger:
    manifest = Manifest.load(quantized_artifacts)
    graphs = manifest.graphs
    if precision:
        graphs = GraphSet("kv", "float32", None, (("transformer", precision),))
    return WeightMerger(quantized_artifacts, manifest, graphs)


def dequantized(merger: WeightMerger, layer: QuantizedLinear, adapters: Any) -> NDArray[Any]:
    contents = {name: content() for name, content in merger.contents(adapters).items()}
    if layer.format == "fp8":
        return dequantize_fp8(contents[NAME], layer.weight_scale)
    scales = contents[NAME + BLOCK_SCALES]
    return dequantize_nvfp4(contents[NAME], scales, layer.weight_scale)


@pytest.mark.parametrize(("precision", "kept"), [("fp8", 0.97), ("nvfp4", 0.85)])
def test_a_quantized_merge_keeps_a_small_change(
    precision: str, kept: float, quantized_artifacts: Path, own: NDArray[Any], monkeypatch: Any
) -> None:
    """By its projection on the change that was meant; from the numbers' grid much of it is lost."""
    layer = load_quantized(quantized_artifacts, "transformer", precision).linears[NAME]
    adapter, change = adapter_of(quantized_artifacts, 0.05 * float(own.std()))

    def share(before: NDArray[Any], after: NDArray[Any]) -> float:
        return float(((after - before) * change).sum() / (change**2).sum())

    merger = open_merger(quantized_artifacts, precision)
    after = dequantized(merger, layer, [(adapter, 1.0)])
    assert kept < share(layer.dequantize(), after) < 2 - kept

    grid = layer.dequantize()
    monkeypatch.setattr(merge, "map_weight", lambda _ref: grid)
    from_grid = share(grid, dequantized(merger, layer, [(adapter, 1.0)]))
    assert from_grid < share(layer.dequantize(), after)


def test_what_does_not_fit_under_the_scale_is_told(
    quantized_artifacts: Path, own: NDArray[Any], caplog: pytest.LogCaptureFixture
) -> None:
    for precision, size, warned in (("fp8", 0.1, False), ("fp8", 3.0, True), ("nvfp4", 3.0, True)):
        adapter, _ = adapter_of(quantized_artifacts, size * float(np.abs(own).max()))
        merger = open_merger(quantized_artifacts, precision)
        [content() for content in merger.contents([(adapter, 1.0)]).values()]
        caplog.clear()
        merger.warn()
        merger.warn()
        assert [NAME in record.message for record in caplog.records] == [True] * warned


def test_weights_that_are_dequantized_ones_are_warned_of(
    quantized_artifacts: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    layer = load_quantized(quantized_artifacts, "transformer", "fp8").linears[NAME]
    adapter, _ = adapter_of(quantized_artifacts, 0.01)
    merger = open_merger(quantized_artifacts, "fp8")
    with caplog.at_level(logging.WARNING):
        merger.contents([(adapter, 1.0)])[NAME]()
        assert not caplog.records
        grid = layer.dequantize()
        monkeypatch.setattr(merge, "map_weight", lambda _ref: grid)
        other = open_merger(quantized_artifacts, "fp8")
        other.contents([(adapter, 1.0)])[NAME]()
        other.contents([(adapter, 0.5)])[NAME]()
    assert [("dequantized" in x.message) for x in caplog.records] == [True]
