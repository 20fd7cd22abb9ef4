"""The runtime follows the plan: on stand-ins for a GPU that is as small as the test wants it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from klein_kv.artifacts.manifest import Manifest
from klein_kv.errors import BackendError, CapacityError
from klein_kv.runtime.backends.trt.backend import TrtBackend
from klein_kv.runtime.backends.trt.cuda import aligned
from klein_kv.runtime.pipeline import KleinKVPipeline
from klein_kv.runtime.planning.footprint import component_of
from klein_kv.runtime.planning.memory_plan import MemoryPlan, size_text
from tests.runtime.backends.fake_cuda import FakeCuda
from tests.runtime.backends.fake_engines import make_engines
from tests.runtime.backends.fake_trt import SCRATCH, FakeTrt

ROOMY = 1 << 34
REQUEST = {
    "prompt": "a kite",
    "height": 128,
    "width": 160,
    "seed": 3,
    "output_type": "np",
    "max_sequence_length": 64,
}


class Machine:
    """A pipeline on a stand-in GPU of some size, and what happened there."""

    def __init__(self, artifacts: Path, engines: Path, capacity: int, **options: Any) -> None:
        self.cuda = FakeCuda(capacity)
        self.trt = FakeTrt(artifacts, self.cuda)
        manifest = Manifest.load(artifacts)
        self.backend = TrtBackend(
            artifacts, manifest, engines=engines, cuda=self.cuda.cuda, trt=self.trt
        )
        options = {"reference_cache_bytes": 0} | options
        self.pipe = KleinKVPipeline(artifacts, manifest, self.backend, **options)
        self.pipe.set_progress_bar_config(disable=True)
        self.base = self.cuda.used  # before any request
        self.runs: list[str] = []
        run = self.backend.run

        def watch(graph: str, inputs: Any) -> Any:
            self.runs.append(graph)
            return run(graph, inputs)

        self.backend.run = watch  # type: ignore[method-assign]

    def __call__(self, image: Any = None, **changes: Any) -> np.ndarray:
        return np.asarray(self.pipe(**(REQUEST | {"image": image} | changes)).images)  # type: ignore[union-attr]

    @property
    def plan(self) -> MemoryPlan:
        """Of the last request."""
        plan = self.pipe.session.plan
        assert plan is not None
        return plan

    @property
    def components(self) -> set[str]:
        """Components with engines on the device."""
        return {component_of(graph) for graph in self.backend._loaded}


Open = Callable[..., Machine]


@pytest.fixture(scope="module")
def open_machine(tiny_artifacts, tmp_path_factory):
    """Machines of some capacity, on the same engines."""
    engines = make_engines(tiny_artifacts, tmp_path_factory.mktemp("engines"))

    def make(capacity: int = ROOMY, **options: Any) -> Machine:
        return Machine(tiny_artifacts, engines, capacity, **options)

    return make


@pytest.fixture(scope="module")
def pictures():
    """Large enough that the first step needs most memory."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (256, 272, 3), dtype=np.uint8)) for _ in range(2)]


def least_capacity(roomy: Machine) -> int:
    """The smallest device for what a roomy one did last: one component at a time."""
    request, (low, high) = roomy.plan.request, (0, ROOMY)
    while high - low > 1:
        middle = (low + high) // 2
        fits = roomy.pipe.session._make(request, middle).fits
        low, high = (low, middle) if fits else (middle, high)
    return high + roomy.base


def capacity_where(roomy: Machine, holds: Callable[[MemoryPlan], bool]) -> int:
    """The smallest device on which a plan of what a roomy one did last looks like that."""
    request = roomy.plan.request
    loaded, roomy.pipe.session._loaded = roomy.pipe.session._loaded, set()
    try:
        for capacity in range(1_000_000, 10_000_000, 20_000):
            plan = roomy.pipe.session._make(request, capacity)
            if plan.fits and holds(plan):
                return capacity + roomy.base
    finally:
        roomy.pipe.session._loaded = loaded
    raise AssertionError("on no device")


def residents(plan: MemoryPlan, graph: str) -> set[str]:
    stage = plan.stage(graph)
    assert stage is not None
    return set(stage.resident)


def test_all_stays_where_it_fits(open_machine, pictures):
    machine = open_machine()
    machine(pictures)
    machine(pictures, prompt="another")
    assert machine.components == {"text_encoder", "transformer", "vae"}
    assert sorted(machine.trt.loads) == sorted(set(machine.trt.loads)), "something came twice"
    # Scratch is lent to all engines.
    assert machine.backend._scratch.nbytes == aligned(SCRATCH, machine.cuda.granularity)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_components_take_turns_on_the_smallest_device_that_is_accepted(
    open_machine, pictures, count
):
    image = pictures[:count] or None
    roomy = open_machine()
    expected = [roomy(image), roomy(image, prompt="b")]
    capacity = least_capacity(roomy)
    machine = open_machine(capacity)
    steps = ["first_step", "cached_step"] if count else ["cached_step"]
    np.testing.assert_array_equal(machine(image), expected[0])
    assert not machine.plan.all_fits
    np.testing.assert_array_equal(machine(image, prompt="b"), expected[1])
    order = [graph for graph in machine.trt.loads if not graph.startswith("vae_")]
    assert order == ["text_encoder", *steps] * 2
    with pytest.raises(CapacityError, match="can be had"):
        open_machine(capacity - 2)(image)


def test_text_encoder_is_gone_before_the_transformer_comes(open_machine, monkeypatch):
    roomy = open_machine()
    roomy()
    machine = open_machine(least_capacity(roomy))
    events: list[str] = []
    release, load = machine.backend.release, machine.backend._load

    def watch_release(graph: str) -> None:
        if graph in machine.backend._loaded:
            events.append(f"release {graph}")
        release(graph)

    def watch_load(graph: str, folder: Any) -> Any:
        events.append(f"load {graph}")
        assert machine.components <= {component_of(graph), "vae"}
        return load(graph, folder)

    monkeypatch.setattr(machine.backend, "release", watch_release)
    monkeypatch.setattr(machine.backend, "_load", watch_load)
    machine()
    assert events[:3] == ["load text_encoder", "release text_encoder", "load cached_step"]


def test_a_known_prompt_leaves_the_transformer_alone(open_machine, pictures):
    """Regression: the plan made room for a text encoder that was not needed."""
    roomy = open_machine()
    roomy(pictures)
    capacity = capacity_where(
        roomy,
        lambda plan: (
            residents(plan, "vae_decoder") >= {"transformer", "vae"}
            and "text_encoder" not in residents(plan, "cached_step")
        ),
    )
    machine = open_machine(capacity)
    machine(pictures)
    assert machine.components == {"transformer", "vae"}
    before = len(machine.trt.loads)
    machine(pictures[::-1])
    assert {"vae_encoder", "vae_decoder"} >= set(machine.trt.loads[before:])
    machine(pictures, prompt="b")
    assert {"text_encoder", "first_step", "cached_step"} <= set(machine.trt.loads[before:])


def test_what_cannot_fit_is_refused_with_numbers_before_any_engine_runs(open_machine, pictures):
    roomy = open_machine()
    expected = roomy(pictures[:1])
    roomy(pictures)
    capacity = least_capacity(roomy)
    machine = open_machine(capacity - 50_000)
    with pytest.raises(CapacityError) as caught:
        machine(pictures)
    assert not machine.runs
    assert not machine.trt.loads
    assert machine.cuda.used == machine.base
    message = str(caught.value)
    for part in (
        " in first_step (transformer 1.3",
        f"reference K/V {size_text(roomy.plan.kv_bytes)}",
        f"{size_text(capacity - 50_000 - machine.base)} of device memory can be had",
        "what would fit: 1 reference; fp8 K/V; fp8 transformer",
    ):
        assert part in message
    np.testing.assert_array_equal(machine(pictures[:1]), expected)  # what it said would fit


def test_kept_references_give_way_on_a_device(open_machine, pictures):
    roomy = open_machine()
    expected = roomy(pictures)
    capacity = least_capacity(roomy)
    machine = open_machine(capacity, reference_cache_bytes=1 << 30)
    machine(pictures[0])
    assert machine.pipe.reference_store.stats.entries == 1
    np.testing.assert_array_equal(machine(pictures), expected)
    stats = machine.pipe.reference_store.stats
    assert (stats.misses, stats.evictions, stats.entries) == (2, 1, 1)


def test_kept_references_outstay_the_transformer(open_machine, pictures):
    """Weights come back from files sooner than keys and values are computed again."""
    roomy = open_machine()
    expected = roomy(pictures, prompt="b")

    def outstay(plan: MemoryPlan) -> bool:
        decoding = plan.stage("vae_decoder")
        assert decoding is not None
        return "kv" in decoding.parts and "transformer" not in decoding.resident

    kept = replace(roomy.plan.request, kv_kept=True)
    roomy.pipe.session.plan = replace(roomy.plan, request=kept)
    capacity = capacity_where(roomy, outstay)
    machine = open_machine(capacity, reference_cache_bytes=1 << 30)
    machine(pictures)
    assert machine.components == {"vae"}
    assert machine.pipe.reference_store.stats.entries == 1
    before = len(machine.runs)
    np.testing.assert_array_equal(machine(pictures, prompt="b"), expected)
    assert "first_step" not in machine.runs[before:]


def test_keys_and_values_that_nobody_keeps_are_gone_before_decoding(
    open_machine, pictures, monkeypatch
):
    """Regression: a closure held them until the request was done."""
    machine = open_machine()
    held: list[tuple[str, int]] = []
    run = machine.backend.run

    def watch(graph: str, inputs: Any) -> Any:
        held.append((graph, machine.cuda.capacity - machine.backend.available_memory()))
        return run(graph, inputs)

    monkeypatch.setattr(machine.backend, "run", watch)
    machine(pictures)
    used = dict(held)  # the last run of each graph
    assert used["cached_step"] - used["vae_decoder"] > 0.9 * machine.plan.kv_bytes


def test_known_references_count_once(open_machine, pictures):
    """What a set holds already is not asked for again, and it stays through all stages."""
    roomy = open_machine()
    expected = roomy(pictures)
    roomy(references=roomy.pipe.encode_references(pictures), prompt="b")
    capacity = least_capacity(roomy)
    machine = open_machine(capacity)
    references = machine.pipe.encode_references(pictures)
    np.testing.assert_array_equal(machine(references=references), expected)
    assert all(stage.parts["kv"] == references.nbytes for stage in machine.plan.stages)
    assert "first_step" not in machine.runs


@pytest.mark.parametrize("graph", ["text_encoder", "encode_references"])
def test_prompts_and_references_alone_are_planned_too(open_machine, pictures, graph):
    machine = open_machine(100_000)
    calls = {
        "text_encoder": lambda: machine.pipe.encode_prompt("a kite"),
        "encode_references": lambda: machine.pipe.encode_references(pictures),
    }
    with pytest.raises(CapacityError, match=f"in {graph}"):
        calls[graph]()
    assert not machine.trt.loads


def test_a_failed_load_leaves_no_weights(open_machine):
    machine = open_machine()

    def fail(_blob: bytes) -> None:
        raise CapacityError("planted")

    machine.backend._runtime.deserialize_cuda_engine = fail
    with pytest.raises(CapacityError, match="planted"):
        machine()
    assert machine.backend._weights == {}


@pytest.mark.parametrize("call", ["create_execution_context", "execute_async_v3"])
def test_a_failed_request_leaves_room_for_the_next(open_machine, pictures, call):
    """Regression: weights of an engine that broke were never counted, and never went."""
    roomy = open_machine()
    expected = roomy(pictures)
    machine = open_machine(least_capacity(roomy))
    machine.trt.refused[call] = ["planted"]
    with pytest.raises(BackendError, match="planted"):
        machine(pictures)
    machine.trt.refused.clear()
    np.testing.assert_array_equal(machine(pictures), expected)


def test_a_callback_leaves_the_plan_to_the_request_under_way(open_machine, pictures):
    """Regression: after another prompt, the steps went on without making room."""

    def other(pipe: KleinKVPipeline, *_: Any) -> dict[str, Any]:
        pipe.encode_prompt("another")
        return {}

    roomy = open_machine()
    expected = roomy(pictures)
    roomy(pictures, callback_on_step_end=other)
    machine = open_machine(least_capacity(roomy) + 900_000)
    np.testing.assert_array_equal(machine(pictures, callback_on_step_end=other), expected)


def test_a_callback_that_asks_for_nothing_costs_no_planning(open_machine, pictures, monkeypatch):
    """Regression: room was made before every step, as if another request had come between."""
    machine = open_machine()
    machine(pictures)

    def fail(*_: Any) -> None:
        raise AssertionError("room was made for what is there")

    monkeypatch.setattr(machine.pipe.session, "_make_room", fail)
    machine(pictures, callback_on_step_end=lambda *_: {})


@pytest.mark.parametrize("scratch", [20_000, 600_000])
def test_no_capacity_makes_a_request_touch_memory_that_is_not_there(
    open_machine, pictures, scratch
):
    """Regression: taking memory for keys and values took the scratch away before the run."""
    roomy = open_machine()
    expected = roomy(pictures)
    least = least_capacity(roomy) + scratch
    for capacity in range(least - 200_000, least + 200_000, 50_000):
        machine = open_machine(capacity, reference_cache_bytes=1 << 30)
        machine.trt.scratch = lambda _graph, _shapes: scratch
        for image in (pictures, pictures[::-1], pictures):
            try:
                made = machine(image)
            except CapacityError:
                continue
            if image is pictures:
                np.testing.assert_array_equal(made, expected)
