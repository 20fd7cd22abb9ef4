"""The torch backend apart from its arithmetic, which the parity tests hold against diffusers."""

import gc
import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import Flux2KleinKVPipeline
from PIL import Image
from torch._dynamo.utils import counters
from torch._inductor import cpp_builder

from klein_kv import KleinKVPipeline
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.positions import grid_ids, reference_ids, text_ids
from klein_kv.artifacts.signature import kv_names
from klein_kv.artifacts.weights import NUMPY_DTYPES, WeightRef
from klein_kv.cli import main
from klein_kv.errors import ArtifactError, BackendError, CapacityError
from klein_kv.runtime.backends import backend as backend_module
from klein_kv.runtime.backends.pytorch import memory as torch_memory
from klein_kv.runtime.backends.pytorch.backend import TorchBackend
from klein_kv.runtime.backends.pytorch.memory import DeviceWeights
from klein_kv.runtime.backends.pytorch.weights import whole_weights
from tests.conftest import load_ours

Picture = Callable[..., Image.Image]
Arrays = dict[str, Any]

CPU = torch.device("cpu")


@pytest.fixture
def backend(tiny_artifacts: Path) -> TorchBackend:
    return TorchBackend(tiny_artifacts, Manifest.load(tiny_artifacts), device="cpu")


def step_inputs(config: Any, refs: int = 22, batch: int = 1, side: int = 4) -> Arrays:
    """Inputs of all transformer graphs, as float32 arrays."""
    rng, net = np.random.default_rng(0), config.transformer

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape, np.float32)

    grids = [(refs // 2, 2)]
    return {
        "hidden_states": normal(batch, side * side, net.in_channels),
        "encoder_hidden_states": normal(batch, 9, net.joint_attention_dim),
        "timestep": np.array([700.0], np.float32),
        "sigma_step": np.array([-0.25], np.float32),
        "img_ids": grid_ids(side, side),
        "txt_ids": text_ids(9),
        "ref_hidden_states": normal(1, refs, net.in_channels),
        "ref_ids": reference_ids(grids),
    }


def run_all(backend: TorchBackend, inputs: Arrays, dtype: str = "float32") -> Arrays:
    """Outputs of the KV transformer graphs, as float32 arrays."""
    narrow = torch_memory.TORCH_DTYPES[dtype]
    x = {
        name: backend.upload(value).to(narrow)
        if value.dtype == np.float32 and name not in ("timestep", "sigma_step")
        else backend.upload(value)
        for name, value in inputs.items()
    }
    references = {name: x.pop(name) for name in ("ref_hidden_states", "ref_ids")}
    first = backend.run("first_step", x | references)
    kv = backend.run("encode_references", references)
    cached = backend.run("cached_step", x | kv)
    again = backend.run("cached_step", x | kv)
    outputs = {
        **{f"first {name}": value for name, value in first.items()},
        **{f"encode {name}": value for name, value in kv.items()},
        **{f"cached {name}": value for name, value in cached.items()},
        **{f"again {name}": value for name, value in again.items()},
    }
    return {name: backend.download(x.float()) for name, x in outputs.items()}


def assert_near(ours: Arrays, theirs: Arrays, bound: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=0, atol=bound, err_msg=name)


# --- buffers ---


@pytest.mark.parametrize(
    "dtype", ["float32", "float16", "bfloat16", "int64", "uint8", "float8_e4m3fn"]
)
def test_upload_copies_and_download_gives_it_back(dtype: str, backend: TorchBackend) -> None:
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


def test_download_on_a_cpu_is_the_memory_itself(backend: TorchBackend) -> None:
    """Callbacks of the pipeline may change latents in place, as diffusers' may."""
    for dtype in (np.float32, ml_dtypes.bfloat16):
        buffer = backend.upload(np.ones((2, 3), dtype))
        backend.download(buffer)[0] = 5
        assert buffer[0].tolist() == [5, 5, 5]


def test_view(backend: TorchBackend) -> None:
    buffer = backend.upload(np.arange(12.0, dtype=np.float32).reshape(1, 6, 2))
    view = backend.view(buffer, (1, 2, 3, 2))
    assert view.data_ptr() == buffer.data_ptr()
    assert backend.download(view).shape == (1, 2, 3, 2)


def test_types_that_no_graph_takes(backend: TorchBackend) -> None:
    with pytest.raises(BackendError, match="cannot upload complex64, expected one of float32"):
        backend.upload(np.zeros(3, np.complex64))


# --- weights ---


def test_weights_are_mapped_and_shared(backend: TorchBackend, tiny_artifacts: Path) -> None:
    loaded = [backend._weights.tensors(graph) for graph in ("first_step", "cached_step")]
    assert loaded[0].keys() == loaded[1].keys()
    assert all(loaded[0][name] is loaded[1][name] for name in loaded[0])
    files = {str(path) for path in (tiny_artifacts / "transformer").glob("*.safetensors")}
    address = loaded[0]["x_embedder.weight"].data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(x, 16) for x in line.split()[0].split("-"))
        if begin <= address < end:
            assert line.split(maxsplit=5)[5] in files
            break
    else:
        pytest.fail("the weights lie in no mapping")


def test_weights_are_those_of_the_checkpoint(
    backend: TorchBackend, tiny_theirs: Flux2KleinKVPipeline
) -> None:
    state = tiny_theirs.transformer.state_dict()
    tensors = backend._weights.tensors("first_step")
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[name], state[name]) for name in state)
    encode = backend._weights.tensors("encode_references")
    assert {name.split(".")[0] for name in tensors.keys() - encode.keys()} >= {
        "context_embedder",
        "proj_out",
    }
    text = backend._weights.tensors("text_encoder")
    state = tiny_theirs.text_encoder.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in text.items())


def test_release_frees_what_no_loaded_graph_needs(backend: TorchBackend) -> None:
    inputs = step_inputs(backend._config)
    run_all(backend, inputs)
    placed = backend._weights.on_device._placed
    everything, shared = len(placed), weakref.ref(next(iter(placed.values())))
    backend.release("first_step")
    gc.collect()
    assert len(placed) == everything, "cached_step has them all"
    backend.release("cached_step")
    gc.collect()
    assert 0 < len(placed) < everything, "encode_references needs no text stream"
    backend.release("encode_references")
    gc.collect()
    assert len(placed) == 0
    assert shared() is None
    run_all(backend, inputs)
    assert len(placed) == everything


def test_vae_graph_holds_its_half_alone(backend: TorchBackend) -> None:
    vae = backend._weights.vae("vae_encoder")
    assert not any(x.is_meta for x in vae.encoder.parameters())
    assert all(x.is_meta for x in vae.decoder.parameters())
    assert not vae.bn.running_mean.is_meta


def test_tensors_at_odd_offsets(tmp_path: Path) -> None:
    """Other libraries' headers have any length."""
    values = np.arange(40, dtype=np.float32)
    path = tmp_path / "odd.bin"
    path.write_bytes(b"\0" * 5 + values.tobytes())
    refs = {
        "a": WeightRef(path, 5, 80, "float32", (4, 5)),
        "b": WeightRef(path, 85, 80, "float32", (20,)),
    }
    tensors = DeviceWeights(CPU).load(refs)
    np.testing.assert_array_equal(tensors["a"].numpy(), values[:20].reshape(4, 5))
    np.testing.assert_array_equal(tensors["b"].numpy(), values[20:])


def test_writing_to_a_weight_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    path.write_bytes(np.ones(8, np.float32).tobytes())
    tensors = DeviceWeights(CPU).load({"a": WeightRef(path, 0, 32, "float32", (8,))})
    tensors["a"].mul_(3)
    assert np.fromfile(path, np.float32).tolist() == 8 * [1.0]


class FakeEvent:
    """In place of a CUDA event: what was recorded is done only after someone waits for it."""

    waits = 0

    def __init__(self) -> None:
        self.pending = False

    def record(self, _stream: object) -> None:
        assert not self.pending, "the buffer was filled again before its copy was done"
        self.pending = True

    def synchronize(self) -> None:
        FakeEvent.waits += self.pending
        self.pending = False


@pytest.mark.parametrize("nbytes", [0, 8, 1000, 1008, 5000])
def test_pieces_of_an_upload(nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way to a GPU, onto the CPU: two buffers in turn, each waited for before it is reused."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: None)
    monkeypatch.setattr(torch_memory, "_STAGING_BYTES", 1000)
    FakeEvent.waits = 0
    staging = torch_memory._Staging(CPU)
    pieces = 0
    for seed in range(3):  # the buffers serve many tensors
        values = torch.from_numpy(np.random.default_rng(seed).standard_normal(nbytes // 8))
        copy = staging.copy(values)
        assert torch.equal(copy, values)
        assert copy.data_ptr() != values.data_ptr() or not nbytes
        pieces += -(-nbytes // 1000)
    assert FakeEvent.waits == max(0, pieces - 2)


def test_weights_that_torch_cannot_use(tmp_path: Path) -> None:
    missing = WeightRef(tmp_path / "gone", 0, 4, "float32", (1,))
    with pytest.raises(ArtifactError, match=r"gone cannot be mapped: .*export again"):
        DeviceWeights(CPU).load({"a": missing})
    with pytest.raises(BackendError, match=r"a is float8_e4m3fn, .*export with --dtype bf16"):
        DeviceWeights(CPU).load({"a": replace(missing, dtype="float8_e4m3fn")})
    with pytest.raises(BackendError, match=r"a is float4_e2m1fn, "):
        DeviceWeights(CPU).load({"a": replace(missing, dtype="float4_e2m1fn")})


def test_row_ranges_are_joined() -> None:
    ref = WeightRef(Path("w"), 100, 240, "float32", (10, 6))
    table = [("x[0:4]", ref.rows(0, 4)), ("x[4:10]", ref.rows(4, 10)), ("y", ref)]
    assert whole_weights(table) == {"x": ref, "y": ref}
    assert whole_weights([*table, ("x", ref)])["x"] == ref
    with pytest.raises(ArtifactError, match=r"x: rows 5 to 10 .* do not follow row 4"):
        whole_weights([("x[0:4]", ref.rows(0, 4)), ("x[5:10]", ref.rows(5, 10))])
    moved = replace(ref.rows(4, 10), offset=8)
    with pytest.raises(ArtifactError, match="do not follow row 4, which ends at byte 196 of w"):
        whole_weights([("x[0:4]", ref.rows(0, 4)), ("x[4:10]", moved)])
    with pytest.raises(ArtifactError, match="do not follow row 0"):
        whole_weights([("x[4:10]", ref.rows(4, 10))])


def test_artifacts_without_the_vaes_configuration(tiny_artifacts: Path) -> None:
    """Folders from before it was written run with the other backends."""
    manifest = Manifest.load(tiny_artifacts)
    files = {name: record for name, record in manifest.files.items() if name != "vae/config.json"}
    backend = TorchBackend(tiny_artifacts, replace(manifest, files=files), device="cpu")
    with pytest.raises(ArtifactError, match=r"has no vae/config.json, .*export again"):
        backend.run("vae_decoder", {})


def test_vae_configuration_of_another_vae(tiny_artifacts: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_artifacts, tmp_path / "a", copy_function=shutil.copy)
    path = tmp_path / "a/vae/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"block_out_channels": [32, 32, 32, 32]}))
    backend = TorchBackend(tmp_path / "a", Manifest.load(tiny_artifacts), device="cpu")
    with pytest.raises(ArtifactError, match=r"the VAE's weights do not fit vae/config\.json"):
        backend.run("vae_decoder", {})
    path.write_text(json.dumps(config | {"block_out_channels": "wide"}))
    with pytest.raises(ArtifactError, match="diffusers cannot build the model"):
        backend.run("vae_decoder", {})


# --- weights at hand ---


def test_from_tensors_shares_memory(
    backend: TorchBackend, tiny_theirs: Flux2KleinKVPipeline
) -> None:
    """diffusers' own modules, no artifact folder."""
    given = TorchBackend.from_tensors(
        backend._config,
        "float32",
        device="cpu",
        transformer=dict(tiny_theirs.transformer.named_parameters()),  # which have gradients
        text_encoder=tiny_theirs.text_encoder.state_dict(),
        vae=tiny_theirs.vae,
    )
    weight = tiny_theirs.transformer.x_embedder.weight
    assert given._weights.tensors("first_step")["x_embedder.weight"].data_ptr() == weight.data_ptr()
    inputs = step_inputs(backend._config)
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


def test_from_tensors_checks(backend: TorchBackend, tiny_theirs: Flux2KleinKVPipeline) -> None:
    state = tiny_theirs.transformer.state_dict()

    def make(**change: Any) -> TorchBackend:
        return TorchBackend.from_tensors(backend._config, "float32", device="cpu", **change)

    name = "proj_out.weight"
    with pytest.raises(BackendError, match=r"transformer: tensor proj_out.weight is missing"):
        make(transformer={key: x for key, x in state.items() if key != name})
    with pytest.raises(BackendError, match=r"is torch.float16 .*, expected torch.float32"):
        make(transformer=state | {name: state[name].half()})
    with pytest.raises(BackendError, match=r"\(1, 64\) on cpu, expected torch.float32 \(128, 64\)"):
        make(transformer=state | {name: state[name][:1]})
    with pytest.raises(BackendError, match="on meta, expected"):
        make(transformer=state | {name: state[name].to("meta")})
    empty = make()
    for graph in ("cached_step", "text_encoder", "vae_decoder"):
        with pytest.raises(BackendError, match=f"{graph} cannot be run: .* from_tensors"):
            empty.run(graph, {})


# --- devices and options ---


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_devices_that_are_not_there(tiny_artifacts: Path) -> None:
    for device in ("cuda", "cuda:1"):
        with pytest.raises(BackendError, match=rf"device is '{device}', torch .* sees 0 CUDA GPUs"):
            KleinKVPipeline.from_pretrained(tiny_artifacts, backend="torch", device=device)
    pipeline = KleinKVPipeline.from_pretrained(tiny_artifacts, backend="torch")
    assert pipeline.backend.device == CPU


def test_steps_that_replay_tell_of_their_second_place(tiny_artifacts: Path) -> None:
    backend = TorchBackend(tiny_artifacts, Manifest.load(tiny_artifacts), device="cpu")
    assert backend.graph_memory("cached_step").kv_copies == 0
    backend._capture = object()  # type: ignore[assignment]  # as on a GPU
    assert backend.graph_memory("cached_step").kv_copies == 1
    assert backend.graph_memory("first_step").kv_copies == 0


def test_options_that_a_cpu_does_not_have(tiny_artifacts: Path) -> None:
    with pytest.raises(BackendError, match="cuda_graphs is set, but the device is cpu"):
        TorchBackend(tiny_artifacts, Manifest.load(tiny_artifacts), device="cpu", cuda_graphs=True)


def test_attention_kernels(tiny_artifacts: Path, backend: TorchBackend) -> None:
    manifest = Manifest.load(tiny_artifacts)
    inputs = step_inputs(backend._config)
    expected = run_all(backend, inputs)
    for attention in ("flash", "cudnn"):
        other = TorchBackend(tiny_artifacts, manifest, device="cpu", attention=attention)
        assert other.name == f"torch-{attention}"
        assert_near(run_all(other, inputs), expected, 1e-5)
    split = TorchBackend(tiny_artifacts, manifest, device="cpu", split_attention=True)
    assert split.name == "torch-split"
    for batch in (1, 3):
        inputs = step_inputs(backend._config, batch=batch)
        got, expected = run_all(split, inputs), run_all(backend, inputs)
        assert_near(got, expected, 1e-5)
        assert any((got[name] != expected[name]).any() for name in got), "another way of adding"
        for name, value in got.items():
            if name.startswith("first "):
                twin = name.replace("first", "encode" if "_ref." in name else "cached")
                np.testing.assert_array_equal(value, got[twin])
    with pytest.raises(BackendError, match="attention is 'fast', expected one of auto, flash, cud"):
        TorchBackend(tiny_artifacts, manifest, device="cpu", attention="fast")


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", True])
def test_bad_threads(threads: Any, tiny_artifacts: Path) -> None:
    with pytest.raises(BackendError, match="expected a whole number of 1 or more"):
        TorchBackend(tiny_artifacts, Manifest.load(tiny_artifacts), device="cpu", threads=threads)


@pytest.mark.parametrize(
    ("gpu", "dtype", "device", "chosen"),
    [
        (True, "bfloat16", None, "torch"),
        (True, "float32", None, "onnxruntime"),
        (True, "float32", "cuda:0", "torch"),
        (True, "float32", "cpu", "onnxruntime"),
        (False, "float32", None, "onnxruntime"),
    ],
)
def test_auto(
    gpu: bool,
    dtype: str,
    device: str | None,
    chosen: str,
    tiny_artifacts: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """bfloat16 goes to a GPU without engines through torch; the rest as before."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(gpu))
    manifest = replace(Manifest.load(tiny_artifacts), dtype=dtype)
    opened = backend_module.open_backend("auto", tiny_artifacts, manifest, device, None)
    assert opened.name == (f"{chosen}-cuda" if chosen == "torch" else chosen)
    if chosen == "torch":
        assert opened.device == torch.device("cuda", 0)


def test_options_by_name(tiny_artifacts: Path) -> None:
    def load(backend: str, **options: Any) -> Any:
        return KleinKVPipeline.from_pretrained(
            tiny_artifacts, backend=backend, device="cpu", backend_options=options
        ).backend

    assert load("torch", attention="flash", compile_blocks=True).name == "torch-compiled-flash"
    with pytest.raises(
        BackendError, match=r"\['compiled'\] are none of the torch .*compile_blocks"
    ):
        load("torch", compiled=True)
    with pytest.raises(BackendError, match="none of the onnxruntime backend, which has none"):
        load("auto", attention="flash")


def test_without_torch(tiny_artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        __import__("sys").modules, "klein_kv.runtime.backends.pytorch.backend", None
    )
    manifest = Manifest.load(tiny_artifacts)
    with pytest.raises(BackendError, match=r"not installed; .* pip install 'klein-kv\[torch\]'"):
        backend_module.open_backend("torch", tiny_artifacts, manifest, "cpu", None)


def test_errors_of_torch_become_the_projects(backend: TorchBackend) -> None:
    inputs = {name: backend.upload(x) for name, x in step_inputs(backend._config).items()}
    with pytest.raises(BackendError, match="encode_references failed in torch: "):
        backend.run("encode_references", inputs | {"ref_ids": inputs["ref_ids"][:3]})

    def full(_inputs: Any) -> Any:
        return torch.empty(1 << 55)

    backend._loaded["cached_step"] = full
    with pytest.raises(CapacityError, match=r"cached_step: out of memory .*use fewer references"):
        backend.run("cached_step", {})

    def full_gpu(_inputs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")

    backend._loaded["cached_step"] = full_gpu
    with pytest.raises(CapacityError, match=r"out of GPU memory \(CUDA out .* 9 GiB.\); use"):
        backend.run("cached_step", {})


def test_clock_of_a_cpu(backend: TorchBackend) -> None:
    marks = [backend.mark() for _ in range(3)]
    assert 0 <= backend.elapsed(marks[0], marks[1]) <= backend.elapsed(marks[0], marks[2]) < 1
    assert backend.available_memory() > 1 << 20


def test_keys_and_values_keep_nothing_else_alive(backend: TorchBackend) -> None:
    """A single block's values are a part of one large product; what is kept is a copy."""
    inputs = {name: backend.upload(x) for name, x in step_inputs(backend._config).items()}
    kv = backend.run("encode_references", inputs)
    assert list(kv) == kv_names(backend._config.transformer.num_blocks)
    for name, value in kv.items():
        assert value.is_contiguous()
        assert value.untyped_storage().nbytes() == value.nbytes, name


def test_command_line(tiny_bf16_artifacts: Path, tmp_path: Path, capsys: Any) -> None:
    """bfloat16 artifacts on a CPU, which no other backend runs."""
    out = tmp_path / "kite.png"
    size = ["--height", "128", "--width", "144", "--steps", "2", "--seed", "1"]
    options = ["--backend", "torch", "--device", "cpu", "--threads", "1"]
    argv = ["generate", str(tiny_bf16_artifacts), "-p", "a kite", "-o", str(out), *size, *options]
    assert main([*argv, "-q"]) == 0
    with Image.open(out) as image:
        assert image.size == (144, 128)
    assert capsys.readouterr().out.strip() == str(out)


# --- compiled blocks ---


@pytest.fixture
def compiler() -> Iterator[None]:
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
@pytest.mark.parametrize("split", [False, True])
def test_compiled_blocks(split: bool, tiny_artifacts: Path, backend: TorchBackend) -> None:
    """As eager to rounding; every kind of block is compiled once, however many there are."""
    compiled = TorchBackend(
        tiny_artifacts,
        Manifest.load(tiny_artifacts),
        device="cpu",
        compile_blocks=True,
        split_attention=split,
    )
    inputs = step_inputs(backend._config)
    assert_near(run_all(compiled, inputs), run_all(backend, inputs), 1e-5)
    net = backend._config.transformer
    # Two kinds of block and the last one, each on the reference stream and on the others'.
    assert (net.num_layers, net.num_single_layers) == (1, 2)
    assert counters["stats"]["unique_graphs"] == 6
    assert not counters["graph_break"]


# --- on a GPU ---


@pytest.fixture
def gpu() -> str:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU that torch sees")
    return "cuda:0"


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "options", [{}, {"cuda_graphs": True}, {"attention": "cudnn"}, {"split_attention": True}]
)
@pytest.mark.parametrize("compiled", [False, True])
def test_gpu_equals_cpu(
    options: dict[str, Any], compiled: bool, gpu: str, tiny_artifacts: Path, backend: TorchBackend
) -> None:
    torch.compiler.reset()
    manifest = Manifest.load(tiny_artifacts)
    theirs = TorchBackend(tiny_artifacts, manifest, device=gpu, compile_blocks=compiled, **options)
    for refs, batch in ((22, 1), (40, 2), (10, 1), (40, 2)):
        inputs = step_inputs(backend._config, refs, batch)
        assert_near(run_all(theirs, inputs), run_all(backend, inputs), 1e-4)


@pytest.mark.gpu
def test_gpu_pipeline_in_bfloat16(gpu: str, tiny_bf16_artifacts: Path, picture: Picture) -> None:
    """Graphs, store and callbacks on a GPU, against the same in float32 on the CPU's rounding."""
    manifest = Manifest.load(tiny_bf16_artifacts)
    request = {
        "image": [picture(128, 160), picture(96, 96)],
        "height": 128,
        "width": 144,
        "seed": 1,
        "output_type": "latent",
    }
    expected = load_ours(tiny_bf16_artifacts, "torch")("kite", **request).images
    for graphs in (False, True):
        backend = TorchBackend(tiny_bf16_artifacts, manifest, device=gpu, cuda_graphs=graphs)
        pipe = KleinKVPipeline(
            tiny_bf16_artifacts, manifest, backend, reference_cache_bytes=1 << 28
        )
        pipe.set_progress_bar_config(disable=True)
        results = [pipe("kite", **request).images for _ in range(3)]  # a miss, then hits
        np.testing.assert_array_equal(results[1], results[2])
        difference = np.abs(results[0].astype(np.float32) - expected.astype(np.float32))
        assert difference.max() < 0.3
        stats = pipe.reference_store.stats
        assert (stats.misses, stats.hits) == (1, 2)


@pytest.mark.gpu
def test_gpu_memory(
    gpu: str, tiny_artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uploads in pieces give the same bytes; release gives the memory back."""
    monkeypatch.setattr(torch_memory, "_STAGING_BYTES", 1000)
    backend = TorchBackend(tiny_artifacts, Manifest.load(tiny_artifacts), device=gpu)
    on_cpu = TorchBackend(tiny_artifacts, Manifest.load(tiny_artifacts), device="cpu")
    expected = on_cpu._weights.tensors("first_step")
    for name, tensor in backend._weights.tensors("first_step").items():
        assert torch.equal(tensor.cpu(), expected[name]), name
    for array in (np.arange(5000, dtype=np.int64), np.arange(7, dtype=np.uint8)):
        np.testing.assert_array_equal(backend.download(backend.upload(array)), array)
    del tensor
    gc.collect()
    before = torch.cuda.memory_allocated()
    run_all(backend, step_inputs(backend._config))
    for graph in ("first_step", "cached_step", "encode_references"):
        backend.release(graph)
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + (1 << 20)
    start = backend.mark()
    assert backend.elapsed(start, backend.mark()) >= 0


@pytest.mark.gpu
def test_gpu_loop_does_not_wait(gpu: str, tiny_bf16_artifacts: Path) -> None:
    """torch reports every call that would wait for the device."""
    backend = TorchBackend(tiny_bf16_artifacts, Manifest.load(tiny_bf16_artifacts), device=gpu)
    inputs = step_inputs(backend._config)
    run_all(backend, inputs, "bfloat16")
    wide = ("timestep", "sigma_step")
    x = {
        name: backend.upload(value).bfloat16()
        if value.dtype == np.float32 and name not in wide
        else backend.upload(value)
        for name, value in inputs.items()
    }
    references = {name: x.pop(name) for name in ("ref_hidden_states", "ref_ids")}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = backend.run("first_step", x | references)
        kv = {name: value for name, value in outputs.items() if "_ref." in name}
        for _ in range(3):
            step = {name: backend.upload(inputs[name]) for name in wide}
            outputs = backend.run("cached_step", x | kv | step)
            x["hidden_states"] = outputs["latents"]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(torch.isfinite(x["hidden_states"]).all())
