"""Quantized graphs: what ONNX Runtime computes on them, and what they are at the released sizes.

Those whose keys, values and attention stay as they are: tests/runtime/test_quantized.py.
"""

import collections
import functools
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from klein_kv.artifacts.attention_scales import AttentionScales, attention_scales, block_names
from klein_kv.artifacts.config import ModelConfig, tensor_bytes
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.numbers import QuantizedLinear, is_block_linear
from klein_kv.artifacts.positions import grid_ids, reference_ids, text_ids
from klein_kv.artifacts.quantized_weights import QuantizedComponent, load_quantized
from klein_kv.artifacts.signature import GraphSet, KVFormat, kv_names, quantized_graph_sets
from klein_kv.artifacts.weights import WeightRef, graph_weights, map_weight
from klein_kv.errors import ArtifactError, RequestError
from klein_kv.export.checks.artifact_weights import component_weights
from klein_kv.export.checks.compare import compare
from klein_kv.export.checks.quality import measure_quality
from klein_kv.export.checks.samples import make_samples
from klein_kv.export.graphs.graph_files import save_quantized_graphs
from klein_kv.export.graphs.transformer_graphs import (
    text_encoder_graph,
    transformer_graph,
)
from klein_kv.export.quantization.quantization_recipe import QuantizationRecipe
from klein_kv.export.quantization.quantize import quantize_artifacts
from klein_kv.networks.quantized_torch_ops import QuantizedOps, round_to_fp8
from klein_kv.networks.text_encoder import text_encoder_parameters
from klein_kv.networks.torch_ops import TorchOps
from klein_kv.networks.transformer import (
    StepInputs,
    denoise,
    denoise_with_references,
    encode_references,
    transformer_parameters,
)
from tests.klein_configs import KLEIN_4B, KLEIN_9B

Arrays = dict[str, NDArray[Any]]
TOLERANCE = 4e-3
"""Relative error of a tensor by its norm. Measured: 3e-5 on one CPU, 1.2e-3 on another; numbers
that round otherwise in the graph than in the simulation are all the difference there is."""


class Simulation(QuantizedOps):
    """The softmax of attention in float8 stays as it is, as in the graphs."""

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.attention_scales is not None:
            s = self.attention_scales[self._block]
            q, k, v = round_to_fp8(q, s.q), round_to_fp8(k, s.k), round_to_fp8(v, s.v)
        return TorchOps.attention(self, q, k, v, mask)


@dataclass(frozen=True, slots=True)
class Quantized:
    """The tiny float32 artifacts in fp8, and the transformer's own and quantized tensors."""

    folder: Path
    manifest: Manifest
    weights: dict[str, torch.Tensor]
    layers: QuantizedComponent
    scales: dict[str, AttentionScales]

    def run(self, graphs: GraphSet, graph: str, inputs: Arrays) -> list[NDArray[Any]]:
        session = onnxruntime.InferenceSession(
            self.folder / graphs.files[graph], providers=["CPUExecutionProvider"]
        )
        outputs: list[NDArray[Any]] = session.run(None, inputs)
        return outputs

    def simulate(self, graphs: GraphSet, inputs: Arrays) -> list[torch.Tensor]:
        """What `first_step` or `plain_step` gives."""
        net = self.manifest.config.transformer
        scales = self.scales if graphs.attention is not None else None
        ops = Simulation(self.weights, torch.float32, self.layers.linears, scales)
        x = {name: torch.from_numpy(array) for name, array in inputs.items()}
        refs = [x.pop(name) for name in ("ref_hidden_states", "ref_ids")]
        step = StepInputs(**x)
        if graphs.variant == "plain":
            return list(denoise_with_references(ops, net, step, *refs))
        kv = encode_references(ops, net, *refs)
        kv = [round_to_fp8(y, scale) for y, scale in zip(kv, self.kv_scales(), strict=True)]
        return [*denoise(ops, net, step, kv), *kv]

    def kv_scales(self) -> list[float]:
        names = block_names(self.manifest.config.transformer)
        return [scale for name in names for scale in (self.scales[name].k, self.scales[name].v)]


def load(folder: Path) -> Quantized:
    manifest = Manifest.load(folder)
    layers = load_quantized(folder, "transformer", "fp8")
    refs = component_weights(folder, manifest, "transformer")
    scales = attention_scales(manifest.config.transformer, layers.attention, refs)
    weights = {name: torch.from_numpy(map_weight(ref).copy()) for name, ref in refs.items()}
    return Quantized(folder, manifest, weights, layers, scales)


@pytest.fixture(scope="module")
def fp8(quantized_artifacts: Path) -> Quantized:
    return load(quantized_artifacts)


def step_inputs(config: ModelConfig) -> tuple[Arrays, Arrays]:
    """Inputs of a step, and of the references, random but for time and positions."""
    rng, net = np.random.default_rng(5), config.transformer

    def tokens(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape, dtype=np.float32)

    step = {
        "hidden_states": tokens(2, 64, net.in_channels),
        "encoder_hidden_states": tokens(2, 20, net.joint_attention_dim),
        "timestep": np.array([700], np.float32),
        "sigma_step": np.array([-0.2], np.float32),
        "img_ids": grid_ids(8, 8),
        "txt_ids": text_ids(20),
    }
    refs = {
        "ref_hidden_states": tokens(1, 48, net.in_channels),
        "ref_ids": reference_ids([(6, 8)]),
    }
    return step, refs


def unpacked(kv: list[NDArray[Any]], scales: list[float]) -> list[NDArray[np.float32]]:
    return [
        x.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(scale)
        for x, scale in zip(kv, scales, strict=True)
    ]


@pytest.mark.parametrize("attention", [None, "fp8"])
def test_graphs_compute_what_the_simulation_computes(fp8: Quantized, attention: str | None) -> None:
    graphs = fp8.manifest.choose_graphs(KVFormat.FP8_CONSTANT, "fp8", attention)
    step, refs = step_inputs(fp8.manifest.config)
    got = fp8.run(graphs, "first_step", step | refs)
    simulated = fp8.simulate(graphs, step | refs)
    for one, expected in zip(got[:2], simulated[:2], strict=True):
        assert compare(one, expected).relative < TOLERANCE
    packed = got[2:]
    for one, expected in zip(unpacked(packed, fp8.kv_scales()), simulated[2:], strict=True):
        # What lies in the middle of two numbers may be rounded to either, in every layer.
        assert (one != np.asarray(expected)).mean() < 0.03

    # The other two graphs give the same bits, keys and values handed on as they are.
    encoded = fp8.run(graphs, "encode_references", refs)
    for one, same in zip(encoded, packed, strict=True):
        np.testing.assert_array_equal(one, same)
    cached = fp8.run(graphs, "cached_step", step | keys_and_values(encoded))
    for one, same in zip(cached, got[:2], strict=True):
        np.testing.assert_allclose(one, same, rtol=0, atol=1e-6)


def keys_and_values(kv: list[NDArray[Any]]) -> dict[str, Any]:
    """As ONNX Runtime takes float8 in: it hands it out as bytes."""
    typed = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type
    values = [typed(x, ir.DataType.FLOAT8E4M3FN.value) for x in kv]
    return dict(zip(kv_names(len(kv) // 2), values, strict=True))


def test_cached_step_runs_on_no_references_in_float8(fp8: Quantized) -> None:
    graphs = fp8.manifest.choose_graphs(precision="fp8", attention="fp8")
    step, _ = step_inputs(fp8.manifest.config)
    net = fp8.manifest.config.transformer
    empty = np.zeros((1, 0, net.num_attention_heads, net.attention_head_dim), np.uint8)
    kv = keys_and_values([empty] * (2 * net.num_blocks))
    prediction, _ = fp8.run(graphs, "cached_step", step | kv)
    assert np.isfinite(prediction).all()


def test_plain_weights_have_one_set(plain_artifacts: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain_artifacts, tmp_path / "artifacts"))
    samples = make_samples(2, size=(128, 128))
    quantize_artifacts(folder, QuantizationRecipe.load("fp8"), samples, text_tokens=32)
    plain = load(folder)
    graphs = plain.manifest.choose_graphs(precision="fp8")
    step, refs = step_inputs(plain.manifest.config)
    expected = plain.simulate(graphs, step | refs)[0]
    got = plain.run(graphs, "plain_step", step | refs)
    assert compare(got[0], expected).relative < TOLERANCE
    with pytest.raises(RequestError, match="plain model has no graphs with keys and values in"):
        plain.manifest.choose_graphs(precision="fp8", attention="fp8")
    report = measure_quality(folder, "fp8", samples[:1], text_tokens=32)
    assert not report.failed
    steps = [f"latents after step {i}" for i in range(1, 5)]
    assert list(report.ends) == ["text embeddings", *steps]


def test_files_of_a_precision(fp8: Quantized) -> None:
    files = set(fp8.manifest.precision_files("fp8"))
    for kv_dtype, attention in (
        (None, None),
        (KVFormat.FP8_CONSTANT, None),
        (KVFormat.FP8_CONSTANT, "fp8"),
    ):
        graphs = fp8.manifest.choose_graphs(kv_dtype, "fp8", attention)
        for graph, file in graphs.files.items():
            assert file in fp8.manifest.files
            assert (file in files) == (not graph.startswith("vae_"))
    first = graph_weights(
        fp8.folder, fp8.manifest.choose_graphs(precision="fp8").files["first_step"]
    )
    name = "transformer_blocks.0.attn.to_q.weight"
    assert first[name] == fp8.layers.linears[name].weight
    assert first["x_embedder.weight"].path.name != "fp8.safetensors"
    with pytest.raises(ArtifactError, match="hold no precision 'int8'"):
        fp8.manifest.choose_graphs(precision="int8")


def invented(config: ModelConfig, precision: str, component: str) -> tuple[Any, Any]:
    """Weights and quantized layers of a released size, in files that do not exist."""
    shapes = (
        transformer_parameters(config.transformer)
        if component == "transformer"
        else text_encoder_parameters(config.text_encoder)
    )
    own = Path("/none/own.safetensors")
    weights = {
        name: WeightRef(own, 0, tensor_bytes("bfloat16", shape), "bfloat16", shape)
        for name, shape in shapes.items()
    }
    linears = {}
    path = Path(f"/none/{precision}.safetensors")
    dtype = "float4_e2m1fn" if precision == "nvfp4" else "float8_e4m3fn"
    for i, (name, shape) in enumerate(shapes.items()):
        if is_block_linear(name, shape):
            steps = (shape[0], shape[1] // 16)
            block_scales = WeightRef(path, 0, tensor_bytes("uint8", steps), "float8_e4m3fn", steps)
            linears[name] = QuantizedLinear(
                precision.removesuffix("-weight-only"),
                WeightRef(path, 0, tensor_bytes(dtype, shape), dtype, shape),
                0.001 + i * 1e-6,
                block_scales if precision == "nvfp4" else None,
                None if precision == "fp8-weight-only" else 0.01 + i * 1e-5,
            )
    return weights, QuantizedComponent(linears)


@functools.cache
def released_graph(config: ModelConfig, precision: str, graph: str, number: int = 0) -> ir.Model:
    """A graph of set `number`."""
    component = "text_encoder" if graph == "text_encoder" else "transformer"
    weights, layers = invented(config, precision, component)
    sets = quantized_graph_sets("kv", "bfloat16", {component: precision})
    if component == "text_encoder":
        return text_encoder_graph(config, "bfloat16", weights, layers.linears)
    scales = dict.fromkeys(block_names(config.transformer), AttentionScales(0.05, 0.04, 0.03))
    return transformer_graph(graph, config, sets[number], weights, layers.linears, scales)


def external(model: ir.Model) -> dict[str, ir.ExternalTensor]:
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    return {name: x for name, x in tensors.items() if isinstance(x, ir.ExternalTensor)}


@pytest.mark.parametrize(
    ("config", "precision", "most"),
    [(KLEIN_9B, "fp8", 0.53), (KLEIN_9B, "nvfp4", 0.32), (KLEIN_4B, "nvfp4", 0.32)],
)
def test_bytes_that_the_steps_bind(config: ModelConfig, precision: str, most: float) -> None:
    """Against bf16; what is not a linear layer of a block stays bf16 and counts too."""
    shapes = transformer_parameters(config.transformer)
    before = sum(tensor_bytes("bfloat16", shape) for shape in shapes.values())
    bound = external(released_graph(config, precision, "first_step"))
    assert sum(tensor.nbytes for tensor in bound.values()) / before <= most
    # All graphs of a set bind the same tensors: one copy serves them.
    for graph in ("cached_step", "encode_references"):
        others = external(released_graph(config, precision, graph))
        assert set(others) <= set(bound)
        assert all(others[name].shape == bound[name].shape for name in others)


@pytest.mark.parametrize("precision", ["fp8", "nvfp4", "fp8-weight-only"])
def test_every_linear_of_the_blocks_is_quantized_and_nothing_else(precision: str) -> None:
    model = released_graph(KLEIN_9B, precision, "cached_step")
    dtypes = collections.Counter(tensor.dtype for tensor in external(model).values())
    # 12 per double block; a single block reads its fused projection in 5 ranges of rows.
    layers = 8 * 2 * (4 + 3) + 24 * 6
    numbers = ir.DataType.FLOAT4E2M1 if precision == "nvfp4" else ir.DataType.FLOAT8E4M3FN
    own = 9 + 8 * 4 + 24 * 2
    expected = {numbers: layers, ir.DataType.BFLOAT16: own}
    if precision == "nvfp4":
        expected[ir.DataType.FLOAT8E4M3FN] = layers  # block scales
    assert dtypes == expected
    # The last block takes keys and values of the text, and nothing else of it, by themselves.
    assert sum(node.op_type == "Gemm" for node in model.graph) == layers + 2 + 9
    ops = collections.Counter(node.op_type for node in model.graph)
    # Layers that read the same activation share its rounding where their scales agree.
    assert ops["QuantizeLinear"] <= layers
    assert (ops["TRT_FP4DynamicQuantize"] > 0) == (precision == "nvfp4")
    if precision == "fp8-weight-only":
        assert ops["QuantizeLinear"] == 0
        assert ops["DequantizeLinear"] == layers + 2


def test_equal_input_scales_share_one_rounding() -> None:
    weights, layers = invented(KLEIN_9B, "fp8", "transformer")
    linears = {name: replace(x, input_scale=0.5) for name, x in layers.linears.items()}
    graphs = GraphSet("kv", "bfloat16", None, (("transformer", "fp8"),))
    model = transformer_graph("cached_step", KLEIN_9B, graphs, weights, linears, {})
    # Per double block and stream: q, k, v; output; gate and up; down. Per single block: in; out;
    # the last block's text.
    count = sum(node.op_type == "QuantizeLinear" for node in model.graph)
    assert count == 8 * 2 * 4 + 24 * 2 + 1


def test_attention_in_float8_rounds_queries_keys_and_values() -> None:
    model = released_graph(KLEIN_9B, "fp8", "first_step", number=2)
    attentions = [node for node in model.graph if node.op_type == "Attention"]
    assert len(attentions) == 63
    for node in attentions:
        for value in node.inputs[:3]:
            assert value.producer().inputs[0].producer().op_type == "DequantizeLinear"
    kv = [value for value in model.graph.outputs if "_ref." in str(value.name)]
    assert len(kv) == 64
    assert {value.dtype for value in kv} == {ir.DataType.FLOAT8E4M3FN}


def test_nvfp4_graphs_are_not_written_in_float32(tmp_path: Path) -> None:
    weights, layers = invented(KLEIN_9B, "nvfp4", "transformer")
    graphs = GraphSet("kv", "float32")
    save_quantized_graphs(tmp_path, KLEIN_9B, graphs, "transformer", weights, layers)
    assert not list(tmp_path.iterdir())
    quantized = replace(graphs, quantized=(("transformer", "nvfp4"),))
    with pytest.raises(ArtifactError, match="nvfp4 graphs are for TensorRT"):
        transformer_graph("cached_step", KLEIN_9B, quantized, weights, layers.linears, {})
