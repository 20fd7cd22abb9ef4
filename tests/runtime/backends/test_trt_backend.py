"""The TensorRT executor, on stand-ins for CUDA and TensorRT that compute on the host.

What runs for real: allocation, uploads, bindings, shapes, the loop over engines, and that keys and
values are handed on without a copy. What does not: TensorRT itself. No GPU is needed or used.
"""

import gc
import inspect
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from klein_kv.artifacts.engines.engine_manifest import EngineManifest
from klein_kv.artifacts.signature import GRAPH_FILES
from klein_kv.artifacts.weights import graph_weights
from klein_kv.errors import ArtifactError, BackendError, BuildError, CapacityError, RequestError
from klein_kv.runtime.backends.ort import device as ort_device
from klein_kv.runtime.backends.trt import backend as trt_backend
from klein_kv.runtime.backends.trt import cuda as trt_cuda
from klein_kv.runtime.backends.trt import engine, memory, pinned, staging, virtual
from klein_kv.runtime.backends.trt.backend import TrtBackend
from klein_kv.runtime.backends.trt.memory import CudaMemory
from tests.runtime.backends import fake_trt
from tests.runtime.backends.fake_cuda import FakeCuda
from tests.runtime.backends.fake_engines import Machine, make_engines, random_inputs
from tests.runtime.backends.fake_trt import FakeTrt


@pytest.fixture
def engines(tiny_artifacts, tmp_path):
    """A folder of "engines" of the tiny artifacts."""
    return make_engines(tiny_artifacts, tmp_path)


@pytest.fixture
def backend(tiny_artifacts, engines):
    return open_on(FakeCuda(), tiny_artifacts, engines)


def open_on(cuda: FakeCuda, artifacts: Path, engines: Path, **options) -> TrtBackend:
    """A backend on the stand-ins; `backend._trt` and `cuda_of(backend)` are they."""
    trt = FakeTrt(artifacts, cuda, **options)
    return TrtBackend(artifacts, trt.manifest, engines=engines, cuda=cuda.cuda, trt=trt)


def cuda_of(backend: TrtBackend) -> FakeCuda:
    return backend._trt.cuda


def upload_inputs(backend: TrtBackend, graph: str, tokens: int = 24) -> dict:
    """Random inputs of a graph of the transformer, with so many reference tokens."""
    inputs = random_inputs(backend._graphs.signature(graph, backend._config), ref_tokens=tokens)
    return {name: backend.upload(array) for name, array in inputs.items()}


def encode_prompt(backend: TrtBackend) -> dict:
    ids = backend.upload(np.ones((1, 8), np.int64))
    return backend.run("text_encoder", {"input_ids": ids, "attention_mask": ids})


def test_keys_and_values_are_handed_on_without_a_copy(backend):
    cuda, trt = cuda_of(backend), backend._trt
    inputs = upload_inputs(backend, "first_step")
    first = backend.run("first_step", inputs)
    feeds = {name: inputs[name] for name in inputs if not name.startswith("ref_")}
    kv = {name: first[name] for name in first if "_ref." in name}
    out = backend.run("cached_step", feeds | kv)
    contexts = [trt.engines[graph].contexts[0] for graph in ("first_step", "cached_step")]
    addresses = [[context.addresses[name] for name in kv] for context in contexts]
    assert addresses[0] == addresses[1], "both find them at the same place"

    # As `verify` gives them: uploaded one by one, they are copied into place.
    single = {name: backend.upload(backend.download(x)) for name, x in kv.items()}
    expected = backend.download(out["latents"])
    got = backend.download(backend.run("cached_step", feeds | single)["latents"])
    np.testing.assert_array_equal(got, expected)
    backend.run("cached_step", feeds | kv)

    feeds |= kv | {"hidden_states": out["latents"]}
    copies, used = len(cuda.copies), cuda.used
    for _ in range(4):
        backend.run("cached_step", feeds)
    # The latents of the step before, every time, and nothing else.
    assert cuda.copies[copies:] == [(3, out["latents"].nbytes)] * 4
    assert cuda.used == used


def test_engines_share_one_copy_of_the_weights(tiny_artifacts, backend):
    inputs = upload_inputs(backend, "first_step")
    backend.run("first_step", inputs)
    used, uploads = cuda_of(backend).used, len(backend._weights)
    references = {name: inputs[name] for name in inputs if name.startswith("ref_")}
    backend.run("encode_references", references)
    assert len(backend._weights) == uploads
    first, encode = (
        backend._trt.engines[g].contexts[0] for g in ("first_step", "encode_references")
    )
    shared = graph_weights(tiny_artifacts, GRAPH_FILES["encode_references"])
    assert shared
    assert all(first.addresses[name] == encode.addresses[name] for name in shared)
    kv = backend._config.transformer.kv_bytes(24, "float32")
    assert cuda_of(backend).used <= used + kv + 3 * cuda_of(backend).granularity


def test_release_and_close_free_device_memory(tiny_artifacts, backend):
    cuda = cuda_of(backend)
    held = encode_prompt(backend)
    refs = graph_weights(tiny_artifacts, GRAPH_FILES["text_encoder"]).values()
    weights, before = sum(ref.nbytes for ref in refs), cuda.used
    assert before >= weights
    backend.release("text_encoder")
    assert cuda.used <= before - weights
    backend.close()  # even what somebody still holds
    assert not any(cuda.left)
    del held
    backend.close()
    for call in (lambda: backend.upload(np.ones(8)), lambda: backend.run("text_encoder", {})):
        with pytest.raises(BackendError, match="the tensorrt backend is closed"):
            call()


def test_a_backend_that_nobody_closed_is_closed_when_it_is_collected(tiny_artifacts, engines):
    cuda = FakeCuda()
    encode_prompt(open_on(cuda, tiny_artifacts, engines))
    gc.collect()
    assert cuda.calls["cuMemCreate"]
    assert not any(cuda.left)


# --- refused ---


def test_out_of_device_memory_is_one_clear_error(tiny_artifacts, engines):
    with pytest.raises(CapacityError, match="out of GPU memory"):
        encode_prompt(open_on(FakeCuda(capacity=200_000), tiny_artifacts, engines))


def test_inputs_that_no_engine_takes_are_refused(backend):
    ids = backend.upload(np.ones((1, 8, 2), np.int64))
    with pytest.raises(
        RequestError,
        match=r"takes 8 prompt tokens; .* no profile of this engine",
    ):
        backend.run("text_encoder", {"input_ids": ids, "attention_mask": ids})
    feeds = upload_inputs(backend, "encode_references")
    feeds["ref_ids"] = upload_inputs(backend, "encode_references", 25)["ref_ids"]
    with pytest.raises(RequestError, match=r"ref_ids has shape \(25, 4\), expected \(24, 4\)"):
        backend.run("encode_references", feeds)


REFUSALS = {
    "deserialize_cuda_engine": (BuildError, "fake_trt refuses encode_references of .*: {}.*build"),
    "create_execution_context": (BackendError, "encode_references: .* no execution context: {}"),
    "set_optimization_profile_async": (BackendError, "encode_references: .* profile 0: {}"),
    "set_tensor_address": (BackendError, "encode_references: .* refuses an address for .*: {}"),
    "set_input_shape": (
        BackendError,
        r"encode_references: .* refuses shape \(1, 24, .*\) for .*: {}",
    ),
    "execute_async_v3": (BackendError, "encode_references: TensorRT could not run the engine: {}"),
}


@pytest.mark.parametrize("call", REFUSALS)
def test_what_tensorrt_refuses_is_told_in_its_own_words(backend, call):
    kind, message = REFUSALS[call]
    feeds = upload_inputs(backend, "encode_references")
    if call == "set_optimization_profile_async":  # a context beside the first has none yet
        backend.run("encode_references", upload_inputs(backend, "encode_references", 25))
    used = cuda_of(backend).used
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
        backend._kv.trim()
        backend._scratch.shrink()
        assert cuda_of(backend).used <= used, "a refused load kept weights"


@pytest.mark.parametrize(
    ("method", "gives", "message"),
    [
        ("infer_shapes", ["ref_ids"], "cannot tell the shapes of ref_ids"),
        ("get_tensor_shape", (1, 2), r"gives k_ref.0 the shape \(1, 2\), expected \(1, 24"),
    ],
)
def test_shapes_that_engines_give_are_checked(method, gives, message, backend, monkeypatch):
    """Regression: an axis of -1 went into the size of a buffer."""
    monkeypatch.setattr(fake_trt.FakeContext, method, lambda *_: gives)
    with pytest.raises(BackendError, match=message):
        backend.run("encode_references", upload_inputs(backend, "encode_references"))


def test_a_runtime_that_does_not_start_is_one_clear_error(tiny_artifacts, engines, monkeypatch):
    """What the bindings raise where the constructor gives nothing is a TypeError of pybind11."""

    def refuse_to_start(*_):
        raise TypeError("pybind11::init(): factory function returned nullptr")

    cuda = FakeCuda()
    monkeypatch.setattr(FakeTrt, "Runtime", refuse_to_start)
    with pytest.raises(BackendError, match=r"fake_trt cannot start \(pybind11::init"):
        open_on(cuda, tiny_artifacts, engines)
    assert (cuda.used, len(cuda.pinned), len(cuda.streams)) == (0, 0, 0)


def test_a_tampered_engine_is_not_deserialised(tiny_artifacts, engines):
    (engines / "text_encoder.engine").write_bytes(b"vae_encoder!")
    backend = open_on(FakeCuda(), tiny_artifacts, engines)
    with pytest.raises(ArtifactError, match="not the engine"):
        encode_prompt(backend)
    assert not backend._trt.engines
    assert not backend._weights


def test_engines_of_another_version_gpu_or_export_are_refused(tiny_artifacts, engines):
    loaded = EngineManifest.load(engines)
    other = replace(loaded.record("vae_decoder"), onnx_digest="sha256:0")
    for changes, kind, message in (
        ({"version": "9.9"}, BuildError, r"9\.9"),
        ({"sm": 89}, BuildError, r"compute capability 8\.9"),
        ({"engines": loaded.engines | {"vae_decoder": other}}, ArtifactError, "another export"),
    ):
        replace(loaded, **changes).save(engines)
        with pytest.raises(kind, match=message):
            open_on(FakeCuda(), tiny_artifacts, engines)


# --- against the installed bindings ---


def test_no_gpu_is_told_in_one_line():
    pytest.importorskip("cuda.bindings.runtime")
    from cuda.bindings import runtime

    if int(runtime.cudaGetDeviceCount()[0]) == 0:
        pytest.skip("this machine has a GPU")
    with pytest.raises(BackendError, match="no usable NVIDIA GPU"):
        trt_cuda.load_cuda()


def test_every_cuda_name_exists_with_these_arguments():
    """In the installed bindings, with as many arguments as the stand-in takes."""
    runtime = pytest.importorskip("cuda.bindings.runtime")
    from cuda.bindings import driver

    modules = (trt_backend, trt_cuda, engine, memory, pinned, staging, virtual, ort_device)
    source = "".join(inspect.getsource(module) for module in modules)
    calls = set(re.findall(r'call(?:_for_memory)?\(\s*"(\w+)"', source)) | {"cudaGetDeviceCount"}
    assert {"cudaGetDevice", "cuMemMap", "cuMemCreate", "cudaStreamWaitEvent"} <= calls
    assert len(calls) > 20
    for name in calls:
        library = runtime if name.startswith("cuda") else driver
        documented = (getattr(library, name).__doc__ or "").split("(", 1)[1].split(")")[0]
        ours = getattr(FakeCuda, name, None)
        if ours is not None:
            taken = len(inspect.signature(ours).parameters) - 1
            assert taken == len([p for p in documented.split(",") if ":" in p or p.strip()]), name
    for name in ("cudaStreamNonBlocking", "cudaError_t", "cudaMemcpyKind", "cudaDeviceAttr"):
        assert hasattr(runtime, name)
    assert int(runtime.cudaError_t.cudaErrorMemoryAllocation) == trt_cuda._OUT_OF_MEMORY
    assert int(driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY) == trt_cuda._OUT_OF_MEMORY
    assert int(runtime.cudaEventDisableTiming) == trt_cuda._NO_TIMING
    for kind in ("HostToDevice", "DeviceToHost", "DeviceToDevice"):
        assert hasattr(runtime.cudaMemcpyKind, f"cudaMemcpy{kind}")
    for part in ("Major", "Minor"):
        assert hasattr(runtime.cudaDeviceAttr, f"cudaDevAttrComputeCapability{part}")


def test_virtual_memory_is_asked_for_as_the_bindings_want_it(monkeypatch):
    """The structures and enumerations are the bindings' own; only the calls are the stand-in's."""
    driver = pytest.importorskip("cuda.bindings.driver")
    cuda = FakeCuda()
    for name in (
        "CUdevice_attribute",
        "CUmemLocationType",
        "CUmemAllocationType",
        "CUmemAccess_flags",
        "CUmemAllocationGranularity_flags",
        "CUmemLocation",
        "CUmemAllocationProp",
        "CUmemAccessDesc",
    ):
        monkeypatch.setattr(cuda, name, getattr(driver, name))
    monkeypatch.setattr(cuda, "cuDeviceGetAttribute", lambda attribute, device: (0, int(attribute)))
    own = virtual.VirtualMemory(CudaMemory(cuda.cuda, 0))
    pointer, handle = own.reserve(8192), own.create(8192)
    own.map(pointer, 8192, handle)


def test_every_tensorrt_name_exists():
    trt = pytest.importorskip("tensorrt_rtx")
    source = inspect.getsource(trt_backend) + inspect.getsource(engine)
    source = source.replace("self._config.", "")  # the model's
    for owner, pattern in (
        (trt.IExecutionContext, r"context\.(\w+)"),
        (trt.ICudaEngine, r"(?:self\._?)?engine\.(create_\w+)\("),
        (trt.IRuntimeConfig, r"\bconfig\.(\w+)"),
        (trt.IRuntimeCache, r"self\._cache\.(\w+)\("),
        (trt.Runtime, r"(?:self\._)?runtime\.(\w+)(?:\(| =)"),
        (trt, r"\btrt\.([A-Z]\w+)"),
    ):
        names = set(re.findall(pattern, source)) - {"__name__"}
        assert names, owner
        missing = [name for name in names if not hasattr(owner, name)]
        assert not missing, f"{owner} has no {missing}"
    assert hasattr(trt.CudaGraphStrategy, "WHOLE_GRAPH_CAPTURE")
    assert hasattr(trt.DynamicShapesKernelSpecializationStrategy, "EAGER")
    assert hasattr(trt.Logger, "WARNING")
    assert hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION")


def test_tensorrt_takes_our_error_recorder():
    """The real one: what it says goes to the recorder, in its own words."""
    trt = pytest.importorskip("tensorrt_rtx")
    errors: list[str] = []
    runtime = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR))
    runtime.error_recorder = engine.make_recorder(trt, errors)
    assert runtime.deserialize_cuda_engine(300 * b"x") is None
    assert "Serialization" in engine.reason(errors)
    errors.clear()
    assert engine.reason(errors) == "it gave no reason"


# --- what waits, and what is copied ---


def test_keeping_references_copies_no_keys_and_values_to_the_host(tiny_artifacts, engines, picture):
    """Regression: a kept set was downloaded to learn its size, gigabytes for klein 9B."""
    machine = Machine(tiny_artifacts, engines, reference_cache_bytes=1 << 30)
    references = machine.pipe.encode_references([picture(144, 128), picture(144, 144)])
    assert references.nbytes == sum(buffer.nbytes for buffer in references.kv.values())
    assert not [nbytes for kind, nbytes in machine.cuda.copies if kind == 2]


def test_timings_come_from_events_and_wait_for_nothing(tiny_artifacts, engines, picture):
    machine, waits = Machine(tiny_artifacts, engines, reference_cache_bytes=0), []
    image = picture(144, 128)
    machine(image)

    def count(*_):
        waits.append(machine.cuda.waits)
        return {}

    # No tensors for the callback: it would have to download them.
    machine(image, callback_on_step_end=count, callback_on_step_end_tensor_inputs=())
    assert len(set(waits)) == 1, "a step waited for the device"
    timings = machine.pipe.timings
    assert len(timings.cached_steps) == 3
    assert timings.first_step > 0
    assert 0 < timings.stages + sum(timings.step_gaps) <= timings.total
    assert not machine.cuda.recorded, "events are freed"


def test_scratch_is_what_the_shape_needs(tiny_artifacts, engines):
    """Regression: every run was lent what the largest shape of the engine needs."""
    backend = open_on(
        FakeCuda(),
        tiny_artifacts,
        make_engines(tiny_artifacts, engines, scratch={"encode_references": 1 << 30}),
        scratch=lambda graph, shapes: 1000 * shapes["ref_ids"][0],
    )
    shapes = {"ref_hidden_states": (1, 24, 128), "ref_ids": (24, 4)}
    assert backend.scratch_bytes("encode_references", shapes) == 1 << 30  # it has not run yet
    for tokens, behind in ((24, 24_576), (96, 98_304)):
        backend.run("encode_references", upload_inputs(backend, "encode_references", tokens))
        assert backend._scratch.nbytes == behind
    assert backend.scratch_bytes("encode_references", shapes) == 24_000


def test_the_stand_in_refuses_what_tensorrt_refuses(backend):
    backend.run("encode_references", upload_inputs(backend, "encode_references"))
    trt, engine_ = backend._trt, backend._trt.engines["encode_references"]
    config = engine_.create_runtime_config()
    config.set_execution_context_allocation_strategy(
        trt.ExecutionContextAllocationStrategy.USER_MANAGED
    )
    fresh = engine_.create_execution_context(config)
    stream = backend._memory.stream
    assert not fresh.set_input_shape("ref_ids", (24, 4)), "it has no profile yet"
    assert fresh.set_optimization_profile_async(0, stream)
    assert not fresh.set_input_shape("ref_ids", (1 << 21, 4)), "outside of the profile"
    assert fresh.get_tensor_shape("k_ref.0") == (1, -1, 2, 32)
    assert not fresh.set_tensor_address("ref_ids", 257), "not aligned"
    with pytest.raises(AssertionError, match="aligned"):
        fresh.set_device_memory(257, 1000)
    with pytest.raises(AssertionError, match="no address or shape"):
        fresh.execute_async_v3(stream)
    (loaded,) = backend._loaded["encode_references"].values()
    used = next(iter(loaded._executions.values())).context
    used.set_device_memory(backend._scratch.pointer, 256)
    with pytest.raises(AssertionError, match="too little device memory"):
        used.execute_async_v3(stream)
    backend._scratch.shrink()
    used.set_device_memory(backend._scratch.pointer, 1 << 20)
    with pytest.raises(AssertionError, match="not device memory"):
        used.execute_async_v3(stream)
    trt.cuda.devices = 2
    trt.cuda.cudaSetDevice(1)
    with pytest.raises(AssertionError, match="run on device 1, loaded on 0"):
        used.execute_async_v3(stream)
    trt.cuda.cudaSetDevice(0)
    backend.close()
    with pytest.raises((AssertionError, KeyError)):
        used.execute_async_v3(stream)
