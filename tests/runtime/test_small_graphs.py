"""The graphs beside the networks', on every backend that runs them, against numpy."""

import os
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from klein_kv.artifacts.manifest import MANIFEST, Manifest
from klein_kv.artifacts.numbers import quantize_fp8
from klein_kv.artifacts.signature import SMALL_GRAPH_FILES, GraphSet
from klein_kv.runtime.backends.backend import DeviceContent
from klein_kv.runtime.backends.ort.backend import OrtBackend
from tests.runtime.backends.fake_engines import random_inputs
from tests.runtime.lora.test_lora_engines import Card

SIZES = {"rows": 24, "columns": 40, "rank": 16}


def merge_inputs(graph: str, config: Any) -> dict[str, np.ndarray]:
    signature = GraphSet("kv", "float32").signature(graph, config)
    inputs = random_inputs(signature, **SIZES)
    inputs["largest_before"] = np.array([2.5], np.float32)
    if "scale" in inputs:
        inputs["scale"] = np.array([0.0123], np.float32)
    return inputs


def test_merge_lora_is_float32_arithmetic(any_ours):
    backend = any_ours.backend
    inputs = merge_inputs("merge_lora", any_ours.config)
    for more in (0, 100):
        inputs["largest_before"] += more
        outputs = backend.run("merge_lora", {k: backend.upload(x) for k, x in inputs.items()})
        expected = inputs["weight"] + inputs["up"] @ inputs["down"]
        np.testing.assert_allclose(backend.download(outputs["merged"]), expected, atol=1e-5)
        largest = max(float(np.abs(expected).max()), float(inputs["largest_before"][0]))
        np.testing.assert_allclose(backend.download(outputs["largest"]), [largest], rtol=1e-6)
    assert backend.graph_memory("merge_lora").weights == {}
    backend.release("merge_lora")


def test_merge_lora_fp8_rounds_as_numpy_does(tiny_artifacts):
    manifest = Manifest.load(tiny_artifacts)
    graphs = GraphSet("kv", "float32", quantized=(("transformer", "fp8"),))
    backend = OrtBackend(tiny_artifacts, manifest, 1, graphs)
    inputs = merge_inputs("merge_lora_fp8", manifest.config)
    inputs["up"] *= 0.01  # so that sums in another order are the same here
    outputs = backend.run("merge_lora_fp8", {k: backend.upload(x) for k, x in inputs.items()})
    merged = inputs["weight"] + inputs["up"] @ inputs["down"]
    expected = quantize_fp8(merged, float(inputs["scale"][0]))
    got = backend.download(outputs["merged"])
    assert got.dtype == expected.dtype
    assert (got.view(np.uint8) != expected.view(np.uint8)).mean() < 2e-3
    np.testing.assert_allclose(got.astype(np.float32), expected.astype(np.float32), rtol=0.13)


@pytest.mark.parametrize("graph", SMALL_GRAPH_FILES)
def test_files_are_whole_graphs(graph, tiny_bf16_artifacts):
    path = tiny_bf16_artifacts / SMALL_GRAPH_FILES[graph]
    onnx.checker.check_model(path, full_check=True)
    model = ir.load(path)
    assert model.graph.name == graph
    assert sum(x.const_value.nbytes for x in model.graph.initializers.values()) < 100


def test_a_folder_from_before_them_opens_and_merges_on_the_host(tiny_artifacts, tmp_path):
    folder = tmp_path / "artifacts"
    shutil.copytree(tiny_artifacts, folder, copy_function=os.link)
    manifest = Manifest.load(folder)
    small = tuple(file.removesuffix("onnx") for file in SMALL_GRAPH_FILES.values())
    files = {k: record for k, record in manifest.files.items() if not k.startswith(small)}
    assert len(manifest.files) - len(files) == 2 * len(SMALL_GRAPH_FILES)
    for name in manifest.files.keys() - files.keys():
        (folder / name).unlink()
    (folder / MANIFEST).unlink()
    replace(manifest, files=files).save(folder)
    old = Manifest.load(folder)
    assert old.held_graphs(old.graphs) == old.graphs.files
    card = Card(folder, tmp_path)
    contents = card.merger().contents(card.one())
    assert not any(isinstance(content, DeviceContent) for content in contents.values())
    card.backend.replace_weights(contents)
    held = card.held()
    for name, array in card.expected(card.one()).items():
        np.testing.assert_array_equal(held[name], array)
