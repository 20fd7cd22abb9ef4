"""Graphs with float8 keys and values against the graphs without, run by ONNX Runtime.

Both do the same arithmetic around the rounding, so everything here is equal bit for bit.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.signature import KVFormat, kv_names
from klein_kv.networks.torch_ops import TorchOps
from klein_kv.runtime.backends.ort.backend import OrtBackend
from tests.runtime.graph_inputs import Arrays, cast, reference_inputs, step_inputs

BLOCKS = 3


class Subject:
    """One artifact folder, opened for each kind of keys and values."""

    def __init__(self, artifacts: Path) -> None:
        manifest = Manifest.load(artifacts)
        self.net, self.dtype = manifest.config.transformer, manifest.dtype
        self.backends = {
            kv_dtype: OrtBackend(artifacts, manifest, 1, manifest.choose_graphs(kv_dtype))
            for kv_dtype in (manifest.dtype, KVFormat.FP8_PER_HEAD)
        }
        self.ops = TorchOps({"unused": torch.zeros(1)}, getattr(torch, self.dtype))

    def run(self, graph: str, inputs: Arrays, packed: bool) -> Arrays:
        backend = self.backends[KVFormat.FP8_PER_HEAD if packed else self.dtype]
        buffers = {name: backend.upload(array) for name, array in inputs.items()}
        return {name: backend.download(x) for name, x in backend.run(graph, buffers).items()}

    def pack(self, kv: Arrays) -> Arrays:
        """Keys and values as the graphs are to hand them on."""
        packed = {}
        for name in kv_names(BLOCKS):
            values, scale = self.ops.quantize_kv(torch.from_numpy(kv[name].copy()))
            part, _, block = name.partition(".")
            packed[name] = values.view(torch.uint8).numpy()
            packed[f"{part}_scale.{block}"] = scale.numpy()
        return packed

    def unpack(self, packed: Arrays) -> Arrays:
        kv = {}
        for name in kv_names(BLOCKS):
            part, _, block = name.partition(".")
            bytes_ = torch.from_numpy(packed[name].view(np.uint8).copy())
            values = bytes_.view(torch.float8_e4m3fn)
            scale = torch.from_numpy(packed[f"{part}_scale.{block}"].copy())
            kv[name] = self.ops.dequantize_kv(values, scale).numpy()
        return kv


@pytest.fixture(scope="module", params=["tiny_artifacts", "tiny_fp16_artifacts"])
def subject(request):
    return Subject(request.getfixturevalue(request.param))


def references(subject: Subject, count: int) -> Arrays:
    return cast(reference_inputs(subject.net, count * [(5, 4)], seed=count), subject.dtype)


def step(subject: Subject) -> Arrays:
    return cast(step_inputs(subject.net, text_tokens=9, grid=(6, 4)), subject.dtype)


@pytest.mark.parametrize("count", [1, 3])
def test_what_references_become_is_rounded_at_the_end(subject, count):
    inputs = references(subject, count)
    whole = subject.run("encode_references", inputs, packed=False)
    packed = subject.run("encode_references", inputs, packed=True)
    assert list(packed) == kv_names(BLOCKS, KVFormat.FP8_PER_HEAD)
    for name, expected in subject.pack(whole).items():
        got = packed[name]
        assert got.dtype == ("float32" if "_scale." in name else "float8_e4m3fn")
        np.testing.assert_array_equal(got.view(expected.dtype), expected, name)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_cached_step_computes_on_what_the_bytes_stand_for(subject, count):
    if count:
        packed = subject.run("encode_references", references(subject, count), packed=True)
    else:
        shape = (1, 0, subject.net.num_attention_heads, subject.net.attention_head_dim)
        none = {name: np.zeros(shape, np.float32) for name in kv_names(BLOCKS)}
        packed = subject.pack(none)
        f8 = np.dtype("float8_e4m3fn")
        packed = {k: v if v.dtype == np.float32 else v.view(f8) for k, v in packed.items()}
    expected = subject.run("cached_step", step(subject) | subject.unpack(packed), packed=False)
    got = subject.run("cached_step", step(subject) | packed, packed=True)
    for name in ("noise_pred", "latents"):
        assert got[name].dtype == subject.dtype
        np.testing.assert_array_equal(got[name], expected[name], name)


@pytest.mark.parametrize("count", [1, 3])
def test_first_step_is_the_two_after_each_other(subject, count):
    inputs = references(subject, count)
    packed = subject.run("encode_references", inputs, packed=True)
    expected = subject.run("cached_step", step(subject) | packed, packed=True) | packed
    got = subject.run("first_step", step(subject) | inputs, packed=True)
    assert set(got) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(got[name].view(np.uint8), array.view(np.uint8), name)
