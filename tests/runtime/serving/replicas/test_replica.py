"""The process' side of a replica, in this process."""

import asyncio
import copy
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from PIL.Image import Image

from klein_kv.errors import ArtifactError, RequestError
from klein_kv.runtime.serving.errors import ServiceError
from klein_kv.runtime.serving.jobs import EditJob, EditResult, EncodeResult, EngineFacts, Job
from klein_kv.runtime.serving.replicas.events import Taken
from klein_kv.runtime.serving.replicas.replica import Replica
from tests.runtime.serving.test_engine_room import StubRunner, begun

pytestmark = pytest.mark.anyio

JOB = EditJob(prompt="p", previews=2)


@asynccontextmanager
async def opened(**runner: Any) -> AsyncIterator[tuple[Replica, StubRunner]]:
    stub = StubRunner(**runner)
    replica = Replica(lambda: stub, 1)  # type: ignore[arg-type, return-value]
    try:
        async with asyncio.timeout(20):
            assert isinstance(await replica.open(), EngineFacts)
            yield replica, stub
    finally:
        stub.go.set()
        await replica.close(5)
    assert stub.closed


async def events(replica: Replica, job: Job = JOB) -> list[Any]:
    return [event async for event in replica.do(job)]


async def test_a_job_is_told_as_events() -> None:
    async with opened(errors=[RequestError("no")]) as (replica, stub):
        taken, refused = await events(replica)
        assert isinstance(taken, Taken)
        refused = copy.copy(refused)  # as it does when it crosses to another process
        assert (refused.code, refused.status) == ("invalid_value", 400)
        stub.go.set()
        told = await events(replica)
        assert [type(event) for event in told] == [Taken, Image, Image, EditResult]
        told = await events(replica, Job((), "d"))
        assert [type(event) for event in told] == [Taken, EncodeResult]
        assert (await replica.status())[1]["jobs_total"] == 2


async def test_a_job_that_is_taken_back_frees_the_queue() -> None:
    async with opened() as (replica, stub):
        first = asyncio.create_task(events(replica))
        await begun(stub)
        second = asyncio.create_task(events(replica))
        while (await replica.status())[1]["queue_depth"] != 1:
            await asyncio.sleep(0.01)
        assert (await events(replica))[-1].code == "queue_full"
        for task in (first, second):
            task.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        assert (await replica.status())[1]["queue_depth"] == 0
        stub.go.set()
        assert isinstance((await events(replica))[-1], EditResult)
        assert stub.steps == 1 + 4


async def test_what_cannot_be_opened_is_told() -> None:
    def open_runner() -> Any:
        raise ArtifactError("no folder")

    replica = Replica(open_runner, 1)
    assert await replica.open() == "ArtifactError: no folder"
    assert not (await replica.status())[0]


async def test_a_lost_device_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    async with opened(errors=[RuntimeError("a CUDA error")], alive=False) as (replica, stub):
        assert isinstance((await events(replica))[-1], ServiceError)
        while not codes:
            await asyncio.sleep(0.01)
        assert codes == [1]
        stub.closed = True  # by the end of the process
