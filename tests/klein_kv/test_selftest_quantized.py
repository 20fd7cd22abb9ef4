"""`klein-kv selftest` on quantized engines: they pass, and a scale that is off does not.

ONNX Runtime stands for TensorRT where it computes the graphs on a CPU (fp8), the simulation in
torch where it does not (nvfp4 in bfloat16).
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from klein_kv import selftest
from klein_kv.engines import build
from klein_kv.engines.manifest import EngineManifest
from klein_kv.export.artifact_weights import component_weights
from klein_kv.export.graph_files import save_quantized_graphs
from klein_kv.export.quantization_recipe import QuantizationRecipe
from klein_kv.export.quantize import quantize_artifacts
from klein_kv.export.samples import make_samples
from klein_kv.manifest import Manifest
from klein_kv.quantization import QuantizedLinear
from klein_kv.quantized_ops import QuantizedOps
from klein_kv.quantized_weights import load_quantized
from klein_kv.runtime.backends.trt.backend import TrtBackend
from klein_kv.runtime.selftest_report import Report
from klein_kv.runtime.torch_backend import TorchBackend
from klein_kv.runtime.torch_graphs import (
    COMPONENTS,
    Graph,
    text_encoder_graph,
    transformer_graph,
)
from klein_kv.selftest import run_selftest
from klein_kv.signature import KV_STATIC_FLOAT8, GraphSet
from tests.runtime.fake_cuda import FakeCuda
from tests.runtime.fake_engines import make_engines
from tests.runtime.fake_trt import FakeTrt
from tests.runtime.kept_backends import Kept, keep_references

STEPS = ("encode_references", "first_step", "cached_step")
NETWORKS = ("text_encoder", *STEPS)
VALUES = "transformer_blocks.0.attn.to_v.weight"
"""A layer whose scale the keys and values of the first block show at once."""

FP8_REFERENCE = "onnxruntime on a CPU, float32, fp8"


@pytest.fixture(autouse=True)
def _kept_references(monkeypatch: pytest.MonkeyPatch, kept: Kept) -> None:
    keep_references(monkeypatch, kept)


@pytest.fixture(scope="module")
def kept() -> Kept:
    return {}


def quantize(artifacts: Path, folder: Path, recipe: str) -> Path:
    shutil.copytree(artifacts, folder, copy_function=os.link)
    samples = make_samples(1, size=(128, 128))
    quantize_artifacts(folder, QuantizationRecipe.load(recipe), samples, text_tokens=32)
    return folder


@pytest.fixture(scope="module")
def fp8(tiny_artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(tiny_artifacts, tmp_path_factory.mktemp("fp8") / "artifacts", "fp8")


def add_engines(artifacts: Path, graphs: GraphSet, folder: Path, only: tuple[str, ...]) -> Path:
    folder.mkdir()
    loaded = EngineManifest.load(make_engines(artifacts, folder, graphs))
    replace(loaded, engines={name: loaded.engines[name] for name in only}).save(folder)
    return folder


def check_fp8(
    artifacts: Path,
    engines: Path,
    computed: Path | None = None,
    reference: Path | None = None,
) -> Report:
    """The self-test on stand-ins; `computed` holds the graphs that the "engines" were made of."""
    source = computed or artifacts

    def open_fake(artifacts: Path, manifest: Manifest, **options: Any) -> TrtBackend:
        cuda, graphs = FakeCuda(), options["graphs"]
        trt = FakeTrt(source, cuda, graphs=graphs)
        return TrtBackend(
            artifacts, manifest, engines=options["engines"], cuda=cuda.cuda, trt=trt, graphs=graphs
        )

    return run_selftest(
        artifacts,
        engines=engines,
        reference_artifacts=reference,
        tiny=False,
        open_backend=open_fake,
    )


def failures(report: Report) -> set[str]:
    return {check.name for check in report.failed}


def against(report: Report, reference: str) -> dict[str, dict[str, Any]]:
    """What was measured against a reference, by graph."""
    end = f" against {reference}"
    return {
        check.name.removeprefix("model: ").removesuffix(end): check.measured
        for check in report.checks
        if check.name.endswith(end) and check.status == "passed"
    }


def test_fp8_engines_are_compared_with_their_own_graphs(fp8: Path, tmp_path: Path) -> None:
    graphs = Manifest.load(fp8).quantized_graphs("fp8")
    engines = add_engines(fp8, graphs, tmp_path / "engines", STEPS)
    report = check_fp8(fp8, engines)
    assert failures(report) == set(), report.to_text()
    measured = against(report, FP8_REFERENCE)
    assert set(measured) == set(STEPS)
    assert all(one["norm"] < 1e-3 for one in measured.values())
    assert all(one["limit_norm"] > 0.05 for one in measured.values())


def test_fp8_engines_are_compared_with_float32_artifacts(
    fp8: Path, tiny_artifacts: Path, tmp_path: Path
) -> None:
    """Keys and values in float8 are compared by what they stand for."""
    graphs = Manifest.load(fp8).quantized_graphs("fp8", attention="fp8")
    engines = add_engines(fp8, graphs, tmp_path / "engines", NETWORKS)
    report = check_fp8(fp8, engines, reference=tiny_artifacts)
    assert failures(report) == set(), report.to_text()
    measured = against(report, "onnxruntime on a CPU, float32")
    assert set(measured) == set(NETWORKS)
    assert all(0.01 < one["norm"] < one["limit_norm"] for one in measured.values())


@pytest.fixture(scope="module")
def faulty(fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same graphs, with one weight scale that is twice what it should be."""
    folder = tmp_path_factory.mktemp("faulty") / "artifacts"
    shutil.copytree(fp8, folder)
    manifest = Manifest.load(folder)
    weights = component_weights(folder, manifest, "transformer")
    right = load_quantized(folder, "transformer", "fp8")
    layer = right.linears[VALUES]
    wrong = {**right.linears, VALUES: replace(layer, weight_scale=2 * layer.weight_scale)}
    save_quantized_graphs(
        folder,
        manifest.config,
        manifest.graphs,
        "transformer",
        weights,
        replace(right, linears=wrong),
    )
    return folder


@pytest.mark.parametrize("attention", [None, "fp8"])
def test_a_weight_scale_off_by_two_is_found(
    fp8: Path, faulty: Path, tiny_artifacts: Path, tmp_path: Path, attention: str | None
) -> None:
    """In all graphs alike, so that they agree with each other: only the reference tells."""
    graphs = Manifest.load(fp8).quantized_graphs("fp8", attention=attention)
    engines = add_engines(fp8, graphs, tmp_path / "engines", STEPS)
    named = None if attention is None else tiny_artifacts
    report = check_fp8(fp8, engines, faulty, named)
    reference = FP8_REFERENCE if named is None else "onnxruntime on a CPU, float32"
    found = {check.name: check.message for check in report.failed}
    for graph in ("encode_references", "first_step"):
        assert "v_ref.0 (norm" in found.pop(f"model: {graph} against {reference}"), report.to_text()
    assert set(found) <= {f"model: cached_step against {reference}"}, report.to_text()


# --- nvfp4, bfloat16: beyond ONNX Runtime on a CPU ---


class Simulated(TorchBackend):
    """Quantized layers as `quantized_ops` computes them, in bfloat16; the VAE as it is."""

    def __init__(
        self, artifacts: Path, manifest: Manifest, graphs: GraphSet, planted: float
    ) -> None:
        super().__init__(artifacts, manifest, device="cpu", graphs=manifest.graphs)
        self.name = "tensorrt"
        self.linears: dict[str, Mapping[str, QuantizedLinear]] = {}
        for component, name in graphs.quantized:
            linears = load_quantized(artifacts, component, name).linears
            self.linears[component] = {
                key: replace(one, weight_scale=planted * one.weight_scale) if key == VALUES else one
                for key, one in linears.items()
            }

    def _load(self, graph: str) -> Graph:
        component = COMPONENTS[graph]
        if component not in self.linears:
            return super()._load(graph)
        tensors = self._weights.tensors(graph)
        ops = QuantizedOps(tensors, torch.bfloat16, self.linears[component])
        if graph == "text_encoder":
            return text_encoder_graph(self._config, ops)
        return transformer_graph(graph, self._config, ops)


@pytest.fixture(scope="module")
def nvfp4(tiny_bf16_artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(tiny_bf16_artifacts, tmp_path_factory.mktemp("nvfp4") / "artifacts", "nvfp4")


@pytest.mark.parametrize(
    ("planted", "reference"),
    [
        (1.0, "onnxruntime on a CPU, float32"),
        (2.0, "onnxruntime on a CPU, float32"),
        (2.0, "torch on a CPU, bfloat16"),
    ],
)
def test_nvfp4_engines_are_compared_with_what_is_not_quantized(
    nvfp4: Path, tiny_artifacts: Path, tmp_path: Path, planted: float, reference: str
) -> None:
    """With float32 artifacts where they are named, else with torch on the artifacts' weights."""
    graphs = Manifest.load(nvfp4).quantized_graphs("nvfp4")
    engines = add_engines(nvfp4, graphs, tmp_path / "engines", NETWORKS)

    def open_simulated(artifacts: Path, manifest: Manifest, **options: Any) -> Simulated:
        assert options["graphs"] == graphs
        return Simulated(artifacts, manifest, options["graphs"], planted)

    report = run_selftest(
        nvfp4,
        engines=engines,
        reference_artifacts=tiny_artifacts if reference.endswith("float32") else None,
        tiny=False,
        open_backend=open_simulated,
    )
    found = {f"model: {graph} against {reference}" for graph in ("encode_references", "first_step")}
    assert failures(report) == (found if planted == 2 else set()), report.to_text()
    measured = against(report, reference)
    assert measured["text_encoder"]["norm"] > 0.05
    if planted == 1:
        assert 0.1 < measured["encode_references"]["norm"] < 0.25


# --- the tiny model ---


def test_the_tiny_model_is_of_the_same_kind(
    tiny_bf16_artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantized and built by the real builder, which needs no GPU; one graph, for time's sake."""
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(build, "chosen_graphs", lambda *_: ["encode_references"])
    artifacts = shutil.copytree(tiny_bf16_artifacts, tmp_path / "bf16", copy_function=os.link)
    like = EngineManifest(
        module="tensorrt_rtx",
        version="0",
        target="sm120",
        sm=120,
        precision="fp8",
        weights="shared",
        recipe="default",
        engines={},
        kv_dtype=KV_STATIC_FLOAT8,
        attention="fp8",
    )
    assert selftest._quantize_tiny(artifacts, "fp8")["layers"]["transformer"] == 16
    found: list[tuple[Path, EngineManifest]] = []
    selftest._build_tiny(artifacts, like, found)
    kinds = [(x.precision, x.kv_dtype, x.attention) for _, x in found]
    assert kinds == [("fp8", KV_STATIC_FLOAT8, "fp8")]
