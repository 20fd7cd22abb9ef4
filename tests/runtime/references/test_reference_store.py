"""The store inside the pipeline: whatever is asked in whatever order, results are those without it.

The long sequences run on a stand-in for the graphs that is quick and as sensitive to its inputs.
"""

import gc
import logging
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from klein_kv import KleinKVPipeline
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.signature import kv_names
from klein_kv.errors import CapacityError, RequestError
from klein_kv.runtime.planning import memory
from klein_kv.runtime.references.byte_cache import ByteCache
from tests.runtime.conftest import Open, Picture, Pictures, SetFree
from tests.runtime.stub_backend import TOKEN, DeviceStub, Stub

Array = NDArray[Any]

SHARED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
# Indices into PICTURES: 64x64, 80x64, 96x64, 64x80, 64x96 pixels; 16 to 24 tokens each.
PICTURES = [(64, 64), (80, 64), (96, 64), (64, 80), (64, 96)]
SETS = st.lists(st.integers(0, len(PICTURES) - 1), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def manifest(tiny_artifacts: Path) -> Manifest:
    return Manifest.load(tiny_artifacts)


@pytest.fixture
def stub(tiny_artifacts: Path, manifest: Manifest) -> Open:
    """Pipelines on a stand-in; options as of `KleinKVPipeline`."""

    def make(kind: type[Stub] = Stub, **options: Any) -> KleinKVPipeline:
        pipeline = KleinKVPipeline(tiny_artifacts, manifest, kind(manifest), **options)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


@pytest.fixture(scope="session")
def pictures(picture: Picture) -> Pictures:
    return [picture(*size, seed=i) for i, size in enumerate(PICTURES)]


EMBEDS = np.linspace(-1, 1, 2 * 96, dtype=np.float32).reshape(1, 2, 96)


def edit(pipe: KleinKVPipeline, images: Pictures, **request: Any) -> Array:
    request = {"num_inference_steps": 2, "seed": 0, "output_type": "latent"} | request
    result: Array = pipe(
        prompt_embeds=EMBEDS, image=images, height=128, width=128, **request
    ).images
    return result


def graphs_of(pipe: KleinKVPipeline) -> list[str]:
    graphs: list[str] = pipe.backend.graphs  # type: ignore[attr-defined]
    return graphs


# --- sequences of requests ---


@settings(max_examples=30, suppress_health_check=SHARED)
@given(
    budget=st.integers(0, 100 * TOKEN),
    host_budget=st.one_of(st.just(0), st.integers(1, 150 * TOKEN)),
    calls=st.lists(
        st.tuples(SETS, st.sampled_from(["edit", "encode", "hold", "drop"])), max_size=12
    ),
)
def test_sequences_equal_those_without_a_store(
    budget: int,
    host_budget: int,
    calls: list[tuple[list[int], str]],
    stub: Open,
    pictures: Pictures,
) -> None:
    """On a device, and with host memory below it."""
    host_budget = host_budget if budget else 0
    pipe = stub(DeviceStub, reference_cache_bytes=budget, host_cache_bytes=host_budget)
    plain = stub(reference_cache_bytes=0)
    device = pipe.backend
    assert isinstance(device, DeviceStub)
    in_use = []
    for chosen, what in calls:
        images = [pictures[i] for i in chosen]
        if what == "drop":
            in_use.clear()
        elif what == "edit":
            np.testing.assert_array_equal(edit(pipe, images), edit(plain, images))
        else:
            references = pipe.encode_references(images)
            expected = plain.encode_references(images)
            for name in kv_names(3):
                np.testing.assert_array_equal(references.kv[name], expected.kv[name])
            if what == "hold":
                in_use.append(references)
            del references
        stats = pipe.reference_store.stats
        assert stats.bytes <= budget
        if budget:
            contents = device.contents()
            assert len(contents) == len(set(contents)), "two copies on the device"
        held = 0 if device.host is None else device.host.bytes
        assert stats.host_bytes == held <= host_budget


def test_many_requests_leave_nothing_behind(stub: Open, pictures: Pictures) -> None:
    """Neither arrays nor entries; and nothing waits for the garbage collector."""
    pipe = stub(reference_cache_bytes=70 * TOKEN)
    rng = np.random.default_rng(0)
    sets = [[pictures[i] for i in rng.integers(0, 5, rng.integers(1, 3))] for _ in range(40)]
    arrays: list[weakref.ref[Array]] = []
    run = pipe.backend.run

    def watch(graph: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        outputs = run(graph, inputs)
        arrays.extend(weakref.ref(array) for array in outputs.values())
        return outputs

    pipe.backend.run = watch  # type: ignore[method-assign]
    gc.disable()
    try:
        for _ in range(120):
            edit(pipe, sets[rng.integers(0, len(sets))], num_inference_steps=1)
            assert pipe.reference_store.stats.bytes <= 70 * TOKEN
        stats = pipe.reference_store.stats
        assert sum(array() is not None for array in arrays) == 6 * stats.entries
        dead = weakref.ref(pipe.encode_references(sets[0]))
        pipe.reference_store.clear()
        assert dead() is None
        assert all(array() is None for array in arrays)
    finally:
        gc.enable()
    assert stats.hits + stats.misses == 120
    assert min(stats.hits, stats.misses, stats.evictions) > 10


def test_threads_that_ask_for_the_same_references_encode_once(
    stub: Open, pictures: Pictures
) -> None:
    pipe = stub(reference_cache_bytes=1 << 20)
    expected = edit(stub(reference_cache_bytes=0), pictures[:2])
    results, barrier = [], threading.Barrier(6)

    def work() -> None:
        barrier.wait()
        results.append(edit(pipe, pictures[:2]))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(results) == 6
    for result in results:
        np.testing.assert_array_equal(result, expected)
    assert graphs_of(pipe).count("first_step") == 1
    assert graphs_of(pipe).count("vae_encoder") == 2


# --- budgets ---


def test_default_budget_is_a_quarter_of_what_is_free(stub: Open, set_free: SetFree) -> None:
    set_free(4000)
    pipe = stub()
    assert (pipe.reference_store.budget, pipe.prompt_cache.budget) == (1000, 250)


def test_default_budget_is_all_that_nothing_else_needs() -> None:
    weights = {"text_encoder": 16, "transformer": 18, "vae": 1}
    assert memory.reference_budget(135, weights, besides=10, flagship=8) == 90
    # The flagship edit does not fit beside all: the text encoder goes before the transformer comes.
    assert memory.reference_budget(51, weights, besides=10, flagship=8) == 51 - 10 - 19
    assert memory.reference_budget(18, weights, besides=10, flagship=8) == 0
    assert memory.reference_budget(100, dict.fromkeys(weights, 0), besides=0, flagship=8) == 25


def test_store_gives_way_to_a_request(stub: Open, pictures: Pictures, set_free: SetFree) -> None:
    pipe = stub(reference_cache_bytes=1 << 20)
    for image in pictures[:4]:
        pipe.encode_references(image)
    held = pipe.reference_store.stats
    assert held.entries == 4
    edit(pipe, pictures[:1])
    needed = pipe.session.plan.peak - pipe.session.plan.kv_bytes  # its own set is held
    set_free(needed - held.bytes // 2)
    edit(pipe, pictures[:1])
    assert 1 <= pipe.reference_store.stats.entries < 4
    assert pipe.reference_store.stats.misses == 4  # its own references stayed
    set_free(0)
    with pytest.raises(CapacityError, match="the request needs"):
        edit(pipe, pictures[:1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference_cache_bytes": 0, "host_cache_bytes": 1}, "turns reuse off"),
        ({"reference_cache_bytes": -1}, "a reference set is -1 bytes"),
        ({"reference_cache_bytes": "1 GB"}, "'1 GB' bytes"),
        ({"prompt_cache_bytes": -1}, "text embeddings is -1 bytes"),
        ({"host_cache_bytes": -1}, "host_cache_bytes is -1"),
        ({"host_cache_bytes": 1 << 20}, "which backend onnxruntime cannot use"),
        ({"reference_cache_dir": "sets"}, "there is no option 'reference_cache_dir'"),
    ],
)
def test_bad_budgets(options: dict[str, Any], message: str, stub: Open) -> None:
    with pytest.raises(RequestError, match=message):
        stub(**options)


# --- host memory below a device ---


def test_host_memory_that_cannot_be_had_is_a_warning(
    stub: Open, pictures: Pictures, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = stub(DeviceStub, reference_cache_bytes=30 * TOKEN, host_cache_bytes=1 << 20)
    assert isinstance(pipe.backend, DeviceStub)
    assert pipe.backend.host is not None
    pipe.backend.host.budget = 0  # as if its pages were all in use
    with caplog.at_level(logging.WARNING, "klein_kv"):
        expected = [edit(pipe, [image]) for image in pictures[:2]]
    assert "not kept in host memory: no pages are left" in caplog.text
    for image, latents in zip(pictures[:2], expected, strict=True):
        np.testing.assert_array_equal(edit(pipe, [image]), latents)


# --- the cache alone: what it holds, and in which order it gives up ---


@dataclass(eq=False)
class Value:
    nbytes: int
    name: str = ""


def get(cache: ByteCache[Value], key: str, nbytes: int = 10) -> Value:
    value = cache.get(key)
    if value is None:
        value = Value(nbytes, key)
        cache.put(key, value)
    return value


def held(cache: ByteCache[Value], keys: str = "abcd") -> str:
    gc.collect()
    return "".join(key for key in keys if key in cache)


def test_least_recently_used_goes_first() -> None:
    cache: ByteCache[Value] = ByteCache(30, "a value")
    for key in "abcad":
        get(cache, key)
    assert held(cache) == "acd"
    assert (cache.hits, cache.misses, cache.evictions) == (1, 4, 1)
    assert (len(cache), cache.nbytes) == (3, 30)
    get(cache, "b", 25)  # displaces several
    assert held(cache) == "b"


def test_evicted_value_in_use_is_found_again() -> None:
    cache: ByteCache[Value] = ByteCache(10, "a value")
    first = get(cache, "a")
    get(cache, "b")
    assert "a" in cache
    assert get(cache, "a") is first
    get(cache, "b")
    del first
    assert held(cache) == "b"


def test_what_is_given_up_is_handed_on() -> None:
    handed: list[str] = []

    class Watched(ByteCache[Value]):
        def _give_up(self, key: str, value: Value) -> None:
            handed.append(key)

    cache = Watched(20, "a value")
    for key in "abc":
        get(cache, key)
    get(cache, "d", 21)  # larger than the budget: it displaces nothing
    assert handed == ["a", "d"]
    assert held(cache) == "bc"
    assert cache.free(1, keep="b") == 10
    assert handed == ["a", "d", "c"]
    assert cache.free(100) == 10
    get(cache, "a")
    cache.clear()
    assert (handed, held(cache)) == (["a", "d", "c", "b"], "")


def test_no_budget_keeps_nothing() -> None:
    cache: ByteCache[Value] = ByteCache(0, "a value")
    value = get(cache, "a")
    assert cache.get("a") is None
    assert value.nbytes == 10, "though it is alive"
