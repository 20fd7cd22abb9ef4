"""Which backend is opened, with which options."""

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from klein_kv import KleinKVPipeline
from klein_kv.artifacts.manifest import Manifest
from klein_kv.errors import ArtifactError, BackendError
from klein_kv.runtime.backends.backend import open_backend


@pytest.mark.parametrize(
    ("name", "device", "threads", "kind", "message"),
    [
        *(
            ("auto", "cpu", threads, BackendError, "expected a whole number of 1 or more")
            for threads in (0, -1, 1.5, "2", True)
        ),
        ("jax", None, None, BackendError, "backend is 'jax', expected one of auto, onnx"),
        ("auto", "tpu", None, BackendError, "device is 'tpu', expected 'cpu', 'cuda' or 'cuda:N'"),
        ("tensorrt", "cpu", None, BackendError, "expected 'cuda'"),
        ("tensorrt", None, None, ArtifactError, "klein-kv build"),
    ],
)
def test_what_cannot_be_opened(name, device, threads, kind, message, tiny_artifacts):
    with pytest.raises(kind, match=message):
        open_backend(name, tiny_artifacts, Manifest.load(tiny_artifacts), device, threads)


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
def test_auto(gpu, dtype, device, chosen, tiny_artifacts, monkeypatch):
    """Without engines bfloat16 goes through torch, for ONNX Runtime has none of it on a CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(gpu))
    manifest = replace(Manifest.load(tiny_artifacts), dtype=dtype)
    assert open_backend("auto", tiny_artifacts, manifest, device, None).name == chosen


def test_without_torch(tiny_artifacts, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    manifest = replace(Manifest.load(tiny_artifacts), dtype="bfloat16")
    with pytest.raises(BackendError, match=r"needs torch, .* pip install 'klein-kv\[torch\]'"):
        open_backend("torch", tiny_artifacts, manifest, "cpu", None)
    with pytest.raises(BackendError, match=r"is bfloat16, .* export .* --dtype fp32"):
        open_backend("auto", tiny_artifacts, manifest, "cpu", None)


def test_quantized_graphs_are_not_for_torch(tiny_artifacts):
    """`auto` leaves them to ONNX Runtime, which says what it lacks for them here."""
    manifest = replace(Manifest.load(tiny_artifacts), dtype="bfloat16")
    graphs = replace(manifest.graphs, quantized=(("transformer", "fp8"),))
    with pytest.raises(BackendError, match="torch backend does not compute precision 'fp8'; use"):
        open_backend("torch", tiny_artifacts, manifest, "cpu", None, graphs)
    with pytest.raises(BackendError, match="which ONNX Runtime does not compute on a CPU"):
        open_backend("auto", tiny_artifacts, manifest, "cpu", None, graphs)


def test_options_by_name(tiny_artifacts):
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
