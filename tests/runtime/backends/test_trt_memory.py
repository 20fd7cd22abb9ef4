"""Device memory on the stand-in for CUDA: uploads without waiting, weights, addresses that stay."""

import gc
import threading
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from klein_kv.artifacts.signature import GRAPH_FILES
from klein_kv.artifacts.weights import WeightRef, graph_weights, map_weight
from klein_kv.errors import ArtifactError, BackendError, CapacityError
from klein_kv.runtime.backends.trt import staging
from klein_kv.runtime.backends.trt.memory import CudaMemory
from klein_kv.runtime.backends.trt.virtual import KvMemory, Scratch, VirtualMemory
from tests.runtime.backends.fake_cuda import FakeCuda, Status
from tests.runtime.backends.fake_trt import array_at

PAGE = 4096


class Device:
    """A device with everything that the executor has of it."""

    def __init__(self, capacity=1 << 30, staging_bytes=1 << 16, **options: Any) -> None:
        self.cuda = FakeCuda(capacity, **options)
        self.memory = CudaMemory(self.cuda.cuda, staging_bytes=staging_bytes)
        virtual = VirtualMemory(self.memory)
        self.kv = KvMemory(self.memory, virtual)
        self.scratch = Scratch(self.memory, virtual)


@pytest.fixture(params=[(), (0,)], ids=["prompt", "lagging"])
def device(request):
    return Device(lagging=request.param)


# --- uploads ---


def test_uploads_wait_for_nothing_and_are_done_with_the_array(device):
    """Regression: each of a dozen small uploads of a request drained the stream."""
    waits = device.cuda.waits
    array, buffers = np.arange(100, dtype=np.int64), []
    for i in range(12):
        array += i
        buffers.append((device.memory.upload(array), array.copy()))
    array[:] = -1  # the caller's again, whatever the device has done by now
    waited = device.cuda.calls["cudaMalloc"]  # new memory, which the next request finds idle
    assert device.cuda.waits - waits == waited == 12
    for buffer, expected in buffers:
        np.testing.assert_array_equal(device.memory.download(buffer), expected)


def test_uploads_beyond_the_staging_memory_wait_for_room(device):
    """In one array larger than all of it, and in many that fill it."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 255, size, dtype=np.uint8) for size in (300_000, 1, 65_536, 65_535)]
    buffers = [device.memory.upload(array) for array in arrays]
    for buffer, array in zip(buffers, arrays, strict=True):
        np.testing.assert_array_equal(device.memory.download(buffer), array)


def test_shapes_types_and_views(device):
    memory = device.memory
    empty = memory.upload(np.zeros((1, 0, 4), np.float32))
    assert empty.pointer
    assert memory.download(empty).shape == (1, 0, 4)
    buffer = memory.upload(np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(1, 0, 2))
    np.testing.assert_array_equal(memory.download(buffer.view((4,), 4)), [12, 13, 14, 15])
    with pytest.raises(BackendError, match=r"cannot view \(3, 2, 4\) from element 8 as \(17,\)"):
        buffer.view((17,), 8)
    with pytest.raises(BackendError, match="cannot upload complex64"):
        memory.upload(np.zeros(3, np.complex64))


def test_parts_are_put_together_on_the_device(device):
    memory = device.memory
    parts = [np.full((1, n, 2), n, np.float32) for n in (1, 3, 2)]
    copies = len(device.cuda.copies)
    made = memory.assemble((1, 6, 2), (memory.upload(part) for part in parts))
    assert [kind for kind, _ in device.cuda.copies[copies:]] == [1, 3] * 3
    np.testing.assert_array_equal(memory.download(made), np.concatenate(parts, axis=1))
    with pytest.raises(BackendError, match="parts do not make"):
        memory.assemble((1, 5, 2), [made])
    with pytest.raises(BackendError, match="0 bytes of parts do not make"):
        memory.assemble((1, 5, 2), [])


# --- weights ---


def upload(memory: CudaMemory, refs: list[WeightRef]) -> dict[WeightRef, NDArray[Any]]:
    buffers = {ref: memory.allocate(ref.shape, ref.dtype) for ref in refs}
    memory.staging.upload_weights({ref: buffer.pointer for ref, buffer in buffers.items()})
    return {ref: array_at(x.pointer, ref.shape, ref.dtype) for ref, x in buffers.items()}


@pytest.mark.parametrize("staging_bytes", [1 << 12, 1 << 16, 1 << 24])
def test_weights_arrive_whole(staging_bytes, tiny_artifacts, monkeypatch):
    """Tensors larger and smaller than a piece, on a stream that lags.

    Regression: each load pinned and freed 128 MB.
    """
    monkeypatch.setattr(staging, "_PIECE", 1 << 14)
    device = Device(staging_bytes=staging_bytes, lagging=(0,))
    refs = list(graph_weights(tiny_artifacts, GRAPH_FILES["encode_references"]).values())
    for _ in range(2):
        for ref, got in upload(device.memory, refs).items():
            np.testing.assert_array_equal(got, map_weight(ref))
    calls = device.cuda.calls
    assert (calls["cudaHostAlloc"], calls["cudaFreeHost"]) == (1, 0)


def test_a_file_that_is_too_short_is_one_clear_error(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(bytes(1000))
    device = Device()
    refs = [WeightRef(path, 0, 800, "uint8", (800,)), WeightRef(path, 800, 400, "uint8", (400,))]
    with pytest.raises(ArtifactError, match=r"weights.safetensors ends at byte 1000, expected 1"):
        upload(device.memory, refs)
    path.unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        upload(device.memory, refs)
    assert not device.cuda.recorded


# --- addresses that stay ---


def at(address: int, nbytes: int) -> NDArray[np.uint8]:
    return array_at(address, (nbytes,), "uint8")


def test_scratch_grows_where_it_is():
    device = Device()
    pointer = device.scratch.pointer
    device.scratch.require(1)
    at(pointer, PAGE).fill(7)
    waits = device.cuda.waits
    device.scratch.require(3 * PAGE + 1)
    assert device.scratch.nbytes == 4 * PAGE
    assert at(pointer, PAGE).min() == 7, "what was there stays"
    at(pointer, 4 * PAGE).fill(8)
    assert device.cuda.waits == waits, "growing waits for nothing"
    device.scratch.require(PAGE)
    device.scratch.shrink()
    assert (device.scratch.nbytes, device.cuda.used) == (0, 0)
    device.scratch.require(PAGE)
    assert device.scratch.pointer == pointer


def test_sets_are_found_at_one_place():
    device = Device()
    first, second = device.kv.take(5 * PAGE), device.kv.take(2 * PAGE)
    at(first.pointer, 5 * PAGE).fill(1)
    at(second.pointer, 2 * PAGE).fill(2)
    place = device.kv.place
    for block, value, nbytes in ((first, 1, 5 * PAGE), (second, 2, 2 * PAGE), (first, 1, PAGE)):
        device.kv.hold(block)
        assert set(at(place, nbytes).tolist()) == {value}
    at(place, PAGE).fill(9)
    assert at(first.pointer, 1)[0] == 9, "the same memory, not a copy"
    assert device.cuda.used == 7 * PAGE

    waits, allocations = device.cuda.waits, device.cuda.allocations
    device.kv.hold(first)
    del first, block  # idle, and still in the place
    device.kv.hold(device.kv.take(5 * PAGE))
    assert (device.cuda.waits, device.cuda.allocations) == (waits, allocations), "it costs nothing"


def test_idle_memory_goes_where_it_is_needed():
    """Whoever asks: a block of the pool, scratch, or another set."""
    device = Device(capacity=16 * PAGE)
    device.kv.hold(device.kv.take(8 * PAGE))
    assert device.kv.idle == 8 * PAGE
    block = device.memory.allocate((10 * PAGE,), "uint8")
    assert device.kv.idle == 0
    del block
    assert device.memory.idle == 10 * PAGE
    device.scratch.require(8 * PAGE)
    device.scratch.require(12 * PAGE)
    held = device.kv.take(8 * PAGE)  # scratch that nobody uses is given up
    assert device.scratch.nbytes == 0
    with pytest.raises(CapacityError, match="out of GPU memory in cuMemCreate"):
        device.scratch.require(9 * PAGE)
    del held
    device.scratch.require(9 * PAGE)


def test_closing_frees_what_is_still_in_use(device):
    held = [device.memory.upload(np.zeros(10, np.float32)), device.kv.take(PAGE)]
    device.scratch.require(PAGE)
    device.kv.hold(held[1])
    device.kv.close()
    device.scratch.close()
    device.memory.close()
    assert device.cuda.left[:4] == (0, 0, 0, 0)
    held.clear()
    gc.collect()
    assert not any(device.cuda.left)


def test_a_gpu_without_virtual_memory_is_refused(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr(cuda, "cuDeviceGetAttribute", lambda *_: (0, 0))
    with pytest.raises(BackendError, match="offers no virtual memory management"):
        VirtualMemory(CudaMemory(cuda.cuda))


# --- the stand-in is as strict as CUDA ---


def test_the_stand_in_refuses_what_cuda_refuses():
    raw = FakeCuda(devices=2)
    _, stream = raw.cudaStreamCreateWithFlags(1)
    _, pointer = raw.cudaMalloc(1000)
    host = np.zeros(2000, np.uint8)
    with pytest.raises(AssertionError, match="bytes that are not device memory"):
        raw.cudaMemcpyAsync(pointer, host.ctypes.data, 1001, 1, stream)
    raw.cudaSetDevice(1)
    with pytest.raises(AssertionError, match="a stream of device 0 used on device 1"):
        raw.cudaMemcpyAsync(pointer, host.ctypes.data, 1000, 1, stream)
    _, other = raw.cudaMalloc(1000)
    raw.cudaSetDevice(0)
    with pytest.raises(AssertionError, match="device 0 was given memory of 1"):
        raw.cudaMemcpyAsync(other, host.ctypes.data, 1000, 1, stream)
    raw.cudaFree(pointer)
    with pytest.raises(AssertionError, match="not device memory"):
        raw.cudaMemcpyAsync(pointer, host.ctypes.data, 1, 1, stream)
    device = Device(lagging=(0,))
    block = device.kv.take(PAGE)
    device.memory.copy(block.pointer, block.pointer, 10)
    with pytest.raises(AssertionError, match="has yet to use"):
        device.cuda.cuMemUnmap(block.pointer, PAGE)


def test_scratch_that_cannot_be_had_is_refused_and_does_not_loop():
    """Regression: taking a piece shrank what was there, which had to be taken again, for ever."""
    device = Device(capacity=9 * PAGE)
    held = device.kv.take(6 * PAGE)
    device.scratch.require(2 * PAGE)
    with pytest.raises(CapacityError):
        device.scratch.require(4 * PAGE)
    assert device.cuda.calls["cuMemCreate"] < 12
    del held
    device.scratch.require(9 * PAGE)
    assert device.scratch.nbytes == 9 * PAGE


def test_memory_that_cannot_be_mapped_is_given_back(monkeypatch):
    device = Device()
    refuse = (Status.cudaErrorInvalidValue,)
    for name in ("cuMemMap", "cuMemSetAccess"):
        with monkeypatch.context() as patch:
            patch.setattr(device.cuda, name, lambda *_: refuse)
            with pytest.raises(BackendError, match=name):
                device.kv.take(PAGE)
            with pytest.raises(BackendError, match=name):
                device.scratch.require(PAGE)
        assert (device.cuda.used, len(device.cuda.reserved)) == (0, 2)
    device.kv.hold(device.kv.take(PAGE))


def test_a_failing_call_leaves_the_memory_to_other_threads(monkeypatch):
    """Regression: the lock stayed with the thread, and the program hung at its end."""
    device = Device()
    with monkeypatch.context() as patch:
        patch.setattr(device.cuda, "cudaGetDevice", lambda: (Status.cudaErrorInvalidValue, 0))
        with pytest.raises(BackendError, match="cudaGetDevice"), device.memory:
            pass
    entered = threading.Event()

    def enter() -> None:
        with device.memory:
            entered.set()

    threading.Thread(target=enter, daemon=True).start()
    assert entered.wait(10)
