"""The torch backend apart from its arithmetic, which the parity tests hold against diffusers."""

import gc
import json
import shutil
import sys
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
from klein_kv.artifacts.config import ModelConfig
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.positions import grid_ids, reference_ids, text_ids
from klein_kv.artifacts.signature import kv_names
from klein_kv.artifacts.weights import NUMPY_DTYPES, WeightRef
from klein_kv.cli import main
from klein_kv.errors import ArtifactError, BackendError, CapacityError
from klein_kv.runtime.backends.backend import open_backend
from klein_kv.runtime.backends.pytorch import memory as torch_memory
from klein_kv.runtime.backends.pytorch.backend import TorchBackend
from klein_kv.runtime.backends.pytorch.weights import FolderWeights, whole_weights
from tests.conftest import load_ours

Picture = Callable[..., Image.Image]
Arrays = dict[str, Any]

CPU = torch.device("cpu")


def open_torch(artifacts: Path, device: str = "cpu", **options: Any) -> TorchBackend:
    return TorchBackend(
        FolderWeights(artifacts, Manifest.load(artifacts), device=device), **options
    )


@pytest.fixture
def backend(tiny_artifacts: Path) -> TorchBackend:
    return open_torch(tiny_artifacts)


@pytest.fixture
def config(tiny_artifacts: Path) -> ModelConfig:
    return Manifest.load(tiny_artifacts).config


def step_inputs(config: ModelConfig, refs: int = 22, batch: int = 1, side: int = 4) -> Arrays:
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


def test_weights_are_mapped_and_those_of_the_checkpoint(
    tiny_artifacts: Path, tiny_theirs: Flux2KleinKVPipeline
) -> None:
    weights = FolderWeights(tiny_artifacts, Manifest.load(tiny_artifacts), device="cpu")
    for component in ("transformer", "text_encoder"):
        state = getattr(tiny_theirs, component).state_dict()
        tensors = weights.load(component)
        assert all(torch.equal(tensor, state[name]) for name, tensor in tensors.items())
    tensors = weights.load("transformer")
    assert tensors.keys() == tiny_theirs.transformer.state_dict().keys()
    vae, theirs = weights.load("vae").state_dict(), tiny_theirs.vae.state_dict()
    assert vae.keys() == theirs.keys()
    assert all(torch.equal(vae[name], x) for name, x in theirs.items() if x.is_floating_point())
    files = {str(path) for path in (tiny_artifacts / "transformer").glob("*.safetensors")}
    address = tensors["x_embedder.weight"].data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(x, 16) for x in line.split()[0].split("-"))
        if begin <= address < end:
            assert line.split(maxsplit=5)[5] in files
            break
    else:
        pytest.fail("the weights lie in no mapping")


def test_graphs_share_weights_and_release_frees_them(
    backend: TorchBackend, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    load = FolderWeights.load

    def watch(self: FolderWeights, component: str) -> Any:
        tensors = load(self, component)
        loaded.append(weakref.ref(tensors["proj_out.weight"]))
        return tensors

    monkeypatch.setattr(FolderWeights, "load", watch)
    inputs = step_inputs(config)
    run_all(backend, inputs)
    assert len(loaded) == 1
    for graph in ("first_step", "cached_step", "encode_references"):
        assert loaded[0]() is not None, "a loaded graph has them"
        backend.release(graph)
        backend.release(graph)
        gc.collect()
    assert loaded[0]() is None
    run_all(backend, inputs)
    assert len(loaded) == 2


def test_memory_of_a_graph(backend: TorchBackend) -> None:
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


def test_tensors_of_files(tmp_path: Path) -> None:
    """At any offset, as other libraries' headers have any length; and never written back."""
    values = np.arange(40, dtype=np.float32)
    path = tmp_path / "odd.bin"
    path.write_bytes(b"\0" * 8 + values.tobytes() + b"\0" + values.tobytes())
    files: dict[Path, torch.Tensor] = {}
    for offset in (8, 169):
        ref = WeightRef(path, offset, 160, "float32", (4, 10))
        tensor = torch_memory.map_tensor(ref, files)
        np.testing.assert_array_equal(tensor.numpy(), values.reshape(4, 10))
        tensor.mul_(3)
    assert path.read_bytes()[8:168] == values.tobytes()
    missing = replace(ref, path=tmp_path / "gone")
    with pytest.raises(ArtifactError, match=r"gone cannot be mapped: .*export again"):
        torch_memory.map_tensor(missing, files)
    with pytest.raises(ArtifactError, match="holds float4_e2m1fn, expected one of float32"):
        torch_memory.map_tensor(replace(ref, dtype="float4_e2m1fn"), files)


class LateStream:
    """In place of a CUDA stream: a copy that is on its way happens when someone waits for it."""

    def __init__(self) -> None:
        self.pending: list[tuple[torch.Tensor, torch.Tensor]] = []

    def synchronize(self) -> None:
        for target, source in self.pending:
            target.copy_(source)
        self.pending.clear()


@pytest.mark.parametrize("nbytes", [0, 8, 1000, 1008, 5000])
def test_pieces_of_an_upload(nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way to a GPU, onto the CPU: no buffer is filled again before its copy is done."""
    stream, empty, copy = LateStream(), torch.empty, torch.Tensor.copy_

    def copy_late(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> Any:
        if not non_blocking:
            return copy(target, source)
        stream.pending.append((target, source))
        return target

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
        patch.setattr(torch.cuda, "current_stream", lambda _device: stream)
        patch.setattr(torch.Tensor, "copy_", copy_late)
        patch.setattr(torch_memory, "_STAGING_BYTES", 1000)
        staging = torch_memory.Staging(CPU)
        rng = np.random.default_rng(0)
        values = [torch.from_numpy(rng.standard_normal(nbytes // 8)) for _ in range(3)]
        copies = [staging.copy(x) for x in values]  # the buffers serve many tensors
        assert len(stream.pending) <= 1
    stream.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(copies, values, strict=True))


def test_row_ranges_are_joined() -> None:
    ref = WeightRef(Path("w"), 100, 240, "float32", (10, 6))
    table = {"x[4:10]": ref.rows(4, 10), "x[0:4]": ref.rows(0, 4), "y": ref}
    assert whole_weights(table) == {"x": ref, "y": ref}
    assert whole_weights(table | {"x": ref})["x"] == ref
    gap = {"x[0:4]": ref.rows(0, 4), "x[5:10]": ref.rows(5, 10)}
    with pytest.raises(ArtifactError, match="x: row 5 is at byte 220 of w, expected row 4 at byte"):
        whole_weights(gap)
    with pytest.raises(ArtifactError, match="row 4 is at byte 8 of w, expected row 4 at byte 196"):
        whole_weights(table | {"x[4:10]": replace(ref.rows(4, 10), offset=8)})
    with pytest.raises(ArtifactError, match=r"row 4 .* expected row 0"):
        whole_weights({"x[4:10]": ref.rows(4, 10)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x_embedder.weight": None},
            r"tensor x_embedder\.weight is missing, expected .* \(64, 128",
        ),
        ({"x_embedder.weight": [64, 64]}, r"x_embedder.weight is torch.float32 \(64, 64\) on cpu"),
    ],
)
def test_folders_whose_weights_are_others(
    change: dict[str, Any], message: str, tiny_artifacts: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_artifacts, tmp_path / "a", copy_function=shutil.copy))
    for path in (folder / "transformer").glob("*.weights.json"):
        table = json.loads(path.read_text())
        for name, shape in change.items():
            entry = table.pop(name, None)
            if entry is not None and shape is not None:
                table[name] = [*entry[:2], 4 * shape[0] * shape[1], entry[3], shape]
        path.write_text(json.dumps(table))
    backend = TorchBackend(FolderWeights(folder, Manifest.load(tiny_artifacts), device="cpu"))
    with pytest.raises(ArtifactError, match=f"{message}.*export again"):
        backend.run("first_step", {})


def test_artifacts_without_the_vaes_configuration(tiny_artifacts: Path) -> None:
    """Folders from before it was written run with the other backends."""
    manifest = Manifest.load(tiny_artifacts)
    files = {name: record for name, record in manifest.files.items() if name != "vae/config.json"}
    weights = FolderWeights(tiny_artifacts, replace(manifest, files=files), device="cpu")
    with pytest.raises(ArtifactError, match=r"has no vae/config.json, .*export again"):
        TorchBackend(weights).run("vae_decoder", {})


def test_vae_configuration_of_another_vae(tiny_artifacts: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_artifacts, tmp_path / "a", copy_function=shutil.copy)
    path = tmp_path / "a/vae/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"block_out_channels": [32, 32, 32, 32]}))
    weights = FolderWeights(tmp_path / "a", Manifest.load(tiny_artifacts), device="cpu")
    backend = TorchBackend(weights)
    with pytest.raises(ArtifactError, match=r"the VAE's weights do not fit vae/config\.json"):
        backend.run("vae_decoder", {})
    path.write_text(json.dumps(config | {"block_out_channels": "wide"}))
    with pytest.raises(ArtifactError, match="diffusers cannot build the model"):
        backend.run("vae_decoder", {})


# --- weights at hand ---


def test_from_tensors_shares_memory(
    backend: TorchBackend, config: ModelConfig, tiny_theirs: Flux2KleinKVPipeline
) -> None:
    """diffusers' own modules, no artifact folder."""
    given = TorchBackend.from_tensors(
        config,
        "float32",
        device="cpu",
        transformer=dict(tiny_theirs.transformer.named_parameters()),  # which have gradients
        text_encoder=tiny_theirs.text_encoder.state_dict(),
        vae=tiny_theirs.vae,
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


def test_from_tensors_checks(config: ModelConfig, tiny_theirs: Flux2KleinKVPipeline) -> None:
    state = tiny_theirs.transformer.state_dict()

    def make(**change: Any) -> TorchBackend:
        return TorchBackend.from_tensors(config, "float32", device="cpu", **change)

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
    for graph, part in (("cached_step", "transformer"), ("vae_decoder", "vae")):
        with pytest.raises(BackendError, match=f"without the {part}'s weights; .* from_tensors"):
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


def test_cuda_graphs_are_for_gpus(tiny_artifacts: Path) -> None:
    with pytest.raises(BackendError, match="cuda_graphs is set, but the device is cpu"):
        open_torch(tiny_artifacts, cuda_graphs=True)
    backend = open_torch(tiny_artifacts)
    assert backend.graph_memory("cached_step").kv_copies == 0
    backend._capture = object()  # type: ignore[assignment]  # as on a GPU
    assert backend.graph_memory("cached_step").kv_copies == 1, "a second place for them"
    assert backend.graph_memory("first_step").kv_copies == 0


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", True])
def test_bad_threads(threads: Any, tiny_artifacts: Path) -> None:
    manifest = Manifest.load(tiny_artifacts)
    with pytest.raises(BackendError, match="expected a whole number of 1 or more"):
        open_backend("auto", tiny_artifacts, manifest, "cpu", threads)


@pytest.mark.parametrize(
    ("gpu", "dtype", "device", "chosen"),
    [
        (True, "bfloat16", None, "torch-cuda"),
        (True, "bfloat16", "cpu", "torch"),
        (True, "float32", None, "onnxruntime"),
        (True, "float32", "cuda:0", "torch-cuda"),
        (True, "float32", "cpu", "onnxruntime"),
        (False, "bfloat16", None, "torch"),
        (False, "bfloat16", "cpu", "torch"),
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
    """Without engines bfloat16 goes through torch, for ONNX Runtime has none of it on a CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(gpu))
    manifest = replace(Manifest.load(tiny_artifacts), dtype=dtype)
    assert open_backend("auto", tiny_artifacts, manifest, device, None).name == chosen


@pytest.mark.parametrize("missing", ["torch", "diffusers"])
def test_without_torch(missing: str, tiny_artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    manifest = replace(Manifest.load(tiny_artifacts), dtype="bfloat16")
    with pytest.raises(BackendError, match=rf"needs {missing}, .* pip install 'klein-kv\[torch\]'"):
        open_backend("torch", tiny_artifacts, manifest, "cpu", None)
    with pytest.raises(BackendError, match=r"is bfloat16, .* export .* --dtype fp32"):
        open_backend("auto", tiny_artifacts, manifest, "cpu", None)


def test_quantized_graphs_are_not_for_torch(tiny_artifacts: Path) -> None:
    """`auto` leaves them to ONNX Runtime, which says what it lacks for them here."""
    manifest = replace(Manifest.load(tiny_artifacts), dtype="bfloat16")
    graphs = replace(manifest.graphs, quantized=(("transformer", "fp8"),))
    with pytest.raises(BackendError, match="torch backend does not compute precision 'fp8'; use"):
        open_backend("torch", tiny_artifacts, manifest, "cpu", None, graphs)
    with pytest.raises(BackendError, match="which ONNX Runtime does not compute on a CPU"):
        open_backend("auto", tiny_artifacts, manifest, "cpu", None, graphs)


def test_options_by_name(tiny_artifacts: Path) -> None:
    def load(backend: str, **options: Any) -> Any:
        return KleinKVPipeline.from_pretrained(
            tiny_artifacts, backend=backend, device="cpu", backend_options=options
        ).backend

    assert load("torch", compile_blocks=True).name == "torch-compiled"
    with pytest.raises(
        BackendError, match=r"\['compiled'\] are none of the torch .*compile_blocks"
    ):
        load("torch", compiled=True)
    with pytest.raises(BackendError, match="none of the onnxruntime backend, which has none"):
        load("auto", compile_blocks=True)


def test_errors_of_torch_become_the_projects(backend: TorchBackend, config: ModelConfig) -> None:
    inputs = {name: backend.upload(x) for name, x in step_inputs(config).items()}
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
    with pytest.raises(CapacityError, match=r"out of memory \(CUDA out .* 9 GiB.\); use"):
        backend.run("cached_step", {})


def test_clock_of_a_cpu(backend: TorchBackend) -> None:
    marks = [backend.mark() for _ in range(3)]
    assert 0 <= backend.elapsed(marks[0], marks[1]) <= backend.elapsed(marks[0], marks[2]) < 1
    assert backend.available_memory() > 1 << 20


def test_keys_and_values_keep_nothing_else_alive(
    backend: TorchBackend, config: ModelConfig
) -> None:
    """A single block's values are a part of one large product; what is kept is a copy."""
    inputs = {name: backend.upload(x) for name, x in step_inputs(config).items()}
    kv = backend.run("encode_references", inputs)
    assert list(kv) == kv_names(config.transformer.num_blocks)
    for name, value in kv.items():
        assert value.is_contiguous()
        assert value.untyped_storage().nbytes() == value.nbytes, name


def test_command_line(tiny_bf16_artifacts: Path, tmp_path: Path, capsys: Any) -> None:
    """bfloat16 artifacts on a CPU, which no other backend runs: "auto" takes torch."""
    out = tmp_path / "kite.png"
    size = ["--height", "128", "--width", "144", "--steps", "2", "--seed", "1"]
    options = ["--device", "cpu", "--threads", "1"]
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
def test_compiled_blocks(tiny_artifacts: Path, backend: TorchBackend, config: ModelConfig) -> None:
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
def gpu() -> str:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU that torch sees")
    return "cuda:0"


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_gpu_equals_cpu(
    graphs: bool,
    compiled: bool,
    gpu: str,
    tiny_artifacts: Path,
    backend: TorchBackend,
    config: ModelConfig,
) -> None:
    torch.compiler.reset()
    theirs = open_torch(tiny_artifacts, gpu, compile_blocks=compiled, cuda_graphs=graphs)
    for refs, batch in ((22, 1), (40, 2), (10, 1), (40, 2)):
        inputs = step_inputs(config, refs, batch)
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
        backend = open_torch(tiny_bf16_artifacts, gpu, cuda_graphs=graphs)
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
    gpu: str, tiny_artifacts: Path, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_gpu_loop_does_not_wait(gpu: str, tiny_bf16_artifacts: Path, config: ModelConfig) -> None:
    """torch reports every call that would wait for the device."""
    backend = open_torch(tiny_bf16_artifacts, gpu)
    inputs = step_inputs(config)
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
