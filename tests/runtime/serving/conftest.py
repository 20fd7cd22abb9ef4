"""Services that tests share: pocket behind an engine room, and an engine that tests can steer."""

import asyncio
import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image

from klein_kv import KleinKVPipeline
from klein_kv.runtime.serving.app import make_app
from klein_kv.runtime.serving.engine_room import EngineRoom
from klein_kv.runtime.serving.jobs import (
    EditJob,
    EditResult,
    EncodeResult,
    Engine,
    EngineFacts,
    Job,
    OnPreview,
    Result,
)
from klein_kv.runtime.serving.runner import PipelineRunner, WarmUp
from klein_kv.runtime.serving.security.fetch import Fetcher
from klein_kv.runtime.serving.security.slow_clients import PunctualProtocol
from klein_kv.runtime.serving.server import uvicorn_config
from klein_kv.runtime.serving.settings import ServeSettings


class Protocol(PunctualProtocol):
    headers_s = 1.0


KEY = "a key of the tests, long enough"
SIDE = 128


@dataclass
class Served:
    """A service that listens.

    Attributes:
        url: without a slash at the end.
        key: that opens it.
    """

    url: str
    engine: Any
    app: Any
    key: str = KEY


def serve_in_thread(
    engine: Engine, settings: ServeSettings, calls: Fetcher | None = None
) -> Iterator[Served]:
    """Serves on a free port until the generator is closed; `calls` goes to other hosts."""
    app = make_app(engine, settings, calls)
    config = uvicorn_config(app, settings)
    config.port, config.http = 0, Protocol
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Served(f"http://127.0.0.1:{port}", engine, app)
    finally:
        server.should_exit = True
        thread.join(10)
        app.state.front.threads.shutdown()


@dataclass
class SteeredEngine:
    """Answers at once with grey images, or does what `act` says before it does."""

    act: Callable[[], Any] | None = None
    ready: bool = True
    jobs: list[Job] = field(default_factory=list)
    cancelled: int = 0
    facts: EngineFacts = field(
        default_factory=lambda: EngineFacts(
            "org/steered", "sha256:" + "0" * 64, "kv", 16, "none", loras=("style",)
        )
    )

    async def do(self, job: Job, on_preview: OnPreview | None = None) -> Result:
        self.jobs.append(job)
        try:
            if self.act is not None:
                await self.act()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if not isinstance(job, EditJob):
            return EncodeResult(known=False, nbytes=1, tokens=1)
        height, width = job.references[0].shape[:2] if job.references else (1024, 1024)
        grey = Image.new("RGB", (job.width or width, job.height or height), (128, 128, 128))
        for _ in range(job.previews):
            assert on_preview is not None
            on_preview(grey)
        return EditResult((grey,) * job.num_images, bool(job.references))

    def gauges(self) -> dict[str, float]:
        return {"queue_depth": 3.0, "jobs_total": 7.0}

    async def drain(self, timeout_s: float) -> None:
        pass


@pytest.fixture(scope="session")
def pocket_service(pocket_artifacts: Path, pocket_checkpoint: Path) -> Iterator[Served]:
    """Pocket in float32 on one thread, its adapter as "cyanotype", and a key."""

    def open_pipeline() -> KleinKVPipeline:
        return KleinKVPipeline.from_pretrained(
            pocket_artifacts, backend="onnxruntime", device="cpu", threads=1
        )

    lora = pocket_checkpoint / "lora" / "cyanotype.safetensors"
    room = EngineRoom(
        lambda: PipelineRunner(open_pipeline, (WarmUp(SIDE, SIDE, 1),), {"cyanotype": lora}),
        queue=16,
        on_failed=print,
    )
    while not room.ready:
        time.sleep(0.01)
    yield from serve_in_thread(room, ServeSettings(api_keys=(KEY,)))
    room.close()


@pytest.fixture(scope="session")
def steered_service() -> Iterator[Served]:
    """A `SteeredEngine` that needs no key, with small limits; `steered` resets it."""
    settings = ServeSettings(
        max_body_bytes=300_000,
        body_timeout_s=1.0,
        max_pixels=512 * 512,
        max_connections=8,
        shelf_bytes=1_000_000,
        model_names=("gpt-image-1",),
    )
    yield from serve_in_thread(SteeredEngine(), settings)


@pytest.fixture
def steered(steered_service: Served) -> Iterator[Served]:
    """The service, whose engine behaves as `SteeredEngine` does without further words."""
    yield steered_service
    fresh = SteeredEngine()
    vars(steered_service.engine).update(vars(fresh))


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Of tests that are coroutines."""
    return "asyncio"


@pytest.fixture(scope="session")
def http() -> Iterator[httpx.Client]:
    """Without an address of its own."""
    with httpx.Client(trust_env=False, timeout=60) as client:
        yield client


def until(condition: Callable[[], object], seconds: float = 15) -> None:
    """Waits until something has come to pass."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int = SIDE, height: int = SIDE, seed: int = 0) -> bytes:
    """A picture's file; each seed has another one."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return file_of(Image.fromarray(coarse).resize((width, height)))


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def decoded(text: str | None) -> Image.Image:
    """The image in an answer."""
    assert text is not None
    return Image.open(io.BytesIO(base64.b64decode(text)))


def pixels(text: str | None) -> Any:
    return np.asarray(decoded(text))
