"""The ONNX Runtime backend: sessions, and artifact folders that were tampered with."""

import gc
import json
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest

from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.signature import GRAPH_FILES
from klein_kv.artifacts.weights import weights_file
from klein_kv.errors import ArtifactError, BackendError, KleinKVError
from klein_kv.runtime.backends.ort.backend import OrtBackend


@pytest.fixture(scope="module")
def backend(tiny_artifacts):
    return open_cpu(tiny_artifacts)


def open_cpu(folder, threads=1):
    return OrtBackend(folder, Manifest.load(folder, check_files=False), threads)


def feeds(backend):
    """Inputs of `encode_references`."""
    tokens = np.random.default_rng(0).standard_normal((1, 6, 128), np.float32)
    ids = np.zeros((6, 4), np.int64)
    return {"ref_hidden_states": backend.upload(tokens), "ref_ids": backend.upload(ids)}


# --- buffers ---


def test_a_buffer_is_a_copy_and_its_download_is_not(backend):
    array = np.arange(24.0, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1)
    expected = array.copy()
    buffer = backend.upload(array)
    array[:] = -1
    np.testing.assert_array_equal(backend.download(buffer), expected)
    assert backend.download(buffer).ctypes.data == buffer.data_ptr()
    for dtype in (np.float64, np.int32, np.bool_, object):
        with pytest.raises(BackendError, match="cannot upload"):
            backend.upload(np.zeros(3, dtype))


def test_downloaded_memory_outlives_the_buffer(backend):
    """Regression: a view of an uploaded buffer pointed at memory that had been given back."""
    views = [backend.download(backend.upload(np.full(1 << 16, i, np.float32))) for i in range(8)]
    gc.collect()
    other = [np.full(1 << 16, -1, np.float32) for _ in range(8)]
    assert [view[::4096].tolist() for view in views] == [[i] * 16 for i in range(8)]
    del other


def test_every_run_gives_new_buffers(backend):
    one = backend.run("encode_references", feeds(backend))
    values = {name: buffer.numpy().copy() for name, buffer in one.items()}
    two = backend.run("encode_references", feeds(backend))
    pointers = [buffer.data_ptr() for buffer in (*one.values(), *two.values())]
    assert len(set(pointers)) == len(pointers)
    for name, value in values.items():
        np.testing.assert_array_equal(one[name].numpy(), value)
        np.testing.assert_array_equal(two[name].numpy(), value)


# --- sessions ---


def test_a_released_graph_is_loaded_again(tiny_artifacts):
    backend = open_cpu(tiny_artifacts)
    inputs = feeds(backend)
    first = backend.run("encode_references", inputs)
    session = backend._sessions["encode_references"]
    backend.run("encode_references", inputs)
    assert backend._sessions == {"encode_references": session}
    for _ in range(2):
        backend.release("encode_references")
    again = backend.run("encode_references", inputs)
    assert backend._sessions["encode_references"] is not session
    np.testing.assert_array_equal(first["k_ref.0"].numpy(), again["k_ref.0"].numpy())


def test_threads_load_a_graph_once(tiny_artifacts, monkeypatch):
    """Two at once placed the weights twice, and freed those that the first session read."""
    backend = open_cpu(tiny_artifacts)
    load, loaded = backend._load, []

    def slow(graph):
        loaded.append(graph)
        time.sleep(0.1)
        return load(graph)

    monkeypatch.setattr(backend, "_load", slow)
    inputs = feeds(backend)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: backend.run("encode_references", inputs), range(4)))
    assert loaded == ["encode_references"]


@pytest.mark.parametrize("threads", [None, 1, 2])
def test_threads(threads, tiny_artifacts):
    backend = open_cpu(tiny_artifacts, threads)
    gc.collect()  # sessions of other tests take their threads along
    before = psutil.Process().num_threads()
    session = backend._load("encode_references")
    assert session.get_session_options().intra_op_num_threads == (threads or 0)
    if threads is not None:
        assert psutil.Process().num_threads() - before == threads - 1


def test_wrong_inputs(backend):
    inputs = feeds(backend)
    far = backend.upload(np.full((6, 4), 5000, np.int64))
    for wrong in ({"ref_ids": inputs["ref_ids"]}, inputs | {"ref_ids": far}):
        with pytest.raises(BackendError, match="encode_references failed in ONNX Runtime"):
            backend.run("encode_references", wrong)


# --- refused ---


def test_missing_library(tiny_artifacts, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"pip install 'klein-kv\[cpu\]'"):
        open_cpu(tiny_artifacts)


@pytest.fixture
def folder(tiny_artifacts, tmp_path):
    """A copy to tamper with, weights beside it, and a link to these inside."""
    folder = Path(shutil.copytree(tiny_artifacts, tmp_path / "artifacts"))
    weights = folder / "transformer/diffusion_pytorch_model.safetensors"
    outside = Path(shutil.copy(weights, tmp_path))
    (folder / "transformer/link").symlink_to(outside)
    return folder


def change_table(folder, graph, change):
    """Rewrites the entries of a weight table."""
    path = folder / weights_file(GRAPH_FILES[graph])
    table = json.loads(path.read_text())
    path.write_text(json.dumps({name: change(entry) for name, entry in table.items()}))


@pytest.mark.parametrize(
    "location",
    [
        "../../{name}",
        "../transformer/../../{name}",
        "{outside}/{name}",
        "../vae/diffusion_pytorch_model.safetensors",
        "link",
        "missing.safetensors",
        "",
    ],
)
@pytest.mark.parametrize("table", ["whole", "emptied"])
def test_external_data_outside_the_folder(location, table, folder):
    """Refused whatever the digests say, with or without the weights given by address."""
    path = folder / GRAPH_FILES["encode_references"]
    model = onnx.load(path, load_external_data=False)  # noqa: TID251 - the graph alone
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location.format(name=entry.value, outside=folder.parent)
    onnx.save(model, path)
    if table == "emptied":
        (folder / weights_file(GRAPH_FILES["encode_references"])).write_text("{}")
    backend = open_cpu(folder)
    with pytest.raises(ArtifactError, match="cannot be loaded by ONNX Runtime") as caught:
        backend.run("encode_references", feeds(backend))
    assert str(path) in str(caught.value)
    assert not backend._sessions
    backend.replace_weights({"x_embedder.weight": None})  # what did not load is not loaded anew


OUTSIDE = "../../diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("file", [OUTSIDE, "/etc/hostname", "link", "missing.safetensors"])
def test_weight_table_outside_the_folder(file, folder):
    change_table(folder, "first_step", lambda entry: [file, *entry[1:]])
    with pytest.raises(ArtifactError, match=file):
        open_cpu(folder).run("first_step", {})


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x08\x0b"])
def test_damaged_graph(content, folder):
    (folder / GRAPH_FILES["vae_encoder"]).write_bytes(content)
    with pytest.raises(ArtifactError, match="export again"):
        open_cpu(folder).run("vae_encoder", {})


def test_graph_of_another_kind(folder):
    for name in (GRAPH_FILES["cached_step"], weights_file(GRAPH_FILES["cached_step"])):
        shutil.copy(folder / name.replace("cached_step", "first_step"), folder / name)
    with pytest.raises(ArtifactError, match="was not exported by this version"):
        open_cpu(folder).run("cached_step", {})


def test_weights_of_another_type(folder):
    """A table that calls half of a float32 tensor a float16 one."""
    change_table(
        folder,
        "encode_references",
        lambda entry: [*entry[:2], entry[2] // 2, "float16", *entry[4:]],
    )
    backend = open_cpu(folder)
    with pytest.raises(KleinKVError):
        backend.run("encode_references", feeds(backend))
