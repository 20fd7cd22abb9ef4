"""The graphs of the released shapes, written without weights: small, plain, and nothing twice."""

import collections
import functools
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from klein_kv.artifacts.config import ITEM_SIZE, ModelConfig
from klein_kv.artifacts.signature import GRAPH_FILES, GraphSet, KVFormat, make_signature
from klein_kv.artifacts.weights import WeightRef, read_header
from klein_kv.export.graphs.transformer_graphs import text_encoder_graph, transformer_graph
from klein_kv.networks.text_encoder import text_encoder_parameters
from klein_kv.networks.transformer import transformer_parameters
from tests.klein_configs import KLEIN_4B, KLEIN_9B

TYPES = {
    "float32": "FLOAT",
    "float16": "FLOAT16",
    "bfloat16": "BFLOAT16",
    "float8_e4m3fn": "FLOAT8E4M3FN",
    "int64": "INT64",
}
SHALLOW = replace(
    KLEIN_4B, transformer=replace(KLEIN_4B.transformer, num_layers=2, num_single_layers=3)
)
CASES = {"bfloat16": KLEIN_9B, "float16": SHALLOW, "float32": SHALLOW}
STEP_GRAPHS = ["encode_references", "first_step", "cached_step"]
FLOAT8 = " with float8 K/V"
GRAPHS = [*STEP_GRAPHS, *(graph + FLOAT8 for graph in STEP_GRAPHS), "text_encoder"]


def invented_weights(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> dict[str, WeightRef]:
    """Tensors one after the other in a file that does not exist."""
    refs, offset = {}, 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape, start=ITEM_SIZE[dtype])
        refs[name] = WeightRef(Path("/none/weights.safetensors"), offset, nbytes, dtype, shape)
        offset += nbytes
    return refs


def weights_of(graph: str, config: ModelConfig, dtype: str) -> dict[str, WeightRef]:
    if graph == "text_encoder":
        return invented_weights(text_encoder_parameters(config.text_encoder), dtype)
    return invented_weights(transformer_parameters(config.transformer), dtype)


def kv_dtype_of(graph: str) -> tuple[str, str | None]:
    """The graph's own name, and the type of its keys and values."""
    return graph.removesuffix(FLOAT8), KVFormat.FP8_PER_HEAD if graph.endswith(FLOAT8) else None


@functools.cache
def built(graph: str, dtype: str) -> ir.Model:
    """A graph of the configuration that `CASES` has for this type."""
    config = CASES[dtype]
    weights = weights_of(graph, config, dtype)
    if graph == "text_encoder":
        return text_encoder_graph(config, dtype, weights)
    name, kv_dtype = kv_dtype_of(graph)
    return transformer_graph(name, config, GraphSet("kv", dtype, kv_dtype), weights)


each_type = pytest.mark.parametrize("dtype", CASES)
each_graph = pytest.mark.parametrize("graph", GRAPHS)


def external(model: ir.Model) -> dict[str, ir.ExternalTensor]:
    return {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
    }


def nodes(model: ir.Model, op_type: str) -> Iterator[ir.Node]:
    return (node for node in model.graph if node.op_type == op_type)


# --- size ---


@each_type
@pytest.mark.parametrize(
    ("graph", "most"),
    [
        ("cached_step", 80),
        ("encode_references", 55),
        ("first_step", 125),
        ("cached_step" + FLOAT8, 86),
        ("encode_references" + FLOAT8, 71),
        ("first_step" + FLOAT8, 147),
    ],
)
def test_nodes_per_block(graph: str, most: int, dtype: str) -> None:
    """Measured for 9B: cached_step 67.7 in bfloat16, 68.7 in float16, 44.8 in float32."""
    around = 0 if dtype == "bfloat16" else 150  # what is not in a block
    count = CASES[dtype].transformer.num_blocks
    assert len(built(graph, dtype).graph) <= most * count + around


@each_type
@each_graph
def test_nothing_large_is_inline(graph: str, dtype: str) -> None:
    inline = [
        value.const_value
        for value in built(graph, dtype).graph.initializers.values()
        if not isinstance(value.const_value, ir.ExternalTensor)
    ]
    # The largest are tables of positions; the text encoder's are one mebibyte each.
    assert max(tensor.nbytes for tensor in inline) <= 1 << 20
    assert sum(tensor.nbytes for tensor in inline) < 3e6
    assert len({(str(t.dtype), tuple(t.shape), t.tobytes()) for t in inline}) == len(inline)


@each_type
def test_attention_is_one_operator(dtype: str) -> None:
    op_type = "MultiHeadAttention" if dtype == "float32" else "Attention"
    count = CASES[dtype].transformer.num_blocks
    expected = {"cached_step": count, "first_step": 2 * count - 1, "encode_references": count - 1}
    for graph, number in expected.items():
        assert len(list(nodes(built(graph, dtype), op_type))) == number
    text = [node.attributes for node in nodes(built("text_encoder", dtype), "Attention")]
    assert len(text) == 27
    heads = {(x["q_num_heads"].value, x["kv_num_heads"].value) for x in text}
    assert heads == {(32, 8)}


# --- the contract ---


@each_type
@each_graph
def test_inputs_and_outputs_are_the_signatures(graph: str, dtype: str) -> None:
    model = built(graph, dtype).graph
    own, kv_dtype = kv_dtype_of(graph)
    signature = make_signature(own, CASES[dtype], dtype, kv_dtype)
    for values, specs in ((model.inputs, signature.inputs), (model.outputs, signature.outputs)):
        got = [
            (v.name, v.dtype.name, tuple(a if isinstance(a, int) else a.value for a in v.shape))
            for v in values
        ]
        assert got == [(spec.name, TYPES[spec.dtype], spec.shape) for spec in specs]
    assert model.opset_imports[""] == 23
    ours = {"", "com.microsoft"} if dtype == "float32" and graph != "text_encoder" else {""}
    assert {node.domain for node in model} <= ours  # TensorRT knows no other
    names = [node.name for node in model]
    assert len(set(names)) == len(names)
    used = {value.name for node in model for value in node.inputs if value is not None}
    assert set(model.initializers) <= used


# --- weights ---


@each_type
@each_graph
def test_linear_layers_use_the_checkpoints_layout(graph: str, dtype: str) -> None:
    """Gemm(transB=1) on a weight as it lies in the file, or on a range of its rows."""
    weights = weights_of(graph, CASES[dtype], dtype)
    stored = external(built(graph, dtype))
    linear = list(nodes(built(graph, dtype), "Gemm"))
    assert linear
    for node in linear:
        assert {k: v.value for k, v in node.attributes.items()} == {"transB": 1}
        assert len(node.inputs) == 2
        assert node.inputs[1].name in stored
    for label, tensor in stored.items():
        base, _, part = label.partition("[")
        ref = weights[base]
        if part:
            ref = ref.rows(*map(int, part.rstrip("]").split(":")))
        assert (tensor.offset, tensor.length) == (ref.offset, ref.nbytes)
        assert tuple(tensor.shape) == ref.shape
        assert tensor.location == "weights.safetensors"


@each_type
@pytest.mark.parametrize("graph", ["first_step", "cached_step"])
def test_every_weight_is_used_once_and_whole(graph: str, dtype: str) -> None:
    weights = weights_of(graph, CASES[dtype], dtype)
    tensors = external(built(graph, dtype)).values()
    ranges = sorted({(tensor.offset, tensor.offset + tensor.length) for tensor in tensors})
    assert ranges[0][0] == 0
    assert all(end == begin for (_, end), (begin, _) in pairwise(ranges))
    assert ranges[-1][1] == sum(ref.nbytes for ref in weights.values())


@each_type
def test_nothing_after_what_is_read_last(dtype: str) -> None:
    """Keys and values of the references; the text encoder's last hidden state."""
    net = CASES[dtype].transformer
    used = set(external(built("encode_references", dtype)))
    last = f"single_transformer_blocks.{net.num_single_layers - 1}.attn"
    dim = net.inner_dim
    assert {label for label in used if label.startswith(last)} == {
        f"{last}.norm_k.weight",
        f"{last}.to_qkv_mlp_proj.weight[{dim}:{2 * dim}]",
        f"{last}.to_qkv_mlp_proj.weight[{2 * dim}:{3 * dim}]",
    }
    unread = ("context_embedder", "norm_out", "proj_out", "double_stream_modulation_txt")
    assert not any(label.startswith(unread) or ".add_" in label for label in used)
    assert not any("ff_context" in label for label in used)
    text = set(external(built("text_encoder", dtype)))
    assert {int(label.split(".")[2]) for label in text if ".layers." in label} == set(range(27))
    assert not any(label.startswith(("lm_head", "model.norm")) for label in text)


# --- modulation ---


@each_type
@pytest.mark.parametrize("graph", STEP_GRAPHS)
def test_modulations_are_vectors(graph: str, dtype: str) -> None:
    """None is blended or spread over tokens: shift, scale and gate stay [D] up to their use."""
    model, dim = built(graph, dtype), CASES[dtype].transformer.inner_dim
    splits = list(nodes(model, "Split"))
    kinds = 2 if graph == "encode_references" else 4
    assert len(splits) == kinds + 2 * (graph == "first_step")
    for split in splits:
        reshape = split.inputs[0].producer()
        assert reshape.inputs[1].const_value.numpy().tolist() == [-1]
        source = reshape.inputs[0].producer()
        assert source.op_type == "Gemm"
        weight = source.inputs[1]
        assert "modulation" in weight.name or weight.name == "norm_out.linear.weight"
        assert weight.shape[0] == len(split.outputs) * dim
        for part in split.outputs:
            for node, at in part.uses():
                if node.op_type == "Add":  # 1 + scale
                    assert np.prod(node.inputs[1 - at].shape or (1,)) == 1
                    uses = node.outputs[0].uses()
                    assert {(n.op_type, i) for n, i in uses} == {("LayerNormalization", 1)}
                else:
                    assert (node.op_type, at) in {("LayerNormalization", 2), ("Mul", 1)}


@each_type
def test_one_modulation_per_kind_and_stream(dtype: str) -> None:
    gemms = nodes(built("cached_step", dtype), "Gemm")
    used = collections.Counter(node.inputs[1].name for node in gemms)
    # The last block takes keys and values of the text, and nothing else of it, by themselves.
    net = CASES[dtype].transformer
    project = f"single_transformer_blocks.{net.num_single_layers - 1}.attn.to_qkv_mlp_proj.weight"
    dim = net.inner_dim
    twice = {f"{project}[{dim}:{2 * dim}]", f"{project}[{2 * dim}:{3 * dim}]"}
    assert {name for name, times in used.items() if times != 1} == twice
    assert sum("modulation" in name for name in used) == 3


# --- what other programs make of them ---


@each_type
@each_graph
def test_types_and_shapes_fit(graph: str, dtype: str) -> None:
    """onnx's own inference, in its strict mode, from inputs to outputs."""
    name, kv_dtype = kv_dtype_of(graph)
    signature = make_signature(name, CASES[dtype], dtype, kv_dtype)
    proto = ir.to_proto(built(graph, dtype))
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(
        proto, check_type=True, strict_mode=True, data_prop=True
    )
    for value, spec in zip(inferred.graph.output, signature.outputs, strict=True):
        got = value.type.tensor_type
        assert got.elem_type == onnx.TensorProto.DataType.Value(TYPES[spec.dtype])
        if got.HasField("shape") and dtype != "float32":
            assert len(got.shape.dim) == len(spec.shape)


@pytest.mark.parametrize("graph", GRAPH_FILES)
@pytest.mark.parametrize("artifacts", ["tiny_artifacts", "tiny_bf16_artifacts"])
def test_checker_and_readers(
    artifacts: str, graph: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(artifacts)
    folder = Path(GRAPH_FILES[graph]).parent
    # A copy: onnx refuses hard links.
    shutil.copytree(source / folder, tmp_path / folder)
    path = tmp_path / GRAPH_FILES[graph]
    onnx.checker.check_model(path, full_check=artifacts == "tiny_bf16_artifacts")
    model = ir.load(path)
    assert model.graph.name == graph
    for tensor in external(model).values():
        assert np.isfinite(np.asarray(tensor.numpy(), np.float32)).all()


@pytest.mark.parametrize("graph", ["vae_encoder", "vae_decoder"])
@pytest.mark.parametrize("artifacts", ["tiny_artifacts", "tiny_bf16_artifacts"])
def test_vae_graphs_hold_no_weights_either(
    artifacts: str, graph: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(artifacts)
    model = ir.load(folder / GRAPH_FILES[graph])
    stored_refs = read_header(next((folder / "vae").glob("*.safetensors")))
    side = "encoder" if graph == "vae_encoder" else "decoder"
    stored = external(model)
    assert {name for name in stored_refs if name.startswith(f"{side}.")} <= set(stored)
    for name, tensor in stored.items():
        assert (tensor.offset, tensor.length) == (
            stored_refs[name].offset,
            stored_refs[name].nbytes,
        )
    attributes = [node.attributes.get("value") for node in nodes(model, "Constant")]
    constants = [attribute.value for attribute in attributes if attribute is not None]
    inline = [v.const_value for n, v in model.graph.initializers.items() if n not in stored]
    assert sum(tensor.nbytes for tensor in (*constants, *inline)) < 10_000


def test_kv_are_outputs_of_their_own() -> None:
    """A stack of them would cost a copy of gigabytes."""
    for value in built("first_step", "bfloat16").graph.outputs[2:]:
        assert value.producer().op_type in ("Cast", "Reshape")


@pytest.mark.parametrize("graph", STEP_GRAPHS)
def test_scales_in_eight_bit_graphs_are_constants_for_the_operators(graph: str) -> None:
    """TensorRT asks for that; a head's own scale is multiplied."""
    model = built(graph + FLOAT8, "bfloat16")
    for op_type in ("QuantizeLinear", "DequantizeLinear"):
        for node in nodes(model, op_type):
            assert len(node.inputs) == 2
            assert node.inputs[1].const_value.numpy() == 1
