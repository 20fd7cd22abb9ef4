"""The service in a thread of the tests, on loopback, over an engine of theirs."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import uvicorn

from klein_kv.runtime.serving.app import make_app
from klein_kv.runtime.serving.errors import ServiceError
from klein_kv.runtime.serving.jobs import EditJob, EditResult, Engine, EngineFacts, OnPreview
from klein_kv.runtime.serving.security.fetch import Fetcher
from klein_kv.runtime.serving.settings import ServeSettings


class FakeEngine:
    """Makes flat images: red is the seed, green of the first reference, blue the steps."""

    def __init__(self) -> None:
        self.ready = True
        self.facts = EngineFacts("test/klein", "sha256:0", "kv", 16, "fake", ("style",))
        self.jobs: list[EditJob] = []
        self.errors: list[Exception] = []
        self.cancelled = 0
        self.gate: asyncio.Event | None = None  # jobs wait for it

    async def edit(self, job: EditJob, on_preview: OnPreview | None = None) -> EditResult:
        self.jobs.append(job)
        if self.errors:
            raise self.errors.pop(0)
        if self.gate is not None:
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        first = job.references[0] if job.references else np.zeros((1024, 1024, 3), np.uint8)
        size = (job.height or first.shape[0], job.width or first.shape[1])
        images = []
        for i in range(job.num_images):
            image = np.zeros((*size, 3), np.uint8)
            image[:] = (job.seed + i) % 256, first[0, 0, 1], job.steps
            images.append(image)
        return EditResult(tuple(images), job.seed, False, 0.0)

    def gauges(self) -> dict[str, float]:
        return {}


def busy() -> ServiceError:
    return ServiceError("queue_full", "the queue is full", retry_after_s=0.01)


class Server:
    """A running service.

    Attributes:
        url: of it, and those of Runware's tasks and WebSocket.
        loop: its event loop, in another thread.
        http: a client.
    """

    def __init__(self, port: int, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.url = f"http://127.0.0.1:{port}"
        self.runware = f"{self.url}/runware/v1"
        self.http = httpx.Client(trust_env=False, timeout=10)
        self.socket = f"ws://127.0.0.1:{port}/runware/v1"


@contextlib.contextmanager
def serving(engine: Engine, fetch: Fetcher | None = None, **settings: Any) -> Iterator[Server]:
    """Serves until the end of the block."""
    out = fetch or Fetcher()
    app = make_app(engine, ServeSettings(port=0, **settings), out.get, out)
    config = uvicorn.Config(
        app, log_level="warning", ws="websockets-sansio", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    listening = socket.create_server(("127.0.0.1", 0))
    started: list[asyncio.AbstractEventLoop] = []

    async def main() -> None:
        started.append(asyncio.get_running_loop())
        await server.serve([listening])

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    try:
        while not server.started:
            thread.join(0.01)
        found = Server(listening.getsockname()[1], started[0])
        with found.http:
            yield found
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()
