"""Graphs made by hand: what becomes of their weights and of wide attention."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.signature import GRAPH_FILES, Signature, TensorSpec, make_signature
from klein_kv.engines.rewrite import graph_rewrite
from klein_kv.engines.rewrite.graph_rewrite import read_graph
from klein_kv.errors import ArtifactError, BuildError

FLOAT = TensorProto.FLOAT
SIGNATURE = Signature(
    "toy",
    (TensorSpec("x", "float32", ("n", 8)),),
    (TensorSpec("y", "float32", ("n", 8)),),
)


def _linear(location: str = "w.safetensors", offset: int = 16) -> onnx.ModelProto:
    weight = TensorProto(name="w", data_type=FLOAT, dims=[8, 8])
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", 256)):
        weight.external_data.add(key=key, value=str(value))
    inline = helper.make_tensor("one", FLOAT, [1], [1.0])
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w"], ["z"], transB=1),
         helper.make_node("Add", ["z", "one"], ["y"])],
        "toy",
        [helper.make_tensor_value_info("x", FLOAT, ["n", 8])],
        [helper.make_tensor_value_info("y", FLOAT, ["n", 8])],
        [weight, inline],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])


def _save(folder: Path, model: onnx.ModelProto, size: int = 272) -> Path:
    path = folder / "toy.onnx"
    path.write_bytes(model.SerializeToString())
    (folder / "w.safetensors").write_bytes(bytes(size))
    return path


@pytest.mark.parametrize("shared", [True, False])
def test_shared_weights_become_inputs_and_others_stay(tmp_path: Path, shared: bool) -> None:
    graph = read_graph(_save(tmp_path, _linear()), SIGNATURE, shared)
    model = onnx.ModelProto.FromString(graph.model)
    assert [value.name for value in model.graph.input] == (["x", "w"] if shared else ["x"])
    names = [tensor.name for tensor in model.graph.initializer]
    assert names == (["one"] if shared else ["w", "one"])
    ref = graph.weights["w"]
    assert (ref.path.name, ref.offset, ref.nbytes) == ("w.safetensors", 16, 256)
    assert (ref.dtype, ref.shape) == ("float32", (8, 8))
    assert graph.weight_bytes == 256


@pytest.mark.parametrize(
    ("location", "size", "message"),
    [
        ("../w.safetensors", 272, r"\.onnx: w of .* '\.\./w.* leaves the folder.*export again"),
        ("/etc/passwd", 272, "leaves the folder"),
        ("", 272, "leaves the folder"),
        ("a/w.safetensors", 272, r"\.onnx: w of .* in 'a/w\.safetensors' cannot be read"),
        ("w.safetensors", 271, r"bytes 16 to 272 of w\.safetensors, which has 271"),
    ],
)
def test_weights_outside_the_folder_or_the_file_are_refused(
    tmp_path: Path, location: str, size: int, message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        read_graph(_save(tmp_path, _linear(location), size), SIGNATURE, shared=True)


def test_another_graph_is_refused(tmp_path: Path) -> None:
    path = _save(tmp_path, _linear())
    for specs in (
        (TensorSpec("x", "bfloat16", ("n", 8)),),
        (TensorSpec("x", "float32", ("m", 8)),),
        (TensorSpec("hidden_states", "float32", ("n", 8)),),
        (),
    ):
        with pytest.raises(ArtifactError, match="is not the graph 'toy' of this klein-kv"):
            read_graph(path, Signature("toy", specs, SIGNATURE.outputs), shared=True)
    path.write_bytes(b"\xff not onnx")
    with pytest.raises(ArtifactError, match="not a readable ONNX file"):
        read_graph(path, SIGNATURE, shared=True)


def _attention(dim: int, **attributes: object) -> onnx.ModelProto:
    info = [helper.make_tensor_value_info(name, FLOAT, [1, 1, "n", dim]) for name in "qkvy"]
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], "attention", **attributes)
    graph = helper.make_graph([node], "toy", info[:3], info[3:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def _attention_signature(dim: int) -> Signature:
    specs = [TensorSpec(name, "float32", (1, 1, "n", dim)) for name in "qkvy"]
    return Signature("toy", tuple(specs[:3]), tuple(specs[3:]))


@pytest.mark.parametrize("attributes", [{}, {"scale": 0.25}])
def test_wide_attention_in_parts_equals_the_whole(
    tmp_path: Path, attributes: dict[str, object]
) -> None:
    ort = pytest.importorskip("onnxruntime")
    dim, tokens = 512, 20
    model = _attention(dim, **attributes)
    graph = read_graph(_save(tmp_path, model), _attention_signature(dim), shared=True)
    assert b"Attention" not in graph.model
    rng = np.random.default_rng(0)
    feed = {
        name: rng.normal(size=(1, 1, tokens, dim)).astype(np.float32) * scale
        for name, scale in (("q", 3), ("k", 1), ("v", 1))
    }
    whole, parts = (
        ort.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, feed)[0]
        for data in (model.SerializeToString(), graph.model)
    )
    np.testing.assert_allclose(parts, whole, atol=2e-5)


def test_attention_that_fuses_is_left_alone(tmp_path: Path) -> None:
    graph = read_graph(_save(tmp_path, _attention(256)), _attention_signature(256), shared=True)
    assert b"Attention" in graph.model


def test_wide_attention_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = _save(tmp_path, _attention(512, is_causal=1))
    with pytest.raises(BuildError, match="heads of 512, which TensorRT does not fuse"):
        read_graph(path, _attention_signature(512), shared=True)


@pytest.mark.parametrize("graph", ["vae_encoder", "vae_decoder"])
def test_vae_with_attention_in_parts_gives_the_same_images(
    graph: str, tiny_fp16_artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float16, which ONNX Runtime computes on a CPU; the parts are the same in bfloat16."""
    manifest = Manifest.load(tiny_fp16_artifacts)
    signature = make_signature(graph, manifest.config, manifest.dtype)
    path = tiny_fp16_artifacts / GRAPH_FILES[graph]
    monkeypatch.setattr(graph_rewrite, "MAX_FUSED_HEAD_DIM", 1)  # the tiny VAE's heads are narrow
    rewritten = read_graph(path, signature, shared=False)
    assert rewritten.model.count(b"Softmax") >= graph_rewrite.QUERY_CHUNKS
    rng = np.random.default_rng(0)
    unit = manifest.config.vae.multiple_of
    feeds = {
        "vae_encoder": {"image": rng.integers(0, 256, (1, 9 * unit, 8 * unit, 3), np.uint8)},
        "vae_decoder": {"latents": rng.standard_normal((2, 9, 8, 128)).astype(np.float16)},
    }[graph]
    chunked = path.with_name(f"chunked-{path.name}")
    chunked.write_bytes(rewritten.model)  # beside the weights it refers to
    try:
        results = []
        for file in (path, chunked):
            session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
            results.append(session.run(None, feeds))
    finally:
        chunked.unlink()
    for whole, parts in zip(*results, strict=True):
        difference = np.abs(whole.astype(np.float32) - parts.astype(np.float32)).max()
        assert difference <= (1 if whole.dtype == np.uint8 else 5e-3), difference
