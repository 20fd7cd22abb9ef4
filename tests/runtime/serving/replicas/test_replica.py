"""The process' side of a replica, in this process."""

import asyncio
import os
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from PIL.Image import Image

from klein_kv.errors import ArtifactError, RequestError
from klein_kv.runtime.serving.errors import ServiceError
from klein_kv.runtime.serving.jobs import EditJob, EditResult, EngineFacts, Job
from klein_kv.runtime.serving.replicas.events import Event, Taken
from klein_kv.runtime.serving.replicas.replica import Replica
from tests.runtime.serving.test_engine_room import StubRunner

JOB = EditJob(prompt="p", previews=2)


def with_replica(
    test: Callable[[Replica, StubRunner], Coroutine[Any, Any, None]], **runner: Any
) -> None:
    async def run() -> None:
        stub = StubRunner(**runner)
        replica = Replica(lambda: stub, 1)  # type: ignore[arg-type, return-value]
        try:
            async with asyncio.timeout(20):
                assert isinstance(await replica.open(), EngineFacts)
                await test(replica, stub)
        finally:
            stub.go.set()
            await replica.close(5)
        assert stub.closed

    asyncio.run(run())


async def events(replica: Replica, job: Job) -> list[Event]:
    return [event async for event in replica.do(job)]


def test_a_job_is_told_as_events() -> None:
    async def test(replica: Replica, stub: StubRunner) -> None:
        refused = await events(replica, JOB)
        assert isinstance(refused[-1], ServiceError)
        assert (refused[-1].code, refused[-1].status) == ("invalid_value", 400)
        stub.go.set()
        told = await events(replica, JOB)
        assert [type(event) for event in told] == [Taken, Image, Image, EditResult]
        assert (await replica.status())[1]["jobs_total"] == 1

    with_replica(test, errors=[RequestError("no")])


def test_a_job_that_is_taken_back_frees_the_queue() -> None:
    async def test(replica: Replica, stub: StubRunner) -> None:
        first = asyncio.create_task(events(replica, JOB))
        assert await asyncio.to_thread(stub.begun.wait, 10)
        second = asyncio.create_task(events(replica, JOB))
        while (await replica.status())[1]["queue_depth"] != 1:
            await asyncio.sleep(0.01)
        assert isinstance((await events(replica, JOB))[-1], ServiceError)
        for task in (first, second):
            task.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        assert (await replica.status())[1]["queue_depth"] == 0
        stub.go.set()
        assert isinstance((await events(replica, JOB))[-1], EditResult)
        assert stub.steps == 1 + 4

    with_replica(test)


def test_what_cannot_be_opened_is_told() -> None:
    def open_runner() -> Any:
        raise ArtifactError("no folder")

    async def run() -> None:
        replica = Replica(open_runner, 1)
        assert await replica.open() == "ArtifactError: no folder"
        assert not (await replica.status())[0]

    asyncio.run(run())


def test_a_lost_device_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)

    async def test(replica: Replica, stub: StubRunner) -> None:
        told = await events(replica, JOB)
        assert isinstance(told[-1], ServiceError)
        while not codes:
            await asyncio.sleep(0.01)
        assert codes == [1]
        stub.closed = True  # by the end of the process

    with_replica(test, errors=[RuntimeError("a CUDA error")], alive=False)
