"""ONNX Runtime on a CUDA GPU: everything but the GPU, on a stand-in that computes on the CPU."""

import numpy as np
import onnx
import onnxruntime
import pytest

from klein_kv import KleinKVPipeline
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.signature import GRAPH_FILES
from klein_kv.artifacts.weights import NUMPY_DTYPES, graph_weights
from klein_kv.errors import ArtifactError, BackendError, RequestError
from klein_kv.runtime.backends.backend import open_backend
from klein_kv.runtime.backends.ort.backend import OrtBackend
from klein_kv.runtime.backends.ort.device import _IDENTITY, CPU, OrtDevice, open_device
from tests.runtime.backends.fake_cuda import FakeCuda
from tests.runtime.backends.fake_engines import random_inputs
from tests.runtime.backends.fake_onnxruntime import CUDA, FakeOnnxruntime, FakeValue

CUDA_1 = OrtDevice("cuda", 1)


def open_on(artifacts, device=CUDA_1, fake=None, cuda=None) -> OrtBackend:
    module = onnxruntime if device is CPU else fake or FakeOnnxruntime()
    bindings = (cuda or FakeCuda(devices=2)).cuda
    manifest = Manifest.load(artifacts)
    return OrtBackend(artifacts, manifest, 1, device=device, onnxruntime=module, cuda=bindings)


# --- buffers ---


@pytest.fixture(scope="module", params=[CPU, CUDA_1], ids=["cpu", "cuda"])
def backend(request, tiny_artifacts):
    return open_on(tiny_artifacts, request.param)


@pytest.mark.parametrize("dtype", [x for x in NUMPY_DTYPES if x != "float8_e5m2"])  # files alone
def test_every_type_comes_back_as_it_went(dtype, backend):
    for shape in ((2, 3), (1, 0, 4), (), (5,)):
        array = np.arange(int(np.prod(shape))).astype(NUMPY_DTYPES[dtype]).reshape(shape)
        buffer = backend.upload(array)
        back = backend.download(buffer)
        assert (back.dtype, back.shape) == (array.dtype, shape)
        np.testing.assert_array_equal(back.astype(np.float64), array.astype(np.float64))
        assert buffer.data_type() == f"tensor({dtype.replace('float32', 'float').replace('_', '')})"


def test_bfloat16_keeps_every_bit_and_torch_reads_it_where_it_lies(backend):
    bits = np.arange(1 << 16, dtype=np.uint16)  # infinities and NaNs too
    array = bits.view(NUMPY_DTYPES["bfloat16"])
    np.testing.assert_array_equal(backend.download(backend.upload(array)).view(np.uint16), bits)
    torch = pytest.importorskip("torch")
    array = np.arange(6).astype(NUMPY_DTYPES["bfloat16"]).reshape(2, 3)
    buffer = backend.upload(array)
    tensor = torch.from_dlpack(buffer)
    assert (tensor.dtype, tensor.data_ptr()) == (torch.bfloat16, buffer.data_ptr())
    assert tensor.tolist() == array.astype(np.float32).tolist()


def test_a_view_is_the_same_memory(backend):
    channels = backend._config.transformer.in_channels
    tokens = np.random.default_rng(0).standard_normal((1, 6, channels), np.float32)
    grid = backend.upload(tokens.reshape(1, 2, 3, channels))
    allocated = FakeValue.allocated
    view = backend.view(backend.upload(tokens), (1, 2, 3, channels))
    assert FakeValue.allocated - allocated <= 1
    results = [backend.run("vae_decoder", {"latents": x})["image"] for x in (view, grid)]
    np.testing.assert_array_equal(*map(backend.download, results))
    assert backend.download(backend.view(view, (6, channels))).shape == (6, channels)
    part = backend.view(view, (2, channels), start=3 * channels)
    np.testing.assert_array_equal(backend.download(part), tokens[0, 3:5])
    with pytest.raises(BackendError, match="cannot view"):
        backend.view(view, (7, channels))

    whole = np.arange(12, dtype=np.float32).reshape(1, 6, 2)
    parts = [backend.upload(whole[:, :2]), backend.view(backend.upload(whole), (4, 2), start=4)]
    joined = backend.assemble((1, 6, 2), parts)
    np.testing.assert_array_equal(backend.download(joined), whole)


# --- sessions ---


@pytest.mark.parametrize("device", [CPU, CUDA_1], ids=["cpu", "cuda"])
def test_weights_are_shared_and_go_with_the_last_graph_that_uses_them(device, tiny_artifacts):
    """On a GPU nobody else would: the text encoder must be gone when the transformer comes."""
    backend = open_on(tiny_artifacts, device)
    held, given_back, allocated = {}, FakeOnnxruntime.given_back, FakeValue.allocated
    for graph in ("text_encoder", "first_step", "cached_step", "encode_references"):
        backend._load(graph)
        held[graph] = len(backend._weights)
    refs = {
        ref for graph in held for ref in graph_weights(tiny_artifacts, GRAPH_FILES[graph]).values()
    }
    assert len(backend._weights) == len(refs)
    if device is CUDA_1:
        assert FakeValue.allocated - allocated == len(refs), "each was uploaded once"
    backend.release("cached_step")
    backend.release("encode_references")
    assert len(backend._weights) == held["first_step"] == held["cached_step"]
    assert FakeOnnxruntime.given_back == given_back, "nothing was freed"
    for _ in range(2):
        backend.release("text_encoder")
    assert len(backend._weights) == held["first_step"] - held["text_encoder"]
    backend.release("first_step")
    assert not backend._weights
    assert FakeOnnxruntime.given_back - given_back == (0 if device is CPU else 2)
    assert backend._load("first_step") is not None


def test_the_empty_model_is_onnx():
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "empty", [x], [y])
    opset = onnx.helper.make_opsetid("", 13)
    model = onnx.helper.make_model(graph, ir_version=8, opset_imports=[opset])
    assert onnx.load_model_from_string(_IDENTITY) == model


def test_the_same_images_as_on_a_cpu(tiny_artifacts, tiny_ours, picture):
    fake = FakeOnnxruntime()
    backend = open_on(tiny_artifacts, fake=fake)
    pipe = KleinKVPipeline(tiny_artifacts, Manifest.load(tiny_artifacts), backend)
    pipe.set_progress_bar_config(disable=True)
    images = [picture(128, 96), picture(64, 80)]
    request = {"prompt": "a kite", "image": images, "height": 128, "width": 160, "seed": 3}
    request |= {"output_type": "np", "max_sequence_length": 64}
    np.testing.assert_array_equal(pipe(**request).images, tiny_ours(**request).images)
    assert fake.arenas == [(CUDA, "Cuda", 1, CUDA_1.options)], "one arena for all sessions"
    # They round differently: the same images must not hit each other's keys and values.
    ours, theirs = pipe.encode_references(images), tiny_ours.encode_references(images)
    assert ours.digest != theirs.digest
    with pytest.raises(RequestError, match="another backend"):
        tiny_ours("a kite", references=ours)


def test_keys_and_values_are_handed_on_where_they_lie(tiny_artifacts):
    backend = open_on(tiny_artifacts)
    arrays = random_inputs(backend._graphs.signature("first_step", backend._config))
    inputs = {name: backend.upload(array) for name, array in arrays.items()}
    first = backend.run("first_step", inputs)
    feeds = {name: value for name, value in inputs.items() if not name.startswith("ref_")}
    feeds |= {name: value for name, value in first.items() if "_ref." in name}
    allocated = FakeValue.allocated
    second = backend.run("cached_step", feeds)
    assert FakeValue.allocated == allocated
    np.testing.assert_array_equal(
        backend.download(second["noise_pred"]), backend.download(first["noise_pred"])
    )


def test_free_memory_is_what_cuda_says_and_weights_count(tiny_artifacts):
    cuda = FakeCuda(capacity=12_345, devices=2)
    backend = open_on(tiny_artifacts, cuda=cuda)
    cuda.cudaSetDevice(1)
    cuda.cudaMalloc(345)
    cuda.cudaSetDevice(0)
    given_back = FakeOnnxruntime.given_back
    assert backend.available_memory() == 12_000, "of its own device"
    assert cuda.device == 0, "the thread's device stays what it was"
    assert FakeOnnxruntime.given_back == given_back + 1, "memory kept for reuse counts as free"
    held = backend.graph_memory("cached_step")
    assert held.weights == backend.graph_memory("first_step").weights, "they share one copy"
    refs = graph_weights(tiny_artifacts, GRAPH_FILES["cached_step"]).values()
    assert sum(held.weights.values()) >= sum(ref.nbytes for ref in set(refs))
    assert not held.keeps_scratch
    assert not open_on(tiny_artifacts, CPU).graph_memory("cached_step").weights


# --- refused ---


def test_the_cpu_package_says_what_to_install(tiny_artifacts):
    if CUDA in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is installed")
    manifest = Manifest.load(tiny_artifacts)
    with pytest.raises(BackendError, match=r"no CUDAExecutionProvider.*uninstall.*klein-kv\[cuda"):
        open_backend("onnxruntime", tiny_artifacts, manifest, "cuda:0", None)


def test_a_provider_that_cannot_start(tiny_artifacts, capsys):
    fake = FakeOnnxruntime(error="CUDA failure 35: driver version is insufficient")
    with pytest.raises(BackendError, match=r"cannot start on device 1: CUDA failure 35.*driver"):
        open_on(tiny_artifacts, fake=fake)
    assert capsys.readouterr().out == "", "what onnxruntime prints is no result of ours"


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        # Regression: ONNX Runtime makes a CPU session of one whose provider did not start.
        ({"started": False}, BackendError, "did not start, only CPUExecutionProvider did"),
        (
            {"strays": {"Gemm", "RotaryEmbedding"}},
            ArtifactError,
            r"no kernel for Gemm, RotaryEmbedding in the graph's",
        ),
    ],
)
def test_no_silent_fallback_to_the_cpu(options, kind, message, tiny_artifacts):
    backend = open_on(tiny_artifacts, fake=FakeOnnxruntime(**options))
    with pytest.raises(kind, match=message):
        backend.run("encode_references", {})
    assert not backend._sessions


def test_bfloat16_is_for_gpus(tiny_bf16_artifacts):
    with pytest.raises(BackendError, match=r"does not compute on a CPU; export .* --dtype fp32"):
        open_on(tiny_bf16_artifacts, CPU)
    backend = open_on(tiny_bf16_artifacts)
    table = graph_weights(tiny_bf16_artifacts, GRAPH_FILES["first_step"])
    assert backend._place(*next(iter(table.items()))).data_type() == "tensor(bfloat16)"


# --- the graphs ---

BFLOAT16_KERNELS = {
    *("Add", "Attention", "Cast", "CastLike", "Concat", "Conv", "Cos", "Div", "Expand", "Flatten"),
    *("Gather", "Gemm", "GroupNormalization", "Identity", "LayerNormalization", "MatMul", "Max"),
    *("Min", "Mul", "Pad", "RMSNormalization", "ReduceMean", "Reshape", "RotaryEmbedding"),
    *("Shape", "Sigmoid", "Slice", "Split", "Sqrt", "Squeeze", "Sub", "Transpose", "Unsqueeze"),
    "Where",
}
"""What the CUDA provider of onnxruntime-gpu 1.31.1 took of our graphs in bfloat16."""


@pytest.mark.parametrize("graph", GRAPH_FILES)
def test_bfloat16_graphs_hold_nothing_that_cuda_has_no_kernel_for(graph, tiny_bf16_artifacts):
    """Regression: ReduceMax and Resize in bfloat16 kept two graphs from loading."""
    path = tiny_bf16_artifacts / GRAPH_FILES[graph]
    model = onnx.load(path, load_external_data=False)  # noqa: TID251 - the graph alone
    model = onnx.shape_inference.infer_shapes(model)
    values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    op_types = {
        node.op_type
        for node in model.graph.node
        if any(types.get(name) == onnx.TensorProto.BFLOAT16 for name in node.input)
    }
    assert len(op_types) > 5
    assert op_types <= BFLOAT16_KERNELS


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("artifacts", ["tiny_artifacts", "tiny_bf16_artifacts"])
def test_a_gpu_makes_the_cpus_image(artifacts, request, tiny_ours, picture):
    if CUDA not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed")
    try:
        open_device(onnxruntime, OrtDevice("cuda"))
    except BackendError as error:
        pytest.skip(str(error))
    folder = request.getfixturevalue(artifacts)
    pipe = KleinKVPipeline.from_pretrained(folder, backend="onnxruntime", device="cuda:0")
    pipe.set_progress_bar_config(disable=True)
    asked = {"image": picture(128, 96), "height": 128, "width": 160, "seed": 3, "output_type": "np"}
    tolerance = 1e-3 if artifacts == "tiny_artifacts" else 0.15
    expected = tiny_ours("a kite", **asked).images
    for _ in range(2):
        np.testing.assert_allclose(pipe("a kite", **asked).images, expected, atol=tolerance)
