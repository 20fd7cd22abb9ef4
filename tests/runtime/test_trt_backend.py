"""The TensorRT executor, on stand-ins for CUDA and TensorRT that compute on the host.

What runs for real: allocation, uploads, bindings, shapes, the loop over engines, and that keys and
values are handed on without a copy. What does not: TensorRT itself. No GPU is needed or used.
"""

import gc
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from klein_kv.engines.manifest import EngineManifest, EngineRecord
from klein_kv.errors import ArtifactError, BackendError, BuildError, CapacityError, RequestError
from klein_kv.manifest import Manifest, graph_weights
from klein_kv.runtime import cuda_memory, ort_device, trt_backend
from klein_kv.runtime.backend import open_backend
from klein_kv.runtime.cuda_memory import CudaMemory
from klein_kv.runtime.pipeline import KleinKVPipeline
from klein_kv.runtime.trt_backend import TrtBackend
from klein_kv.signature import GRAPH_FILES, kv_names, make_signature
from klein_kv.weights import map_weight
from tests.runtime.fake_engines import make_engines
from tests.runtime.fake_gpu import FakeCudart, FakeTrt, array_at


@pytest.fixture
def engines(tiny_artifacts: Path, tmp_path: Path) -> Path:
    """A folder of "engines" of the tiny artifacts."""
    return make_engines(tiny_artifacts, tmp_path)


@pytest.fixture
def backend(tiny_artifacts: Path, engines: Path) -> TrtBackend:
    manifest = Manifest.load(tiny_artifacts)
    return TrtBackend(
        tiny_artifacts,
        manifest,
        engines=engines,
        cudart=FakeCudart(),
        trt=FakeTrt(tiny_artifacts),
    )


def pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (128 + 16 * i, 144, 3), dtype=np.uint8))
        for i in range(count)
    ]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_loop_over_engines_equals_onnxruntime(tiny_artifacts, backend, count):
    expected = KleinKVPipeline.from_pretrained(tiny_artifacts, backend="onnxruntime", threads=1)
    ours = KleinKVPipeline(tiny_artifacts, Manifest.load(tiny_artifacts), backend)
    request = {
        "prompt": "a kite",
        "image": pictures(count) or None,
        "height": 128,
        "width": 160,
        "seed": 3,
        "output_type": "np",
    }
    for pipe in (expected, ours):
        pipe.set_progress_bar_config(disable=True)
    first, again = ours(**request).images, ours(**request).images
    np.testing.assert_allclose(first, expected(**request).images, atol=1e-5)
    np.testing.assert_array_equal(first, again)


def step_inputs(backend: TrtBackend, manifest: Manifest, refs: int) -> dict:
    sizes = {"batch": 1, "image_tokens": 20, "text_tokens": 8, "ref_tokens": refs}
    rng = np.random.default_rng(1)
    inputs = {}
    for spec in make_signature("first_step", manifest.config, manifest.dtype).inputs:
        shape = spec.concrete(sizes)
        value = (
            rng.integers(0, 20, shape)
            if spec.dtype == "int64"
            else rng.standard_normal(shape).astype(np.float32)
        )
        inputs[spec.name] = backend.upload(value)
    return inputs


def test_keys_and_values_are_handed_on_by_address(tiny_artifacts, backend):
    manifest = Manifest.load(tiny_artifacts)
    cudart, trt = backend._memory.cudart, backend._trt
    inputs = step_inputs(backend, manifest, 24)
    first = backend.run("first_step", inputs)
    names = kv_names(manifest.config.transformer.num_blocks)
    feeds = {name: inputs[name] for name in inputs if not name.startswith("ref_")}
    feeds |= {name: first[name] for name in names}
    backend.run("cached_step", feeds)
    context = trt.engines["cached_step"].contexts[0]
    assert [context.addresses[n] for n in names] == [first[n].pointer for n in names]

    copies, memory, addresses = len(cudart.copies), cudart.used, []
    for _ in range(4):
        out = backend.run("cached_step", feeds)
        feeds["hidden_states"] = out["latents"]
        addresses.append((out["latents"].pointer, out["noise_pred"].pointer))
        del out
    assert len(cudart.copies) == copies, "a step copied something"
    assert cudart.used <= memory + 2 * first["latents"].nbytes + 1024
    assert addresses[0] == addresses[2], "captured graphs need addresses that come back"


def test_engines_share_one_copy_of_the_weights(tiny_artifacts, backend):
    manifest = Manifest.load(tiny_artifacts)
    inputs = step_inputs(backend, manifest, 24)
    backend.run("first_step", inputs)
    used, uploads = backend._memory.cudart.used, len(backend._weights)
    references = {name: inputs[name] for name in inputs if name.startswith("ref_")}
    backend.run("encode_references", references)
    assert len(backend._weights) == uploads
    contexts = [backend._trt.engines[g].contexts[0] for g in ("first_step", "encode_references")]
    shared = set(graph_weights(tiny_artifacts, GRAPH_FILES["encode_references"]))
    assert shared
    for name in shared:
        assert contexts[0].addresses[name] == contexts[1].addresses[name]
    kv = manifest.config.transformer.kv_bytes(24, "float32")
    assert backend._memory.cudart.used <= used + kv + 4096


def test_release_and_close_free_device_memory(tiny_artifacts, backend):
    cudart = backend._memory.cudart
    ids = np.ones((1, 8), np.int64)
    feeds = {name: backend.upload(ids) for name in ("input_ids", "attention_mask")}
    out = backend.run("text_encoder", feeds)
    weights = sum(
        r.nbytes for r in graph_weights(tiny_artifacts, GRAPH_FILES["text_encoder"]).values()
    )
    assert cudart.used >= weights
    del out, feeds
    backend.release("text_encoder")
    assert cudart.used == 0
    backend.close()
    assert (cudart.streams, cudart.events, len(cudart.pinned)) == (0, 0, 0)


def test_available_memory_counts_blocks_that_nobody_uses():
    memory = CudaMemory(FakeCudart(capacity=10_000))
    assert memory.available == 10_000
    held = memory.allocate((1000,), "uint8")  # 1,024 bytes
    gone = memory.allocate((2000,), "uint8")  # 2,048 bytes
    assert memory.available == 10_000 - 1024 - 2048
    del gone
    assert memory.available == 10_000 - 1024
    assert memory.cudart.used == 1024 + 2048, "the block waits in the pool"
    memory.allocate((9 * 1024 - 1000,), "uint8")
    assert held.nbytes == 1000


def test_weights_larger_than_the_staging_buffer(tiny_artifacts, monkeypatch):
    monkeypatch.setattr(cuda_memory, "STAGING_BYTES", 1000)
    memory = CudaMemory(FakeCudart())
    refs = graph_weights(tiny_artifacts, GRAPH_FILES["encode_references"])
    placed = memory.upload_weights(list(refs.values()))
    for ref in refs.values():
        got = array_at(placed[ref].pointer, ref.shape, ref.dtype)
        np.testing.assert_array_equal(got, map_weight(ref))


def test_out_of_device_memory_is_one_clear_error(tiny_artifacts, engines):
    manifest = Manifest.load(tiny_artifacts)
    backend = TrtBackend(
        tiny_artifacts,
        manifest,
        engines=engines,
        cudart=FakeCudart(capacity=200_000),
        trt=FakeTrt(tiny_artifacts),
    )
    ids = backend.upload(np.ones((1, 8), np.int64))
    with pytest.raises(CapacityError, match="out of GPU memory"):
        backend.run("text_encoder", {"input_ids": ids, "attention_mask": ids})


def test_shapes_outside_the_profile_are_refused(tiny_artifacts, backend):
    ids = backend.upload(np.ones((1, 8, 2), np.int64))
    with pytest.raises(RequestError, match="no profile of this engine"):
        backend.run("text_encoder", {"input_ids": ids, "attention_mask": ids})


REFUSALS = {
    "deserialize_cuda_engine": (BuildError, "fake_trt refuses encode_references of .*: {}.*build"),
    "create_execution_context": (BackendError, "encode_references: .* no execution context: {}"),
    "set_tensor_address": (BackendError, "encode_references: .* refuses an address for .*: {}"),
    "set_input_shape": (
        BackendError,
        r"encode_references: .* refuses shape \(1, 24, .*\) for .*: {}",
    ),
    "execute_async_v3": (BackendError, "encode_references: TensorRT could not run the engine: {}"),
}


@pytest.mark.parametrize("call", REFUSALS)
def test_what_tensorrt_refuses_is_told_in_its_own_words(tiny_artifacts, backend, call):
    kind, message = REFUSALS[call]
    inputs = step_inputs(backend, Manifest.load(tiny_artifacts), 24)
    feeds = {name: inputs[name] for name in inputs if name.startswith("ref_")}
    used = backend._memory.cudart.used
    # The first says why, the others only that something failed; nobody reads a page of it.
    words = ["Error Code 2: the planted cause", "Error Code 4: it failed " + 1000 * "x"]
    backend._trt.refused[call] = [*words, "the last of them"]
    with pytest.raises(kind, match=message.format(re.escape(words[0]) + r" \| ")) as caught:
        backend.run("encode_references", feeds)
    assert len(str(caught.value)) < 1000
    assert "the last" not in str(caught.value)

    backend._trt.refused[call] = []
    with pytest.raises(kind, match=message.format("it gave no reason")):
        backend.run("encode_references", feeds)  # what it said the last time is no reason now

    backend._trt.refused.clear()
    assert np.isfinite(backend.download(backend.run("encode_references", feeds)["v_ref.2"])).all()
    if call == "create_execution_context":  # after the weights were uploaded
        backend.release("encode_references")
        del caught
        gc.collect()  # what the errors' frames hold
        backend._memory.trim()
        assert backend._memory.cudart.used == used, "a refused load kept weights"


def test_a_refused_profile_is_told_in_tensorrts_words(tiny_artifacts, backend):
    inputs = step_inputs(backend, Manifest.load(tiny_artifacts), 24)
    feeds = {name: inputs[name] for name in inputs if name.startswith("ref_")}
    backend.run("encode_references", feeds)
    backend._trt.engines["encode_references"].contexts[0].active_optimization_profile = 1
    backend._trt.refused["set_optimization_profile_async"] = ["profile 0 is in use"]
    with pytest.raises(BackendError, match="refuses profile 0: profile 0 is in use"):
        backend.run("encode_references", feeds)


def test_a_runtime_that_does_not_start_is_one_clear_error(tiny_artifacts, engines, monkeypatch):
    """What the bindings raise where the constructor gives nothing is a TypeError of pybind11."""
    trt = FakeTrt(tiny_artifacts)

    def refuse(logger):
        logger.log(logger.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(trt, "Runtime", refuse)
    with pytest.raises(BackendError, match="fake_trt cannot start: CUDA initialization failure"):
        TrtBackend(
            tiny_artifacts,
            Manifest.load(tiny_artifacts),
            engines=engines,
            cudart=FakeCudart(),
            trt=trt,
        )


def test_a_tampered_engine_is_not_deserialised(tiny_artifacts, engines):
    trt = FakeTrt(tiny_artifacts)
    (engines / "text_encoder.engine").write_bytes(b"vae_encoder!")
    backend = TrtBackend(
        tiny_artifacts,
        Manifest.load(tiny_artifacts),
        engines=engines,
        cudart=FakeCudart(),
        trt=trt,
    )
    ids = backend.upload(np.ones((1, 8), np.int64))
    with pytest.raises(ArtifactError, match="not the engine"):
        backend.run("text_encoder", {"input_ids": ids, "attention_mask": ids})
    assert not trt.engines
    assert not backend._weights


def test_engines_of_another_version_gpu_or_export_are_refused(tiny_artifacts, engines):
    manifest, loaded = Manifest.load(tiny_artifacts), EngineManifest.load(engines)

    def open_with(**changes: object) -> None:
        values = {name: getattr(loaded, name) for name in EngineManifest.__slots__} | changes
        EngineManifest(**values).save(engines)
        TrtBackend(
            tiny_artifacts,
            manifest,
            engines=engines,
            cudart=FakeCudart(),
            trt=FakeTrt(tiny_artifacts),
        )

    with pytest.raises(BuildError, match=r"9\.9"):
        open_with(version="9.9")
    with pytest.raises(BuildError, match=r"compute capability 8\.9"):
        open_with(sm=89)
    values = {name: getattr(loaded.record("vae_decoder"), name) for name in EngineRecord.__slots__}
    other = EngineRecord(**(values | {"onnx_digest": "sha256:0"}))
    with pytest.raises(ArtifactError, match="another export"):
        open_with(engines=loaded.engines | {"vae_decoder": other})


def test_without_engines_or_gpu_the_error_says_what_to_do(tiny_artifacts):
    manifest = Manifest.load(tiny_artifacts)
    with pytest.raises(ArtifactError, match="klein-kv build"):
        open_backend("tensorrt", tiny_artifacts, manifest, None, None)
    with pytest.raises(BackendError, match="expected 'cuda'"):
        open_backend("tensorrt", tiny_artifacts, manifest, "cpu", None)
    with pytest.raises(BackendError, match="tpu"):
        open_backend("auto", tiny_artifacts, manifest, "tpu", None)


def test_no_gpu_is_told_in_one_line():
    pytest.importorskip("cuda.bindings.runtime")
    from cuda.bindings import runtime

    if int(runtime.cudaGetDeviceCount()[0]) == 0:
        pytest.skip("this machine has a GPU")
    with pytest.raises(BackendError, match="no usable NVIDIA GPU"):
        cuda_memory.load_cudart()


def test_every_cuda_name_exists_with_these_arguments():
    runtime = pytest.importorskip("cuda.bindings.runtime")
    source = inspect.getsource(cuda_memory) + inspect.getsource(ort_device)
    pattern = r'(?:self\.call\(|call_cuda\(cudart,)\s*"(\w+)"'
    calls = set(re.findall(pattern, source)) | {"cudaGetDeviceCount"}
    assert "cudaGetDevice" in calls
    assert len(calls) > 12
    for name in calls:
        documented = (getattr(runtime, name).__doc__ or "").split("(", 1)[1].split(")")[0]
        ours = getattr(FakeCudart, name, None)
        if ours is not None:
            taken = len(inspect.signature(ours).parameters) - 1
            assert taken == len([p for p in documented.split(",") if p.strip()]), name
    for name in ("cudaStreamNonBlocking", "cudaError_t", "cudaMemcpyKind", "cudaDeviceAttr"):
        assert hasattr(runtime, name)
    assert hasattr(runtime.cudaError_t, "cudaErrorMemoryAllocation")
    for kind in ("HostToDevice", "DeviceToHost"):
        assert hasattr(runtime.cudaMemcpyKind, f"cudaMemcpy{kind}")
    for part in ("Major", "Minor"):
        assert hasattr(runtime.cudaDeviceAttr, f"cudaDevAttrComputeCapability{part}")


def test_every_tensorrt_name_exists():
    trt = pytest.importorskip("tensorrt_rtx")
    source = inspect.getsource(trt_backend)
    for owner, pattern in (
        (trt.IExecutionContext, r"context\.(\w+)"),
        (trt.ICudaEngine, r"self\._engine\.(\w+)\("),
        (trt.IRuntimeConfig, r"config\.(\w+)"),
        (trt.IRuntimeCache, r"self\._cache\.(\w+)\("),
        (trt.Runtime, r"self\._runtime\.(\w+)\("),
        (trt, r"\btrt\.(\w+)"),
    ):
        names = set(re.findall(pattern, source)) - {"__name__"}
        assert names, owner
        missing = [name for name in names if not hasattr(owner, name)]
        assert not missing, f"{owner} has no {missing}"
    assert hasattr(trt.CudaGraphStrategy, "WHOLE_GRAPH_CAPTURE")
    assert hasattr(trt.DynamicShapesKernelSpecializationStrategy, "EAGER")


def test_keeping_references_copies_no_keys_and_values_to_the_host(tiny_artifacts, backend):
    """Regression: a kept set was downloaded to learn its size, gigabytes for klein 9B."""
    pipe = KleinKVPipeline(
        tiny_artifacts, Manifest.load(tiny_artifacts), backend, reference_cache_bytes=1 << 30
    )
    cudart = backend._memory.cudart
    kept = pipe.encode_references(pictures(2))
    to_host = [nbytes for kind, nbytes in cudart.copies if kind == 2]
    assert kept.nbytes == sum(buffer.nbytes for buffer in kept.kv.values())
    assert len(to_host) == 2, "only the VAE's tokens of the two images come to the host"


def test_timings_come_from_events_and_wait_for_nothing(tiny_artifacts, backend):
    pipe = KleinKVPipeline(
        tiny_artifacts, Manifest.load(tiny_artifacts), backend, reference_cache_bytes=0
    )
    pipe.set_progress_bar_config(disable=True)
    cudart, waits = backend._memory.cudart, []
    request = {"height": 128, "width": 128, "seed": 0, "num_inference_steps": 4}
    pipe("a kite", image=pictures(1), **request)

    def count(*_: object) -> dict:
        waits.append(cudart.waits)
        return {}

    # No tensors for the callback: it would have to download them.
    pipe("a kite", image=pictures(1), callback_on_step_end=count,
         callback_on_step_end_tensor_inputs=(), **request)  # fmt: skip
    assert len(set(waits)) == 1, "a step waited for the device"
    timings = pipe.timings
    assert len(timings.cached_steps) == 3
    assert timings.first_step > 0
    assert 0 < timings.stages + sum(timings.step_gaps) <= timings.total
    assert cudart.events == 0, "events are freed"
