"""The runtime follows the plan: on stand-ins for a GPU that is as small as the test wants it."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from klein_kv.errors import BackendError, CapacityError
from klein_kv.runtime.backends.trt.cuda import aligned
from klein_kv.runtime.planning.footprint import component_of
from klein_kv.runtime.planning.memory_plan import MemoryPlan, size_text
from tests.runtime.backends.fake_cuda import FakeCuda
from tests.runtime.backends.fake_engines import Machine, make_engines
from tests.runtime.backends.fake_trt import SCRATCH

ROOMY = 1 << 34


@pytest.fixture(scope="module")
def open_machine(tiny_artifacts, tmp_path_factory):
    """Machines of some capacity, on the same engines."""
    engines = make_engines(tiny_artifacts, tmp_path_factory.mktemp("engines"))

    def make(capacity=ROOMY, **options) -> Machine:
        options = {"reference_cache_bytes": 0} | options
        return Machine(tiny_artifacts, engines, FakeCuda(capacity), **options)

    return make


@pytest.fixture(scope="module")
def pictures():
    """Large enough that the first step needs most memory."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (256, 272, 3), dtype=np.uint8)) for _ in range(2)]


@pytest.fixture(scope="module")
def roomy(open_machine, pictures):
    """A device where all fits, what it made of the pictures, and how much such a request takes."""
    machine = open_machine()
    images = [machine(pictures), machine(pictures, prompt="b")]
    return machine, images, least_capacity(machine)


def plan_of(machine: Machine) -> MemoryPlan:
    """The plan of the last request."""
    plan = machine.pipe.session.plan
    assert plan is not None
    return plan


def components(machine: Machine) -> set[str]:
    """Components with engines on the device."""
    return {component_of(graph) for graph in machine.backend._loaded}


def least_capacity(machine: Machine) -> int:
    """The smallest device for what a roomy one did last: one component at a time."""
    request, (low, high) = plan_of(machine).request, (0, ROOMY)
    while high - low > 1:
        middle = (low + high) // 2
        fits = machine.pipe.session._make(request, middle).fits
        low, high = (low, middle) if fits else (middle, high)
    return high + machine.base


def capacity_where(machine: Machine, holds, **changes) -> int:
    """The smallest device on which a plan of what a roomy one did last looks like that."""
    session, request = machine.pipe.session, replace(plan_of(machine).request, **changes)
    loaded, session._loaded = session._loaded, set()
    try:
        for capacity in range(1_000_000, 10_000_000, 20_000):
            plan = session._make(request, capacity)
            stages = {stage.name: stage for stage in plan.stages}
            if plan.fits and holds(stages):
                return capacity + machine.base
    finally:
        session._loaded = loaded
    raise AssertionError("on no device")


def test_all_stays_where_it_fits(roomy):
    machine, _, _ = roomy
    assert components(machine) == {"text_encoder", "transformer", "vae"}
    assert sorted(machine.trt.loads) == sorted(set(machine.trt.loads)), "something came twice"
    # Scratch is lent to all engines.
    assert machine.backend._scratch.nbytes == aligned(SCRATCH, machine.cuda.granularity)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_components_take_turns_on_the_smallest_device_that_is_accepted(
    count, open_machine, pictures
):
    image = pictures[:count] or None
    large = open_machine()
    expected = [large(image), large(image, prompt="b")]
    capacity = least_capacity(large)
    machine = open_machine(capacity)
    steps = ["first_step", "cached_step"] if count else ["cached_step"]
    np.testing.assert_array_equal(machine(image), expected[0])
    assert not plan_of(machine).all_fits
    np.testing.assert_array_equal(machine(image, prompt="b"), expected[1])
    order = [graph for graph in machine.trt.loads if not graph.startswith("vae_")]
    assert order == ["text_encoder", *steps] * 2
    with pytest.raises(CapacityError, match="can be had"):
        open_machine(capacity - 2)(image)


def test_text_encoder_is_gone_before_the_transformer_comes(open_machine, monkeypatch):
    large = open_machine()
    large()
    machine, events = open_machine(least_capacity(large)), []
    release, load = machine.backend.release, machine.backend._load

    def watch_release(graph):
        if graph in machine.backend._loaded:
            events.append(f"release {graph}")
        release(graph)

    def watch_load(graph, folder):
        events.append(f"load {graph}")
        assert components(machine) <= {component_of(graph), "vae"}
        return load(graph, folder)

    monkeypatch.setattr(machine.backend, "release", watch_release)
    monkeypatch.setattr(machine.backend, "_load", watch_load)
    machine()
    assert events[:3] == ["load text_encoder", "release text_encoder", "load cached_step"]


def test_a_known_prompt_leaves_the_transformer_alone(open_machine, roomy, pictures):
    """Regression: the plan made room for a text encoder that was not needed."""

    def holds(stages):
        return (
            stages["vae_decoder"].resident >= {"transformer", "vae"}
            and "text_encoder" not in stages["cached_step"].resident
        )

    machine = open_machine(capacity_where(roomy[0], holds))
    machine(pictures)
    assert components(machine) == {"transformer", "vae"}
    before = len(machine.trt.loads)
    machine(pictures[::-1])
    assert {"vae_encoder", "vae_decoder"} >= set(machine.trt.loads[before:])
    machine(pictures, prompt="b")
    assert {"text_encoder", "first_step", "cached_step"} <= set(machine.trt.loads[before:])


def test_what_cannot_fit_is_refused_with_numbers_before_any_engine_runs(
    open_machine, roomy, pictures
):
    large, _, capacity = roomy
    machine = open_machine(capacity - 50_000)
    with pytest.raises(CapacityError) as caught:
        machine(pictures)
    assert not machine.trt.runs
    assert not machine.trt.loads
    assert machine.cuda.used == machine.base
    message = str(caught.value)
    for part in (
        " in first_step (transformer 1.3",
        f"reference K/V {size_text(plan_of(large).kv_bytes)}",
        f"{size_text(capacity - 50_000 - machine.base)} of device memory can be had",
        "what would fit: 1 reference; fp8 K/V; fp8 transformer",
    ):
        assert part in message
    machine(pictures[:1])  # what it said would fit


@pytest.mark.parametrize("graph", ["text_encoder", "encode_references"])
def test_prompts_and_references_alone_are_planned_too(graph, open_machine, pictures):
    machine = open_machine(100_000)
    calls = {
        "text_encoder": lambda: machine.pipe.encode_prompt("a kite"),
        "encode_references": lambda: machine.pipe.encode_references(pictures),
    }
    with pytest.raises(CapacityError, match=f"in {graph}"):
        calls[graph]()
    assert not machine.trt.loads


# --- reference sets ---


def test_kept_references_give_way_on_a_device(open_machine, roomy, pictures):
    machine = open_machine(roomy[2], reference_cache_bytes=1 << 30)
    machine(pictures[0])
    assert machine.pipe.reference_store.stats.entries == 1
    np.testing.assert_array_equal(machine(pictures), roomy[1][0])
    stats = machine.pipe.reference_store.stats
    assert (stats.misses, stats.evictions, stats.entries) == (2, 1, 1)


def test_kept_references_outstay_the_transformer(open_machine, roomy, pictures):
    """Weights come back from files sooner than keys and values are computed again."""

    def outstay(stages):
        decoding = stages["vae_decoder"]
        return "kv" in decoding.parts and "transformer" not in decoding.resident

    capacity = capacity_where(roomy[0], outstay, kv_kept=True)
    machine = open_machine(capacity, reference_cache_bytes=1 << 30)
    machine(pictures)
    assert components(machine) == {"vae"}
    assert machine.pipe.reference_store.stats.entries == 1
    before = len(machine.trt.runs)
    np.testing.assert_array_equal(machine(pictures, prompt="b"), roomy[1][1])
    assert "first_step" not in machine.trt.runs[before:]


def test_keys_and_values_that_nobody_keeps_are_gone_before_decoding(
    open_machine, pictures, monkeypatch
):
    """Regression: a closure held them until the request was done."""
    machine, used = open_machine(), {}
    run = machine.backend.run

    def watch(graph, inputs):
        used[graph] = machine.cuda.capacity - machine.backend.available_memory()
        return run(graph, inputs)

    monkeypatch.setattr(machine.backend, "run", watch)
    machine(pictures)
    assert used["cached_step"] - used["vae_decoder"] > 0.9 * plan_of(machine).kv_bytes


def test_known_references_count_once(open_machine, roomy, pictures):
    """What a set holds already is not asked for again, and it stays through all stages."""
    large = open_machine()
    large(references=large.pipe.encode_references(pictures))
    machine = open_machine(least_capacity(large))
    references = machine.pipe.encode_references(pictures)
    np.testing.assert_array_equal(machine(references=references), roomy[1][0])
    assert all(stage.parts["kv"] == references.nbytes for stage in plan_of(machine).stages)
    assert "first_step" not in machine.trt.runs


# --- failures, callbacks ---


def test_a_failed_load_leaves_no_weights(open_machine):
    machine = open_machine()

    def fail(_blob):
        raise CapacityError("planted")

    machine.backend._runtime.deserialize_cuda_engine = fail
    with pytest.raises(CapacityError, match="planted"):
        machine()
    assert machine.backend._weights == {}


@pytest.mark.parametrize("call", ["create_execution_context", "execute_async_v3"])
def test_a_failed_request_leaves_room_for_the_next(call, open_machine, roomy, pictures):
    """Regression: weights of an engine that broke were never counted, and never went."""
    machine = open_machine(roomy[2])
    machine.trt.refused[call] = ["planted"]
    with pytest.raises(BackendError, match="planted"):
        machine(pictures)
    machine.trt.refused.clear()
    np.testing.assert_array_equal(machine(pictures), roomy[1][0])


def test_a_callback_leaves_the_plan_to_the_request_under_way(open_machine, roomy, pictures):
    """Regression: after another prompt, the steps went on without making room."""

    def other(pipe, *_):
        pipe.encode_prompt("another")
        return {}

    machine = open_machine(roomy[2] + 900_000)
    np.testing.assert_array_equal(machine(pictures, callback_on_step_end=other), roomy[1][0])
    assert not plan_of(machine).all_fits


def test_a_callback_that_asks_for_nothing_costs_no_planning(open_machine, pictures, monkeypatch):
    """Regression: room was made before every step, as if another request had come between."""
    machine = open_machine()
    machine(pictures)

    def fail(*_):
        raise AssertionError("room was made for what is there")

    monkeypatch.setattr(machine.pipe.session, "_make_room", fail)
    machine(pictures, callback_on_step_end=lambda *_: {})


def test_no_capacity_makes_a_request_touch_memory_that_is_not_there(open_machine, roomy, pictures):
    """Engines that need more scratch than their manifest says."""
    outcomes = []
    for more in range(0, 400_000, 100_000):
        machine = open_machine(roomy[2] + more, reference_cache_bytes=1 << 30)
        machine.trt.scratch = lambda _graph, _shapes: 600_000
        for image in (pictures, pictures[::-1], pictures):
            try:
                made = machine(image)
            except CapacityError:
                outcomes.append("refused")
                continue
            outcomes.append("made")
            if image is pictures:
                np.testing.assert_array_equal(made, roomy[1][0])
    assert set(outcomes) == {"made", "refused"}
