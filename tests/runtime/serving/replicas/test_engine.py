"""What the front does with replicas: without Ray, in one process."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from klein_kv.errors import BackendError
from klein_kv.runtime.serving.errors import ServiceError, draining
from klein_kv.runtime.serving.jobs import EditJob, EditResult, EncodeResult, EngineFacts, Job
from klein_kv.runtime.serving.metrics import Metrics
from klein_kv.runtime.serving.replicas import engine as engine_module
from klein_kv.runtime.serving.replicas.engine import RayEngine, rank
from klein_kv.runtime.serving.replicas.events import Event, ReplicaLostError, Taken

FACTS = EngineFacts("pocket", "digest", "kv", 16, "fake")
PIXELS = np.zeros((16, 16, 3), np.uint8)
IMAGE = Image.fromarray(PIXELS)


class FakeReplica:
    """A process that takes `room` jobs, each until `go` is set, and can die."""

    def __init__(self, name: str, room: int = 8, facts: EngineFacts = FACTS) -> None:
        self.name = name
        self.room = room
        self.facts = facts
        self.go = asyncio.Event()
        self.dead = asyncio.Event()
        self.done: list[str] = []  # digests
        self.jobs = 0
        self.most = 0
        self.ready = True
        self.closed = self.ending = False

    async def open(self) -> EngineFacts:
        return self.facts

    async def status(self) -> tuple[bool, dict[str, float]]:
        if self.dead.is_set():
            raise ReplicaLostError("killed")
        return self.ready, {"queue_depth": float(self.jobs)}

    async def close(self, timeout_s: float) -> None:
        self.closed = True

    async def do(self, job: Job) -> AsyncGenerator[Event, None]:
        if self.dead.is_set():
            raise ReplicaLostError("killed before")
        yield Taken()
        if self.ending:
            yield draining()
            return
        if self.jobs >= self.room:
            yield ServiceError("queue_full", "full", retry_after_s=1.5)
            return
        self.jobs += 1
        self.most = max(self.most, self.jobs)
        try:
            if isinstance(job, EditJob):
                for step in range(job.previews):
                    yield Image.new("L", (1, 1), step)
            waits = [asyncio.ensure_future(x.wait()) for x in (self.go, self.dead)]
            try:
                await asyncio.wait(waits, return_when="FIRST_COMPLETED")
            finally:
                for wait in waits:
                    wait.cancel()
            if self.dead.is_set():
                raise ReplicaLostError("killed")
            self.done.append(job.digest)
            if not isinstance(job, EditJob):
                yield EncodeResult(known=False, nbytes=1, tokens=1)
            else:
                yield EditResult((IMAGE,), references_known=False)
        finally:
            self.jobs -= 1


class Fleet:
    """Replicas of an engine by name, the newest of each; `old` are those that were replaced."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.now: dict[str, FakeReplica] = {}
        self.old: list[FakeReplica] = []

    def make(self, name: str) -> FakeReplica:
        if name in self.now:
            self.old.append(self.now[name])
        self.now[name] = FakeReplica(name, **self.options)
        return self.now[name]

    def __iter__(self) -> Any:
        return iter(self.now.values())

    async def where(self, jobs: int = 1) -> FakeReplica:
        """The replica that has so many jobs, as soon as one has."""
        await until(lambda: any(replica.jobs == jobs for replica in self))
        return next(replica for replica in self if replica.jobs == jobs)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


Scenario = Callable[[RayEngine, Fleet], Coroutine[Any, Any, None]]


def played(replicas: int = 3, **options: Any) -> Callable[[Scenario], Callable[[], None]]:
    """Makes a test of a scenario, with an engine that is ready and closed after it."""

    async def run(scenario: Scenario) -> None:
        fleet = Fleet(**options)
        failures: list[BaseException] = []
        engine = RayEngine(fleet.make, replicas, failures.append)
        try:
            async with asyncio.timeout(10):
                await until(lambda: engine.ready)
                await scenario(engine, fleet)
        finally:
            await asyncio.to_thread(engine.close)
        assert not failures
        assert all(replica.closed for replica in fleet)

    return lambda scenario: lambda: asyncio.run(run(scenario))


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "_ASK_EVERY_S", 0.01)


def edit(digest: str = "a", **changes: Any) -> EditJob:
    return replace(EditJob(prompt="p", references=(PIXELS,), digest=digest), **changes)


async def refusal(work: Awaitable[Any]) -> ServiceError:
    with pytest.raises(ServiceError) as error:
        await work
    return error.value


def go(fleet: Fleet) -> None:
    for replica in fleet:
        replica.go.set()


@played()
async def test_a_set_stays_on_one_replica_and_what_has_none_is_spread(
    engine: RayEngine, fleet: Fleet
) -> None:
    go(fleet)
    digests = [f"set-{i}" for i in range(12)]
    await engine.do(Job((PIXELS,), "set-0"))
    for digest in digests * 3:
        await engine.do(edit(digest))
    for digest in digests:
        assert sum(digest in replica.done for replica in fleet) == 1
    assert sum(bool(replica.done) for replica in fleet) == 3
    for replica in fleet:
        replica.go.clear()
    free = [asyncio.create_task(engine.do(edit(""))) for _ in range(3)]
    await until(lambda: all(replica.jobs == 1 for replica in fleet))
    go(fleet)
    await asyncio.gather(*free)


@played(room=5)
async def test_a_crowd_is_spread_and_a_flood_is_refused_at_the_bound(
    engine: RayEngine, fleet: Fleet
) -> None:
    tasks = [asyncio.create_task(engine.do(edit())) for _ in range(4)]
    home = await fleet.where(jobs=4)  # until there is a crowd, the set stays there
    tasks += [asyncio.create_task(engine.do(edit())) for _ in range(8)]
    await until(lambda: sum(replica.jobs for replica in fleet) == 12)
    assert home.jobs == 4
    tasks += [asyncio.create_task(engine.do(edit())) for _ in range(8)]
    await asyncio.wait(tasks, timeout=0.05)
    refused = [task.exception() for task in tasks if task.done()]
    assert [(x.status, x.retry_after_s) for x in refused] == [(429, 1.5)] * (20 - 3 * 5)
    assert all(replica.most == 5 for replica in fleet)
    go(fleet)
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(isinstance(x, EditResult) for x in done) == 15


@played()
async def test_a_lost_replica_loses_no_job_and_its_name_comes_back(
    engine: RayEngine, fleet: Fleet
) -> None:
    shown: list[int] = []
    tasks = [asyncio.create_task(engine.do(edit("b"))) for _ in range(2)]
    tasks.append(
        asyncio.create_task(
            engine.do(edit("b", previews=2), lambda image: shown.append(image.getpixel((0, 0))))
        )
    )
    home = await fleet.where(jobs=3)
    home.dead.set()
    await until(lambda: home in fleet.old)
    go(fleet)
    assert len(await asyncio.gather(*tasks)) == 3
    assert shown == [0, 1]  # not those of the second replica again
    assert home.closed
    assert engine.gauges()[f"replica_lost_total@{home.name}"] == 1
    await until(lambda: engine.gauges()[f"replica_up@{home.name}"] == 1)
    go(fleet)
    await engine.do(edit("b"))
    assert fleet.now[home.name].done == ["b"]


@played(replicas=2, room=1)
async def test_a_job_that_was_taken_waits_where_new_ones_are_refused(
    engine: RayEngine, fleet: Fleet
) -> None:
    tasks = [asyncio.create_task(engine.do(edit(str(i)))) for i in range(2)]
    tasks.append(asyncio.create_task(engine.do(edit("a"))))
    await until(lambda: sum(replica.jobs for replica in fleet) == 2)
    await asyncio.wait(tasks, timeout=0.02)
    refused = [task for task in tasks if task.done()]
    assert len(refused) == 1
    assert refused[0].exception().code == "queue_full"
    fleet.now["replica-0"].dead.set()  # the other one is full
    await asyncio.sleep(0.1)
    go(fleet)
    results = [await task for task in tasks if task not in refused]
    assert len(results) == 2


@played(replicas=2)
async def test_a_job_outlives_the_loss_of_all_replicas_but_kills_only_two(
    engine: RayEngine, fleet: Fleet
) -> None:
    task = asyncio.create_task(engine.do(edit()))
    await fleet.where()
    for replica in list(fleet):  # at once: the second one never had the job
        replica.dead.set()
    await until(lambda: len(fleet.old) == 2)
    second = await fleet.where()
    assert second not in fleet.old
    second.dead.set()
    error = await refusal(task)
    assert (error.code, error.message) == ("internal_error", "the request failed twice")


@played(replicas=1)
async def test_without_a_replica_new_jobs_are_refused(engine: RayEngine, fleet: Fleet) -> None:
    assert engine.ready
    fleet.now["replica-0"].ready = False
    await until(lambda: not engine.ready)
    error = await refusal(engine.do(edit()))
    assert (error.code, error.status) == ("not_ready", 503)


@played(room=1)
async def test_cancelling_and_deadlines_free_the_place(engine: RayEngine, fleet: Fleet) -> None:
    task = asyncio.create_task(engine.do(edit()))
    home = await fleet.where()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert home.jobs == 0
    task = asyncio.create_task(engine.do(edit(timeout_s=0.05)))
    (await fleet.where()).dead.set()
    for replica in fleet:
        replica.dead.set()
    for _ in range(3):  # and whatever replaces them
        await asyncio.sleep(0.01)
        for replica in fleet:
            replica.room = 0
    assert (await refusal(task)).code == "deadline"


@played()
async def test_draining_ends_what_was_begun_and_takes_nothing_more(
    engine: RayEngine, fleet: Fleet
) -> None:
    task = asyncio.create_task(engine.do(edit()))
    await fleet.where()
    drain = asyncio.create_task(engine.drain(5))
    await asyncio.sleep(0)
    assert not engine.ready
    assert (await refusal(engine.do(edit()))).code == "draining"
    assert not drain.done()
    go(fleet)
    await drain
    assert (await task).images == (IMAGE,)


@played()
async def test_what_is_not_done_in_time_is_told_so(engine: RayEngine, fleet: Fleet) -> None:
    task = asyncio.create_task(engine.do(edit()))
    home = await fleet.where()
    await engine.drain(0.01)
    assert (await refusal(task)).code == "draining"
    assert home.jobs == 0


@played(replicas=2)
async def test_a_replica_that_is_about_to_end_is_passed_over(
    engine: RayEngine, fleet: Fleet
) -> None:
    go(fleet)
    await engine.do(edit())
    home = next(replica for replica in fleet if replica.done)
    home.ending = True
    await engine.do(edit())
    assert sum(len(replica.done) for replica in fleet) == 2
    assert len(home.done) == 1


@played()
async def test_figures_are_told_by_replica(engine: RayEngine, fleet: Fleet) -> None:
    tasks = [asyncio.create_task(engine.do(edit(""))) for _ in range(3)]
    await until(lambda: all(engine.gauges()[f"queue_depth@replica-{i}"] == 1 for i in range(3)))
    text = Metrics(engine.gauges, lambda: 0).text().decode()
    assert 'klein_kv_engine_replica_up{replica="replica-2"} 1.0' in text
    assert text.count("# TYPE klein_kv_engine_queue_depth gauge") == 1
    go(fleet)
    await asyncio.gather(*tasks)


@pytest.mark.parametrize("fault", ["digest", "lost"])
def test_a_replica_that_cannot_be_opened_ends_the_start(fault: str) -> None:
    def make(name: str) -> FakeReplica:
        replica = FakeReplica(name)
        if fault == "digest":
            replica.facts = replace(FACTS, model_digest=name)
        elif name == "replica-1":
            replica.dead.set()
        return replica

    async def run() -> None:
        failures: list[BaseException] = []
        engine = RayEngine(make, 2, failures.append)
        await until(lambda: bool(failures))
        assert not engine.ready
        await asyncio.to_thread(engine.close)
        with pytest.raises(BackendError, match="same artifacts" if fault == "digest" else "killed"):
            raise failures[0]

    asyncio.run(run())


def test_sets_are_spread_evenly_and_a_lost_replica_moves_its_own_alone() -> None:
    names, keys = [f"replica-{i}" for i in range(8)], [f"{i:064x}" for i in range(2000)]
    left = [name for name in names if name != "replica-3"]
    home = {key: min(names, key=lambda name: rank(key, name)) for key in keys}
    moved = {key: min(left, key=lambda name: rank(key, name)) for key in keys}
    share = Counter(home.values())
    assert set(share) == set(names)
    assert max(share.values()) < 1.2 * len(keys) / len(names)
    assert all(moved[key] == home[key] for key in keys if home[key] != "replica-3")
    spread = Counter(moved[key] for key in keys if home[key] == "replica-3")
    assert set(spread) == set(left)
    assert max(spread.values()) < 1.5 * share["replica-3"] / len(left)
    # What two fronts, or one before and after a restart, must agree on.
    assert sorted(names[:3], key=lambda name: rank("a", name))[0] == "replica-2"
