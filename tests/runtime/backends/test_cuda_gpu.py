"""`CudaMemory` on a real GPU: uploads, downloads, events, pools, virtual memory, two threads.

Needs cuda-python and an NVIDIA GPU of any kind, and nothing else.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from klein_kv.artifacts.weights import WeightRef
from klein_kv.errors import CapacityError
from klein_kv.runtime.backends.trt.cuda import Event, load_cuda
from klein_kv.runtime.backends.trt.memory import CudaMemory
from klein_kv.runtime.backends.trt.pinned import PinnedStore
from klein_kv.runtime.backends.trt.virtual import KvMemory, Place, Scratch, VirtualMemory

pytestmark = pytest.mark.gpu
MIB = 1 << 20


@pytest.fixture
def memory():
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-python")
    status, count = runtime.cudaGetDeviceCount()
    if int(status) != 0 or not count:
        pytest.skip("needs an NVIDIA GPU")
    memory = CudaMemory(load_cuda(), staging_bytes=4 * MIB)
    with memory:
        yield memory
    memory.close()


def numbers(nbytes: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def test_there_and_back(memory):
    """In pieces larger than the staging memory, and in many that fill it."""
    for sizes in ([1, 255, 4096, 3 * MIB, 9 * MIB + 7], [700_000] * 12):
        arrays = [numbers(nbytes, seed) for seed, nbytes in enumerate(sizes)]
        buffers = [memory.upload(array) for array in arrays]
        for buffer, array in zip(buffers, arrays, strict=True):
            np.testing.assert_array_equal(memory.download(buffer), array)
        whole = memory.assemble((sum(sizes),), buffers)
        np.testing.assert_array_equal(memory.download(whole), np.concatenate(arrays))


def test_blocks_come_back_from_the_pool(memory):
    first = memory.allocate((MIB,), "uint8")
    pointer = first.pointer
    del first
    assert memory.allocate((MIB,), "uint8").pointer == pointer
    with pytest.raises(CapacityError):
        memory.allocate((memory.call("cudaMemGetInfo")[1] + MIB,), "uint8")


def test_events_take_the_time(memory):
    source, target = (memory.allocate((64 * MIB,), "uint8") for _ in range(2))
    start = Event(memory.cuda, memory.stream, timed=True)
    for _ in range(20):
        memory.copy(target.pointer, source.pointer, 64 * MIB)
    end = Event(memory.cuda, memory.stream, timed=True)
    end.synchronize()
    assert 1e-2 < memory.call("cudaEventElapsedTime", start.handle, end.handle) < 1e3


def test_weights_from_a_file(memory, tmp_path):
    content = numbers(20 * MIB)
    path = tmp_path / "weights"
    path.write_bytes(content.tobytes())
    refs = [
        WeightRef(path, start, nbytes, "uint8", (nbytes,))
        for start, nbytes in ((3, 12 * MIB), (3 + 12 * MIB, 77), (15 * MIB, 5 * MIB))
    ]
    buffers = {ref: memory.allocate(ref.shape, "uint8") for ref in refs}
    memory.staging.upload_weights({ref: buffer.pointer for ref, buffer in buffers.items()})
    for ref, buffer in buffers.items():
        expected = content[ref.offset : ref.offset + ref.nbytes]
        np.testing.assert_array_equal(memory.download(buffer), expected)


def test_scratch_grows_and_sets_change_places(memory):
    virtual = VirtualMemory(memory)
    scratch, kv = Scratch(memory, virtual), KvMemory(memory, virtual)
    scratch.require(MIB)
    array = numbers(MIB)
    memory.staging.upload(scratch.pointer, array)
    scratch.require(64 * MIB)
    back = np.empty(MIB, np.uint8)
    memory.staging.download(scratch.pointer, back)
    np.testing.assert_array_equal(back, array)
    blocks = [kv.take(40 * MIB) for _ in range(2)]
    for i, block in enumerate(blocks):
        memory.staging.upload(block.pointer, numbers(MIB, i))
    for i in (0, 1, 0):
        kv.hold(blocks[i])
        memory.staging.download(kv.place, back)
        np.testing.assert_array_equal(back, numbers(MIB, i))
    blocks.clear()
    kv.close()
    scratch.close()


def test_copies_on_a_stream_of_their_own(memory):
    kv = KvMemory(memory, VirtualMemory(memory))
    store = PinnedStore(memory, kv, 64 * MIB)
    block = kv.take(20 * MIB)
    array = numbers(20 * MIB)
    memory.staging.upload(block.pointer, array)
    copy = store.keep(block.buffers({"k_ref.0": Place(0, (20 * MIB,), "uint8")}))
    del block
    restored = store.restore(copy)["k_ref.0"]
    kv.settle(restored.block)  # type: ignore[arg-type]
    np.testing.assert_array_equal(memory.download(restored), array)
    del restored, copy
    store.close()
    kv.close()


def test_two_threads(memory):
    # The fixture's thread holds its memory: these get another one, one after the other.
    other = CudaMemory(load_cuda(), staging_bytes=MIB)

    def work(i: int) -> None:
        for turn in range(50):
            array = numbers(100_000, 100 * i + turn)
            with other:
                np.testing.assert_array_equal(other.download(other.upload(array)), array)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    other.close()
    assert memory.free > 0
