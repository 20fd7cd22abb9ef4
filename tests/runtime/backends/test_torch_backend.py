"""The torch backend apart from its arithmetic, which the parity tests hold against diffusers."""

import gc
import weakref

import ml_dtypes
import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import cpp_builder

from klein_kv import KleinKVPipeline
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.signature import kv_names, make_signature
from klein_kv.artifacts.weights import NUMPY_DTYPES
from klein_kv.errors import ArtifactError, BackendError, CapacityError
from klein_kv.runtime.backends.pytorch import memory as torch_memory
from klein_kv.runtime.backends.pytorch.backend import TorchBackend
from klein_kv.runtime.backends.pytorch.weights import FolderWeights
from tests.conftest import load_ours
from tests.runtime.backends.fake_engines import random_inputs

CPU = torch.device("cpu")


def open_torch(artifacts, device="cpu", **options) -> TorchBackend:
    weights = FolderWeights(artifacts, Manifest.load(artifacts), device=device)
    return TorchBackend(weights, **options)


@pytest.fixture
def backend(tiny_artifacts):
    return open_torch(tiny_artifacts)


@pytest.fixture
def config(tiny_artifacts):
    return Manifest.load(tiny_artifacts).config


def step_inputs(config, refs=22, batch=1):
    """Inputs of all transformer graphs, as float32 arrays."""
    signature = make_signature("first_step", config, "float32")
    return random_inputs(signature, ref_tokens=refs, batch=batch)


def upload_all(backend, inputs, dtype=torch.float32):
    """Inputs of a step, and references, on the device."""
    x = {name: backend.upload(value) for name, value in inputs.items()}
    for name in ("hidden_states", "encoder_hidden_states", "ref_hidden_states"):
        x[name] = x[name].to(dtype)
    references = {name: x.pop(name) for name in ("ref_hidden_states", "ref_ids")}
    return x, references


def run_all(backend, inputs, dtype=torch.float32):
    """Outputs of the KV transformer graphs, as float32 arrays."""
    x, references = upload_all(backend, inputs, dtype)
    kv = backend.run("encode_references", references)
    runs = {
        "first": backend.run("first_step", x | references),
        "encode": kv,
        "cached": backend.run("cached_step", x | kv),
        "again": backend.run("cached_step", x | kv),
    }
    return {
        f"{run} {name}": backend.download(tensor.float())
        for run, outputs in runs.items()
        for name, tensor in outputs.items()
    }


def assert_near(ours, theirs, bound):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=0, atol=bound, err_msg=name)


# --- buffers ---


@pytest.mark.parametrize("dtype", torch_memory.TORCH_DTYPES)
def test_upload_copies_and_download_gives_it_back(dtype, backend):
    array = np.arange(24).reshape(2, 3, 4).astype(NUMPY_DTYPES[dtype])
    for given in (array, array.transpose(2, 0, 1), array[:, ::2], array[:0], array[0, 0, 0:1]):
        expected = given.copy()
        given = given.copy(order="K")
        given.flags.writeable = False  # as weights and saved references are
        buffer = backend.upload(given)
        assert buffer.dtype == torch_memory.TORCH_DTYPES[dtype]
        given.flags.writeable = True
        given[...] = 0
        result = backend.download(buffer)
        assert result.dtype == expected.dtype
        np.testing.assert_array_equal(result, expected)


def test_download_on_a_cpu_is_the_memory_itself(backend):
    """Callbacks of the pipeline may change latents in place, as diffusers' may."""
    for dtype in (np.float32, ml_dtypes.bfloat16):
        buffer = backend.upload(np.ones((2, 3), dtype))
        backend.download(buffer)[0] = 5
        assert buffer[0].tolist() == [5, 5, 5]


def test_views_parts_and_types_that_no_graph_takes(backend):
    array = np.arange(12.0, dtype=np.float32).reshape(1, 6, 2)
    buffer = backend.upload(array)
    view = backend.view(buffer, (2, 2), start=4)
    assert view.data_ptr() == buffer.data_ptr() + 16
    np.testing.assert_array_equal(backend.download(view), array[0, 2:4])
    joined = backend.assemble((4, 2), [view, buffer[:, :2]])
    np.testing.assert_array_equal(backend.download(joined), array[0, [2, 3, 0, 1]])
    with pytest.raises(BackendError, match="cannot upload complex64, expected one of float32"):
        backend.upload(np.zeros(3, np.complex64))


# --- weights and memory ---


def test_graphs_share_weights_and_release_frees_them(backend, config, monkeypatch):
    loaded, load = [], FolderWeights.load

    def watch(self, component):
        tensors = load(self, component)
        loaded.append(weakref.ref(tensors["proj_out.weight"]))
        return tensors

    monkeypatch.setattr(FolderWeights, "load", watch)
    inputs = step_inputs(config)
    run_all(backend, inputs)
    assert len(loaded) == 1
    for graph in ("first_step", "cached_step", "encode_references"):
        assert loaded[0]() is not None, "a loaded graph has them"
        for _ in range(2):
            backend.release(graph)
        gc.collect()
    assert loaded[0]() is None
    run_all(backend, inputs)
    assert len(loaded) == 2


def test_memory_of_a_graph(backend):
    """On a CPU mapped files; on a GPU the bytes of the component, which its graphs share."""
    assert backend.graph_memory("cached_step").weights == {}
    backend._weights.device = torch.device("cuda")  # nothing is loaded for the answer
    held = backend.graph_memory("cached_step").weights
    assert held == backend.graph_memory("encode_references").weights
    backend._weights.device = CPU
    tensors = backend._weights.load("transformer").values()
    assert sum(held.values()) == sum(tensor.nbytes for tensor in tensors)
    for call in (backend.graph_memory, lambda graph: backend.run(graph, {})):
        with pytest.raises(ArtifactError, match="no graph 'plain_step', expected one of text_enc"):
            call("plain_step")


def test_from_tensors_shares_memory(backend, config, tiny_theirs):
    """diffusers' own modules, no artifact folder."""
    given = TorchBackend.from_tensors(
        config,
        "float32",
        device="cpu",
        transformer=dict(tiny_theirs.transformer.named_parameters()),  # which have gradients
        text_encoder=tiny_theirs.text_encoder.state_dict(),
        vae=tiny_theirs.vae.state_dict(),
    )
    weight = tiny_theirs.transformer.x_embedder.weight
    held = given._weights.load("transformer")["x_embedder.weight"]
    assert held.data_ptr() == weight.data_ptr()
    assert given.graph_memory("first_step").weights == {}, "it is not the backend's to free"
    inputs = step_inputs(config)
    assert_near(run_all(given, inputs), run_all(backend, inputs), 0)
    ids = backend.upload(np.arange(30).reshape(1, 30))
    image = backend.upload(np.full((1, 64, 80, 3), 99, np.uint8))
    for graph, x in (
        ("text_encoder", {"input_ids": ids, "attention_mask": torch.ones_like(ids)}),
        ("vae_encoder", {"image": image}),
    ):
        for name, value in given.run(graph, x).items():
            assert torch.equal(value, backend.run(graph, x)[name])
            assert not value.requires_grad


# --- devices and options ---


def test_devices_that_are_not_there(tiny_artifacts, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:1"):
        with pytest.raises(BackendError, match=rf"device is '{device}', torch .* sees 0 CUDA GPUs"):
            KleinKVPipeline.from_pretrained(tiny_artifacts, backend="torch", device=device)
    pipeline = KleinKVPipeline.from_pretrained(tiny_artifacts, backend="torch")
    assert pipeline.backend.device == CPU


def test_cuda_graphs_are_for_gpus(tiny_artifacts):
    with pytest.raises(BackendError, match="cuda_graphs is set, but the device is cpu"):
        open_torch(tiny_artifacts, cuda_graphs=True)
    backend = open_torch(tiny_artifacts)
    assert backend.graph_memory("cached_step").kv_copies == 0
    backend._capture = object()  # type: ignore[assignment]  # as on a GPU
    assert backend.graph_memory("cached_step").kv_copies == 1, "a second place for them"
    assert backend.graph_memory("first_step").kv_copies == 0


def test_errors_of_torch_become_the_projects(backend, config):
    inputs = {name: backend.upload(x) for name, x in step_inputs(config).items()}
    with pytest.raises(BackendError, match="encode_references failed in torch: "):
        backend.run("encode_references", inputs | {"ref_ids": inputs["ref_ids"][:3]})

    with pytest.raises(CapacityError, match=r"upload: out of memory .*use fewer references"):
        backend.upload(np.broadcast_to(np.uint8(0), 1 << 55))

    def full_gpu(_inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")

    backend._loaded["cached_step"] = full_gpu
    with pytest.raises(CapacityError, match=r"step: out of memory \(CUDA out .* 9 GiB.\); use"):
        backend.run("cached_step", {})


def test_clock_of_a_cpu(backend):
    marks = [backend.mark() for _ in range(3)]
    assert 0 <= backend.elapsed(marks[0], marks[1]) <= backend.elapsed(marks[0], marks[2]) < 1
    assert backend.available_memory() > 1 << 20


def test_keys_and_values_keep_nothing_else_alive(backend, config):
    """A single block's values are a part of one large product; what is kept is a copy."""
    inputs = {name: backend.upload(x) for name, x in step_inputs(config).items()}
    kv = backend.run("encode_references", inputs)
    assert list(kv) == kv_names(config.transformer.num_blocks)
    for name, value in kv.items():
        assert value.is_contiguous()
        assert value.untyped_storage().nbytes() == value.nbytes, name


# --- compiled blocks ---


@pytest.fixture
def compiler():
    """Skips where torch.compile has no C++ compiler; leaves no compiled code behind."""
    try:
        cpp_builder.get_cpp_compiler()
    except RuntimeError as error:
        pytest.skip(f"torch.compile needs a C++ compiler on a CPU: {error}")
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch 2.13 of its own modules
@pytest.mark.usefixtures("compiler")
def test_compiled_blocks(tiny_artifacts, backend, config):
    """As eager to rounding; every kind of block is compiled once, however many there are."""
    compiled = open_torch(tiny_artifacts, compile_blocks=True)
    inputs = step_inputs(config)
    assert_near(run_all(compiled, inputs), run_all(backend, inputs), 1e-5)
    net = config.transformer
    # Two kinds of block and the last one, each on the reference stream and on the others'.
    assert (net.num_layers, net.num_single_layers) == (1, 2)
    assert counters["stats"]["unique_graphs"] == 6
    assert not counters["graph_break"]


# --- on a GPU ---


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU that torch sees")
    return "cuda:0"


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_gpu_equals_cpu(graphs, compiled, gpu, tiny_artifacts, backend, config):
    torch.compiler.reset()
    theirs = open_torch(tiny_artifacts, gpu, compile_blocks=compiled, cuda_graphs=graphs)
    for refs, batch in ((22, 1), (40, 2), (10, 1), (40, 2)):
        inputs = step_inputs(config, refs, batch)
        assert_near(run_all(theirs, inputs), run_all(backend, inputs), 1e-4)


@pytest.mark.gpu
def test_gpu_pipeline_in_bfloat16(gpu, tiny_bf16_artifacts, picture):
    """An edit, and the same with known references, against the CPU's."""
    images = [picture(128, 160), picture(96, 96)]
    request = {"image": images, "height": 128, "width": 144, "seed": 1, "output_type": "latent"}
    expected = load_ours(tiny_bf16_artifacts, "torch")("kite", **request).images
    for graphs in (False, True):
        pipe = KleinKVPipeline.from_pretrained(
            tiny_bf16_artifacts,
            backend="torch",
            device=gpu,
            backend_options={"cuda_graphs": graphs},
        )
        pipe.set_progress_bar_config(disable=True)
        results = [pipe("kite", **request).images for _ in range(3)]  # a miss, then hits
        np.testing.assert_array_equal(results[1], results[2])
        difference = np.abs(results[0].astype(np.float32) - expected.astype(np.float32))
        assert difference.max() < 0.3


@pytest.mark.gpu
def test_gpu_memory(gpu, tiny_artifacts, config, monkeypatch):
    """Uploads in pieces give the same bytes; release gives the memory back."""
    monkeypatch.setattr(torch_memory, "_STAGING_BYTES", 1000)
    backend, on_cpu = open_torch(tiny_artifacts, gpu), open_torch(tiny_artifacts)
    expected = on_cpu._weights.load("transformer")
    for name, tensor in backend._weights.load("transformer").items():
        assert torch.equal(tensor.cpu(), expected[name]), name
    for array in (np.arange(5000, dtype=np.int64), np.arange(7, dtype=np.uint8)):
        np.testing.assert_array_equal(backend.download(backend.upload(array)), array)
    del tensor
    gc.collect()
    before = torch.cuda.memory_allocated()
    run_all(backend, step_inputs(config))
    for graph in ("first_step", "cached_step", "encode_references"):
        backend.release(graph)
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + (1 << 20)
    start = backend.mark()
    assert backend.elapsed(start, backend.mark()) >= 0


@pytest.mark.gpu
def test_gpu_loop_does_not_wait(gpu, tiny_bf16_artifacts, config):
    """torch reports every call that would wait for the device."""
    backend, inputs = open_torch(tiny_bf16_artifacts, gpu), step_inputs(config)
    run_all(backend, inputs, torch.bfloat16)
    x, references = upload_all(backend, inputs, torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = backend.run("first_step", x | references)
        kv = {name: value for name, value in outputs.items() if "_ref." in name}
        for _ in range(3):
            step = {name: backend.upload(inputs[name]) for name in ("timestep", "sigma_step")}
            outputs = backend.run("cached_step", x | kv | step)
            x["hidden_states"] = outputs["latents"]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(torch.isfinite(x["hidden_states"]).all())
