"""Copies in pinned host memory, on streams that lag behind each other in every way.

"Work of the graphs" is what the tests give the main stream: it writes and reads device memory when
the stream gets to it. Whatever is not put in order reads or overwrites the wrong thing under one of
the lags.
"""

import gc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from klein_kv.errors import CapacityError, RequestError
from klein_kv.runtime.backends.trt.cuda import aligned
from klein_kv.runtime.backends.trt.memory import CudaMemory, DeviceBuffer
from klein_kv.runtime.backends.trt.pinned import PinnedCopy, PinnedStore
from klein_kv.runtime.backends.trt.virtual import KvMemory, VirtualMemory
from tests.runtime.backends.fake_cuda import FakeCuda, Status
from tests.runtime.backends.fake_trt import array_at

LAGS = [(), (0,), (1,), (0, 1)]
PAGE = 256
SHAPES = {"k_ref.0": (1, 30, 2, 2), "k_ref_scale.0": (1, 1, 2, 1), "v_ref.0": (1, 30, 2, 2)}
NBYTES = 512 + 256 + 4 * 120  # aligned: 5 pages, and tensors that cross from one to the next


class Device:
    """A device, memory for copies, and work on the main stream."""

    def __init__(self, lagging: tuple[int, ...], pages: int = 10) -> None:
        self.cuda = FakeCuda(lagging=lagging)
        self.memory = CudaMemory(self.cuda.cuda, staging_bytes=4096)
        self.kv = KvMemory(self.memory, VirtualMemory(self.memory))
        self.store = PinnedStore(self.memory, self.kv, pages * PAGE, PAGE)

    def make(self, value: float) -> dict[str, DeviceBuffer]:
        """A set that the main stream writes."""
        block, start, buffers = self.kv.take(NBYTES), 0, {}
        self.kv.settle(block)
        for i, (name, shape) in enumerate(SHAPES.items()):
            buffers[name] = DeviceBuffer(block.pointer + start, shape, "float32", block)
            start += aligned(buffers[name].nbytes)
            target = array_at(buffers[name].pointer, shape, "float32")
            self.run(lambda target=target, i=i: target.fill(value + i))
        return buffers

    def read(self, buffers: dict[str, DeviceBuffer]) -> dict[str, NDArray[Any]]:
        """What the main stream will see; valid after `finish`."""
        seen = {name: np.zeros(buffer.shape, np.float32) for name, buffer in buffers.items()}
        for name, buffer in buffers.items():
            self.kv.settle(buffer.block)  # type: ignore[arg-type]  # as an engine does
            source = array_at(buffer.pointer, buffer.shape, "float32")
            self.run(lambda a=seen[name], b=source: np.copyto(a, b))
        return seen

    def run(self, work: Any) -> None:
        self.cuda.enqueue(self.memory.stream, work)

    def finish(self) -> None:
        self.memory.synchronize()


def assert_holds(arrays: dict[str, NDArray[Any]], value: float) -> None:
    assert list(arrays) == list(SHAPES)
    for i, (name, array) in enumerate(arrays.items()):
        np.testing.assert_array_equal(array, np.full(SHAPES[name], value + i, np.float32), name)


def content(device: Device, copy: PinnedCopy) -> dict[str, NDArray[Any]]:
    """What lies in the pages, once the copy is done."""
    device.memory.call("cudaStreamSynchronize", device.store._stream)
    pages = np.concatenate([array_at(page, (PAGE,), "uint8") for page in copy.pages])
    return {
        name: pages[place.start :][: 4 * int(np.prod(place.shape))]
        .view(np.float32)
        .reshape(place.shape)
        for name, place in copy.places.items()
    }


Calls = list[tuple[str, int]]


def play(lagging: tuple[int, ...], calls: Calls, pages: int = 10) -> Device:
    """Makes sets, copies, restores and drops them in an order; checks all that anybody sees."""
    device = Device(lagging, pages)
    on_device: list[tuple[float, dict[str, DeviceBuffer]]] = []
    on_host: list[tuple[float, PinnedCopy]] = []
    seen: list[tuple[float, dict[str, NDArray[Any]]]] = []
    for number, (what, at) in enumerate(calls):
        if what == "make":
            on_device.append((10.0 * number, device.make(10.0 * number)))
        elif what in ("keep", "read", "drop") and on_device:
            value, buffers = on_device[at % len(on_device)]
            if what == "drop":
                del on_device[at % len(on_device)]
            elif what == "read":
                seen.append((value, device.read(buffers)))
            elif len(on_host) < pages // 5:
                on_host.append((value, device.store.keep(buffers)))
            else:
                with pytest.raises(CapacityError, match=f"0 of {pages} are free"):
                    device.store.keep(buffers)
            del buffers
        elif what in ("restore", "host", "forget") and on_host:
            value, copy = on_host[at % len(on_host)]
            if what == "forget":
                del on_host[at % len(on_host)]
            elif what == "restore":
                on_device.append((value, device.store.restore(copy)))
            else:
                assert_holds(content(device, copy), value)
            del copy
    for value, copy in on_host:
        assert copy.nbytes == device.store.size(NBYTES) == 5 * PAGE
        assert_holds(content(device, copy), value)
    for value, buffers in on_device:
        seen.append((value, device.read(buffers)))
    device.finish()
    for value, arrays in seen:
        assert_holds(arrays, value)
    return device


# By name: pages of pinned memory, sets that the device makes memory for, and the calls.
KNOWN: dict[str, tuple[int, int, Calls]] = {
    "there and back": (5, 2, [("make", 0), ("keep", 0), ("host", 0), ("restore", 0)]),
    # The next user of memory must wait for the copy, on whichever stream that is.
    "given back while it is copied": (
        10,
        1,
        [("make", 0), ("keep", 0), ("drop", 0), ("make", 0), ("keep", 0)],
    ),
    # A set on its way to the device takes memory that enqueued work has not read yet.
    "given back while graphs still read it": (
        5,
        2,
        [("make", 0), ("keep", 0), ("make", 0), ("read", 1), ("drop", 1), ("restore", 0)],
    ),
    # The copy must not arrive in what the memory is used for next.
    "restored and dropped unused": (
        5,
        1,
        [("make", 0), ("keep", 0), ("drop", 0), ("restore", 0), ("drop", 0), ("make", 0)],
    ),
    "pages given back while they are copied": (
        5,
        3,
        [("make", 0), ("keep", 0), ("restore", 0), ("forget", 0), ("make", 0), ("keep", 2)],
    ),
}


@pytest.mark.parametrize("lagging", LAGS)
@pytest.mark.parametrize("name", KNOWN)
def test_known_orders(name, lagging):
    pages, sets, calls = KNOWN[name]
    device = play(lagging, calls, pages)
    assert device.cuda.calls["cuMemCreate"] == sets
    device.kv.trim()  # a copy must not arrive in what the system makes of it, either
    assert device.cuda.used == 0


@settings(deadline=None, max_examples=60)
@given(
    lagging=st.sampled_from(LAGS),
    calls=st.lists(
        st.tuples(
            st.sampled_from(["make", "keep", "restore", "read", "host", "drop", "forget"]),
            st.integers(0, 5),
        ),
        max_size=25,
    ),
)
def test_any_order_of_copies(lagging, calls):
    play(lagging, calls)


def test_all_is_pinned_at_once_and_used_again():
    """Regression: pinning happened page by page, inside the first request that gave a set up."""
    device = Device(())
    pinned = set(device.cuda.pinned)
    assert device.cuda.calls["cudaHostAlloc"] == 2  # the other is for uploads
    for i in range(20):
        device.store.keep(device.make(float(i)))
    assert set(device.cuda.pinned) == pinned


def test_close_leaves_nothing_behind():
    device = Device((0, 1))
    device.store.restore(device.store.keep(device.make(1.0)))
    device.store.close()
    device.kv.close()
    gc.collect()
    assert device.cuda.used == 0
    device.memory.close()
    assert not any(device.cuda.left)


def test_what_cannot_be_pinned(monkeypatch):
    device = Device(())
    with pytest.raises(RequestError, match="255 bytes, expected 256 or more"):
        PinnedStore(device.memory, device.kv, 255, PAGE)
    full = (Status.cudaErrorMemoryAllocation, 0)
    monkeypatch.setattr(device.cuda, "cudaHostAlloc", lambda *_: full)
    with pytest.raises(CapacityError, match=r"does not pin .* of host memory; give host"):
        PinnedStore(device.memory, device.kv, 8 * PAGE, PAGE)
