"""One pipeline behind its queue, in a process of its own: what runs on each GPU."""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future

from klein_kv.runtime.serving.engine_room import EngineRoom
from klein_kv.runtime.serving.errors import ServiceError
from klein_kv.runtime.serving.jobs import EngineFacts, Job, previews_and_result
from klein_kv.runtime.serving.replicas.events import Event, Taken
from klein_kv.runtime.serving.runner import PipelineRunner

__all__ = ["Replica"]

_log = logging.getLogger(__name__)


class Replica:
    """An engine room whose callers are in another process.

    Args:
        open_runner: opens the pipeline; it crosses to the process as the name of a function of an
            installed module, and its arguments.
        queue: jobs that may wait.
    """

    def __init__(self, open_runner: Callable[[], PipelineRunner], queue: int) -> None:
        self._failure: Future[str] = Future()
        self._opened = False
        self._room = EngineRoom(open_runner, queue, self._failed)

    async def open(self) -> EngineFacts | str | None:
        """Waits until it is warm: what it is, or why it cannot be opened."""
        while not self._room.ready:
            if self._failure.done():
                return self._failure.result()
            await asyncio.sleep(0.05)
        self._opened = True
        return self._room.facts

    async def status(self) -> tuple[bool, dict[str, float]]:
        """Whether it is ready, and its figures."""
        return self._room.ready, self._room.gauges()

    async def do(self, job: Job) -> AsyncGenerator[Event, None]:
        """Does a job. Before this returns or is cancelled, the job is done or taken back."""
        yield Taken()
        try:
            async with contextlib.aclosing(previews_and_result(self._room.do, job)) as made:
                async for event in made:
                    yield event
        except ServiceError as error:
            yield error

    async def close(self, timeout_s: float) -> None:
        """Frees the pipeline, after the job under way."""
        await asyncio.to_thread(self._room.close, timeout_s)

    def _failed(self, error: BaseException) -> None:
        """On the room's thread: a replica whose device is lost ends, and the front replaces it."""
        if self._opened:
            _log.critical("this replica cannot go on", exc_info=error)
            os._exit(1)
        self._failure.set_result(f"{type(error).__name__}: {error}")
