"""The queue, the clock and the thread of an engine room, over a runner that tests steer."""

import asyncio
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from PIL import Image

from klein_kv.errors import ArtifactError, CapacityError, NotFiniteError, RequestError
from klein_kv.runtime.serving.engine_room import EngineRoom
from klein_kv.runtime.serving.errors import ServiceError
from klein_kv.runtime.serving.job_queue import MOST_OVERTAKEN, JobQueue, Ticket
from klein_kv.runtime.serving.jobs import EditJob, EditResult, EncodeResult, EngineFacts, Job
from klein_kv.runtime.serving.runner import DeviceLostError, StoppedError, preview_steps

pytestmark = pytest.mark.anyio

STEPS = 4


@dataclass
class StubRunner:
    """Four steps, each of which waits for `go`; notes what it does."""

    go: threading.Event = field(default_factory=threading.Event)
    begun: threading.Event = field(default_factory=threading.Event)
    errors: list[Exception] = field(default_factory=list)  # raised first, one per job
    order: list[str] = field(default_factory=list)
    steps: int = 0
    freed: int = 0
    alive: bool = True
    worn_out: bool = False
    closed: bool = False
    facts: EngineFacts = field(
        default_factory=lambda: EngineFacts("stub", "0" * 64, "kv", 16, "none", ("a", "b"))
    )

    def edit(
        self, job: EditJob, wanted: Callable[[], bool], on_denoised: Callable[[Any], None]
    ) -> EditResult:
        self.order.append(job.prompt)
        self.begun.set()
        buffers = np.zeros(1)  # what the traceback of an error holds
        self.buffers = weakref.ref(buffers)
        if self.errors:
            raise self.errors.pop(0)
        for step in range(STEPS):
            assert self.go.wait(10)
            self.steps += 1
            if not wanted():
                raise StoppedError
            if step in preview_steps(STEPS, job.previews):
                on_denoised(step)
        images = (Image.new("RGB", (32, 16)),) * job.num_images
        return EditResult(images, True, stages_s={"total": 0.1})

    def encode(self, job: Job) -> EncodeResult:
        self.order.append(job.digest)
        return EncodeResult(known=False, nbytes=8, tokens=2)

    def preview(self, denoised: Any) -> Image.Image:
        return Image.new("L", (1, 1), denoised).convert("RGB")

    def free(self) -> None:
        assert self.buffers() is None
        self.freed += 1

    def works(self, *, thoroughly: bool = False) -> bool:
        return self.alive and not (thoroughly and self.worn_out)

    def gauges(self) -> dict[str, float]:
        return {"reference_store_bytes": 5.0}

    def close(self) -> None:
        self.closed = True


@asynccontextmanager
async def in_room(
    queue: int = 16, on_failed: Any = print, **runner: Any
) -> AsyncIterator[tuple[EngineRoom, StubRunner]]:
    """A room that is ready, and its runner."""
    stub = StubRunner(**runner)
    room = EngineRoom(lambda: stub, queue, on_failed)  # type: ignore[arg-type, return-value]
    async with asyncio.timeout(20):
        while not room.ready:
            await asyncio.sleep(0.005)
        yield room, stub
    stub.go.set()
    room.close()


async def begun(stub: StubRunner) -> None:
    await asyncio.to_thread(stub.begun.wait, 10)


def job(prompt: str = "a", digest: str = "", **more: Any) -> EditJob:
    return EditJob(prompt=prompt, digest=digest, height=16, width=32, **more)


async def start(room: EngineRoom, *jobs: EditJob) -> list[asyncio.Task[Any]]:
    tasks = [asyncio.create_task(room.do(each)) for each in jobs]
    await asyncio.sleep(0)
    return tasks


async def refusal(room: EngineRoom, **fields: Any) -> ServiceError:
    with pytest.raises(ServiceError) as refused:
        await room.do(job(**fields))
    return refused.value


async def test_a_job_gives_its_images_and_previews_before_them() -> None:
    shown: list[Any] = []
    async with in_room() as (room, stub):
        stub.go.set()
        result = await room.do(
            job(num_images=2, previews=2), lambda image: shown.append(image.getpixel((0, 0))[0])
        )
        assert [image.size for image in result.images] == [(32, 16)] * 2
        assert (result.references_known, result.stages_s) == (True, {"total": 0.1})
        assert result.queued_s > 0
        assert shown == [0, 2]
        encoded = await room.do(Job((np.zeros((16, 16, 3), np.uint8),), "d"))
        assert encoded == EncodeResult(known=False, nbytes=8, tokens=2)
        gauges = room.gauges()
        assert (gauges["jobs_total"], gauges["queue_depth"], gauges["in_flight"]) == (2, 0, 0)
        assert gauges["reference_store_bytes"] == 5
        assert room.facts is stub.facts
    assert stub.closed


@pytest.mark.parametrize(
    ("steps", "count", "expected"),
    [(4, 3, {0, 1, 2}), (4, 2, {0, 2}), (4, 1, {1}), (4, 0, set()), (2, 3, {0}), (1, 3, set())],
)
def test_previews_are_spread_over_the_steps(steps: int, count: int, expected: set[int]) -> None:
    assert preview_steps(steps, count) == expected


async def test_same_references_come_together_within_bounds() -> None:
    style = (("a", 1.0),)
    async with in_room() as (room, stub):
        tasks = await start(room, job("first", "x"))
        await begun(stub)
        tasks += await start(
            room,
            job("styled", "x", loras=style),
            job("other", "y"),
            job("same", "x"),
            job("styled too", "z", loras=style),
        )
        stub.go.set()
        await asyncio.gather(*tasks)
    assert stub.order == ["first", "same", "other", "styled", "styled too"]


def test_nobody_is_overtaken_for_ever() -> None:
    result: Any = None
    queue = JobQueue()
    waiting = Ticket(job("waits", "y"), result)
    queue.append(Ticket(job("x", "x"), result))
    queue.take()
    queue.append(waiting)
    taken = 0
    while True:
        queue.append(Ticket(job("x", "x"), result))
        if queue.take() is waiting:
            break
        taken += 1
    assert taken == MOST_OVERTAKEN


async def test_a_full_queue_refuses_with_the_time_to_come_again() -> None:
    async with in_room(queue=2) as (room, stub):
        tasks = await start(room, job())
        await begun(stub)
        await asyncio.sleep(0.1)
        stub.go.set()
        await tasks[0]  # its time is known now
        stub.go.clear()
        stub.begun.clear()
        tasks = await start(room, job())
        await begun(stub)
        tasks += await start(room, job(), job())
        refused = await refusal(room)
        assert (refused.code, refused.status) == ("queue_full", 429)
        assert refused.retry_after_s is not None
        assert 0.3 <= refused.retry_after_s < 2  # three jobs, a tenth of a second each
        stub.go.set()
        await asyncio.gather(*tasks)


@pytest.mark.parametrize("why", ["expired", "cancelled"])
async def test_jobs_nobody_waits_for_leave_the_queue_or_stop_between_steps(why: str) -> None:
    timeouts = (0.2, 0.1) if why == "expired" else (None, None)
    async with in_room() as (room, stub):
        tasks = await start(room, job("runs", timeout_s=timeouts[0]))
        await begun(stub)
        tasks += await start(room, job("waits", timeout_s=timeouts[1]))
        if why == "cancelled":
            for task in tasks:
                task.cancel()
        results: list[Any] = await asyncio.gather(*tasks, return_exceptions=True)
        if why == "expired":
            assert [error.code for error in results] == ["deadline", "deadline"]
        assert room.gauges()["queue_depth"] == 0
        stub.go.set()
        assert (await room.do(job("next"))).images
        assert room.gauges()[f"{why}_total"] == 2
    assert stub.order == ["runs", "next"]
    assert stub.steps == 1 + STEPS  # the first of "runs", then it stopped


async def test_out_of_memory_frees_references_and_tries_once_more() -> None:
    async with in_room(errors=[CapacityError("no memory")]) as (room, stub):
        stub.go.set()
        assert (await room.do(job())).images
        assert stub.freed == 1
        stub.errors = [MemoryError(), RuntimeError("CUDA out of memory. Tried at 0x7f00")]
        refused = await refusal(room)
        assert (refused.code, refused.status) == ("out_of_memory", 503)
        assert "0x" not in refused.message
        assert (await room.do(job())).images  # the device still answers


async def test_errors_are_told_in_words_of_the_service() -> None:
    errors = [RequestError("/secret"), NotFiniteError("/secret"), ArtifactError("/secret")]
    async with in_room(errors=errors) as (room, stub):
        stub.go.set()
        for code in ("invalid_value", "internal_error", "unsupported_parameter"):
            refused = await refusal(room)
            assert refused.code == code
            assert "/secret" not in refused.message
        assert (await room.do(job())).images


@pytest.mark.parametrize(
    ("device", "survived"), [({"alive": False}, 0), ({"worn_out": True}, 2), ({}, 4)]
)
async def test_a_device_that_does_not_work_any_more_ends_the_room(
    device: dict[str, bool], survived: int
) -> None:
    """It is asked after each error that nobody foresaw, and for a whole edit after three."""
    failures: list[BaseException] = []
    errors: list[Exception] = [RuntimeError(str(i)) for i in range(4)]
    async with in_room(on_failed=failures.append, errors=errors, **device) as (room, stub):
        stub.go.set()
        for _ in range(min(survived + 1, 4)):
            assert room.ready
            assert (await refusal(room)).message == "the request failed"
        while room.ready and survived < 4:
            await asyncio.sleep(0.005)
        if device:
            assert (await refusal(room)).code == "not_ready"
        else:
            assert (await room.do(job())).images
    assert [str(error.__cause__) for error in failures] == ([str(survived)] if device else [])
    assert all(isinstance(error, DeviceLostError) for error in failures)
    assert stub.closed == (not device)  # a device that is gone may never come back from that


async def test_a_room_that_cannot_open_says_so() -> None:
    failures: list[BaseException] = []

    def fail() -> Any:
        raise RequestError("no such folder")

    room = EngineRoom(fail, 1, failures.append)
    while not failures:
        await asyncio.sleep(0.005)
    assert not room.ready
    assert str(failures[0]) == "no such folder"
    assert room.facts is None
    assert (await refusal(room)).code == "not_ready"


@pytest.mark.parametrize("patient", [True, False])
async def test_draining_finishes_what_was_taken_on(patient: bool) -> None:
    async with in_room() as (room, stub):
        tasks = await start(room, job("runs"), job("waits"))
        await begun(stub)
        drain = asyncio.create_task(room.drain(10 if patient else 0.05))
        await asyncio.sleep(0.02)
        assert not room.ready
        refused = await refusal(room, prompt="late")
        assert (refused.code, refused.status) == ("draining", 503)
        if patient:
            stub.go.set()
        await drain
        results: list[Any] = await asyncio.gather(*tasks, return_exceptions=True)
        if patient:
            assert all(result.images for result in results)
        else:
            assert [error.code for error in results] == ["draining"] * 2
    assert stub.order == (["runs", "waits"] if patient else ["runs"])


def test_an_answer_after_its_loop_has_ended_is_nobodys() -> None:
    stub = StubRunner()
    room = EngineRoom(lambda: stub, 1, print)  # type: ignore[arg-type, return-value]

    async def leave() -> None:
        while not room.ready:
            await asyncio.sleep(0.005)
        await start(room, job())
        await begun(stub)

    asyncio.run(leave())
    room.close(timeout_s=0)  # the job is under way still
    stub.go.set()
    room.close()
    assert stub.closed
