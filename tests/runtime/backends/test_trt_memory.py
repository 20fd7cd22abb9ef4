"""Device memory: uploads without waiting, weights, addresses that stay.

On the stand-in for CUDA, prompt or lagging; what needs no look behind addresses also on a GPU of
any kind, where there are one and cuda-python.
"""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from klein_kv.artifacts.weights import WeightRef
from klein_kv.errors import ArtifactError, BackendError, CapacityError
from klein_kv.runtime.backends.trt import staging
from klein_kv.runtime.backends.trt.cuda import Event, load_cuda
from klein_kv.runtime.backends.trt.memory import CudaMemory
from klein_kv.runtime.backends.trt.pinned import PinnedStore
from klein_kv.runtime.backends.trt.virtual import KvMemory, Place, Scratch, VirtualMemory
from tests.runtime.backends.fake_cuda import FakeCuda, Status

PAGE, MIB = 4096, 1 << 20
KINDS = {"prompt": (), "lagging": (0,)}


class Device:
    """A device with everything that the executor has of it; without bindings a stand-in."""

    def __init__(self, capacity=1 << 30, staging_bytes=1 << 16, bindings=None, lagging=()):
        self.cuda = FakeCuda(capacity, lagging)
        self.memory = CudaMemory(bindings or self.cuda.cuda, staging_bytes=staging_bytes)
        virtual = VirtualMemory(self.memory)
        self.kv = KvMemory(self.memory, virtual)
        self.scratch = Scratch(self.memory, virtual)

    def close(self):
        with self.memory:
            self.kv.close()
            self.scratch.close()
        self.memory.close()


@pytest.fixture(params=KINDS)
def device(request):
    return Device(lagging=KINDS[request.param])


@pytest.fixture(params=[*KINDS, pytest.param("gpu", marks=pytest.mark.gpu)])
def any_device(request):
    """A stand-in, or a GPU."""
    bindings = None
    if request.param == "gpu":
        runtime = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-python")
        status, count = runtime.cudaGetDeviceCount()
        if int(status) != 0 or not count:
            pytest.skip("needs an NVIDIA GPU")
        bindings = load_cuda()
    device = Device(bindings=bindings, lagging=KINDS.get(request.param, ()))
    yield device
    device.close()


def numbers(nbytes, seed=0):
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def content(device, address, nbytes):
    array = np.empty(nbytes, np.uint8)
    device.memory.staging.download(address, array)
    return array


# --- uploads ---


def test_there_and_back(any_device):
    """In one array larger than the staging memory, and in many that fill it."""
    memory = any_device.memory
    for sizes in ([1, 255, 4096, 65_536, 65_535, 300_007], [9_000] * 12):
        arrays = [numbers(nbytes, seed) for seed, nbytes in enumerate(sizes)]
        buffers = [memory.upload(array) for array in arrays]
        for buffer, array in zip(buffers, arrays, strict=True):
            np.testing.assert_array_equal(memory.download(buffer), array)
        whole = memory.assemble((sum(sizes),), buffers)
        np.testing.assert_array_equal(memory.download(whole), np.concatenate(arrays))


def test_blocks_come_back_from_the_pool(any_device):
    memory = any_device.memory
    first = memory.allocate((MIB,), "uint8")
    pointer = first.pointer
    del first
    assert memory.allocate((MIB,), "uint8").pointer == pointer
    with pytest.raises(CapacityError):
        memory.allocate((memory.call("cudaMemGetInfo")[1] + MIB,), "uint8")


def test_events_take_the_time(any_device):
    memory = any_device.memory
    source, target = (memory.allocate((8 * MIB,), "uint8") for _ in range(2))
    start = Event(memory.cuda, memory.stream, timed=True)
    for _ in range(20):
        memory.copy(target.pointer, source.pointer, 8 * MIB)
    end = Event(memory.cuda, memory.stream, timed=True)
    end.synchronize()
    assert 0 < memory.call("cudaEventElapsedTime", start.handle, end.handle) < 1e3


def test_two_threads(any_device):
    memory = any_device.memory

    def work(i):
        for turn in range(50):
            array = numbers(100_000, 100 * i + turn)
            with memory:
                np.testing.assert_array_equal(memory.download(memory.upload(array)), array)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))


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


def test_shapes_types_views_and_parts(device):
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

    parts = [np.full((1, n, 2), n, np.float32) for n in (1, 3, 2)]
    copies = len(device.cuda.copies)
    made = memory.assemble((1, 6, 2), (memory.upload(part) for part in parts))
    assert [kind for kind, _ in device.cuda.copies[copies:]] == [1, 3] * 3, "on the device"
    np.testing.assert_array_equal(memory.download(made), np.concatenate(parts, axis=1))
    with pytest.raises(BackendError, match="parts do not make"):
        memory.assemble((1, 5, 2), [made])
    with pytest.raises(BackendError, match="0 bytes of parts do not make"):
        memory.assemble((1, 5, 2), [])


# --- weights ---


def upload(memory, refs):
    buffers = {ref: memory.allocate(ref.shape, ref.dtype) for ref in refs}
    memory.staging.upload_weights({ref: buffer.pointer for ref, buffer in buffers.items()})
    return buffers


def test_weights_arrive_whole(any_device, tmp_path, monkeypatch):
    """Tensors larger and smaller than a piece."""
    monkeypatch.setattr(staging, "_PIECE", 1 << 12)
    path, held = tmp_path / "weights", numbers(500_000)
    path.write_bytes(held.tobytes())
    places = [(3, 300_000), (300_003, 77), (400_000, 100_000), (300_100, 0)]
    refs = [WeightRef(path, start, nbytes, "uint8", (nbytes,)) for start, nbytes in places]
    for _ in range(2):
        for ref, buffer in upload(any_device.memory, refs).items():
            expected = held[ref.offset : ref.offset + ref.nbytes]
            np.testing.assert_array_equal(any_device.memory.download(buffer), expected)


def test_a_file_that_is_too_short_is_one_clear_error(tmp_path):
    """Regression: each load pinned and freed 128 MB."""
    path = tmp_path / "weights.safetensors"
    path.write_bytes(bytes(1000))
    device = Device()
    refs = [WeightRef(path, 0, 800, "uint8", (800,)), WeightRef(path, 800, 400, "uint8", (400,))]
    with pytest.raises(ArtifactError, match=r"weights.safetensors ends at byte 1000, expected 1"):
        upload(device.memory, refs)
    path.unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        upload(device.memory, refs)
    calls = device.cuda.calls
    assert (calls["cudaHostAlloc"], calls["cudaFreeHost"]) == (1, 0)
    assert not device.cuda.recorded


# --- addresses that stay ---


def test_scratch_grows_and_sets_change_places(any_device):
    memory, kv, scratch = any_device.memory, any_device.kv, any_device.scratch
    scratch.require(PAGE)
    memory.staging.upload(scratch.pointer, numbers(PAGE))
    scratch.require(8 * MIB)
    np.testing.assert_array_equal(content(any_device, scratch.pointer, PAGE), numbers(PAGE))
    blocks = [kv.take(nbytes) for nbytes in (5 * PAGE, 2 * PAGE)]
    for i, block in enumerate(blocks):
        memory.staging.upload(block.pointer, numbers(PAGE, i))
    for i in (0, 1, 0):
        kv.hold(blocks[i])
        np.testing.assert_array_equal(content(any_device, kv.place, PAGE), numbers(PAGE, i))
    memory.staging.upload(kv.place, numbers(PAGE, 9))
    held = content(any_device, blocks[0].pointer, PAGE)
    np.testing.assert_array_equal(held, numbers(PAGE, 9), "the same memory, not a copy")


def test_copies_on_a_stream_of_their_own(any_device):
    memory, kv = any_device.memory, any_device.kv
    store = PinnedStore(memory, kv, 4 * MIB, page_bytes=MIB)
    block, array = kv.take(3 * MIB + 5), numbers(3 * MIB + 5)
    memory.staging.upload(block.pointer, array)
    copy = store.keep(block.buffers({"k_ref.0": Place(0, array.shape, "uint8")}))
    del block
    restored = store.restore(copy)["k_ref.0"]
    kv.settle(restored.block)
    np.testing.assert_array_equal(memory.download(restored), array)
    del restored, copy
    store.close()


def test_what_is_there_already_costs_nothing():
    device = Device()
    device.scratch.require(1)
    waits = device.cuda.waits
    device.scratch.require(3 * PAGE + 1)
    assert device.scratch.nbytes == 4 * PAGE
    assert device.cuda.waits == waits, "growing waits for nothing"
    block = device.kv.take(PAGE)
    device.kv.hold(block)
    waits, allocations = device.cuda.waits, device.cuda.allocations
    device.kv.hold(block)
    del block  # idle, and still in the place
    device.kv.hold(device.kv.take(PAGE))
    device.scratch.require(PAGE)
    assert (device.cuda.waits, device.cuda.allocations) == (waits, allocations)
    device.scratch.shrink()
    assert (device.scratch.nbytes, device.cuda.used) == (0, PAGE)


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
    device.close()
    assert device.cuda.left[:4] == (0, 0, 0, 0)
    held.clear()
    gc.collect()
    assert not any(device.cuda.left)


def test_a_gpu_without_virtual_memory_is_refused(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr(cuda, "cuDeviceGetAttribute", lambda *_: (0, 0))
    with pytest.raises(BackendError, match="offers no virtual memory management"):
        VirtualMemory(CudaMemory(cuda.cuda))


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
    for name in ("cuMemMap", "cuMemSetAccess"):
        with monkeypatch.context() as patch:
            patch.setattr(device.cuda, name, lambda *_: (Status.cudaErrorInvalidValue,))
            for take in (device.kv.take, device.scratch.require):
                with pytest.raises(BackendError, match=name):
                    take(PAGE)
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

    def enter():
        with device.memory:
            entered.set()

    threading.Thread(target=enter, daemon=True).start()
    assert entered.wait(10)


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
