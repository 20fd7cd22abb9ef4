"""What a service asks its engine to do: plain data, which may cross to another process.

An engine is one pipeline behind a queue in this process (`EngineRoom`), or replicas on many GPUs
(`RayEngine`). What stands in front (HTTP, decoding, limits) is the same for both.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = [
    "EditJob",
    "EditResult",
    "EncodeResult",
    "Engine",
    "EngineFacts",
    "Job",
    "OnPreview",
    "Pixels",
    "Result",
    "previews_and_result",
]

Pixels = NDArray[np.uint8]
"""A prepared image [H, W, 3]."""

OnPreview = Callable[[Image.Image], None]
"""Called on the event loop after a step, with what the image is by now."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """Reference images whose keys and values are wanted.

    Attributes:
        references: prepared images in order (`pixels.prepare_reference`, without the batch).
        digest: their `images_digest`: the set's id, and what jobs are routed by; "" of none.
        loras: registered names and weights, -4 to 4.
        timeout_s: seconds until the result is of no use to anybody.
    """

    references: tuple[Pixels, ...] = ()
    digest: str = ""
    loras: tuple[tuple[str, float], ...] = ()
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class EditJob(Job):
    """One prompt, with or without references.

    Attributes:
        height, width: pixels; None for the first reference's.
        seed: of the first image; image i uses `seed + i`.
        mask: uint8 [H, W] of the first reference's size, 255 where it is to change; None edits all.
        strength: of an edit within a mask, above 0 up to 1.
        previews: most intermediate images that `OnPreview` wants, 0 to 3.
    """

    prompt: str
    height: int | None = None
    width: int | None = None
    steps: int = 4
    seed: int = 0
    num_images: int = 1
    mask: NDArray[np.uint8] | None = None
    strength: float = 1.0
    previews: int = 0


@dataclass(frozen=True, slots=True)
class EncodeResult:
    """Keys and values of so many reference tokens are at hand; `known`: they were before."""

    known: bool
    nbytes: int
    tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class EditResult:
    """Images of a job.

    Attributes:
        references_known: no step had to compute keys and values.
        queued_s: seconds in the queue.
        stages_s: seconds by stage (`Timings.to_dict`).
    """

    images: tuple[Image.Image, ...]
    references_known: bool
    queued_s: float = 0.0
    stages_s: dict[str, float] = field(default_factory=dict)


Result = EditResult | EncodeResult
"""Of an `EditJob`, and of any other `Job`."""


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What stands behind the service; known once it is ready.

    Attributes:
        model: id of the model, for `GET /v1/models` and metadata.
        model_digest: of graphs and weights.
        variant: "kv", or "plain" (no reference resources).
        unit: sides of images are multiples of it, in pixels.
        loras: registered names.
    """

    model: str
    model_digest: str
    variant: str
    unit: int
    backend: str
    loras: tuple[str, ...] = ()


class Engine(Protocol):
    """Does jobs, one at a time per GPU. All methods are called on the event loop.

    `do` raises `ServiceError`: "queue_full" (429) before anything is taken on, "deadline" (504),
    "draining" or "not_ready" (503), "out_of_memory" (503), "invalid_value" (400) for what the
    pipeline refuses. Cancelling its coroutine takes the job back: out of the queue, or between two
    steps.
    """

    @property
    def ready(self) -> bool:
        """Warmed up, and not draining."""

    @property
    def facts(self) -> EngineFacts | None:
        """What was opened; None before that."""

    async def do(self, job: Job, on_preview: OnPreview | None = None) -> Result:
        """Makes images, or keys and values for edits to come."""

    def gauges(self) -> dict[str, float]:
        """Figures for /metrics: queue depth, jobs under way, the store's bytes, hits and so on.

        A name may end in "@REPLICA".
        """

    async def drain(self, timeout_s: float) -> None:
        """Takes on nothing more, and returns when all is done or the time is over."""

    def close(self) -> None:
        """Frees everything. Called in a thread, while the event loop runs."""


J = TypeVar("J", bound=Job)
R = TypeVar("R", bound=Result)


async def previews_and_result(
    do: Callable[[J, OnPreview | None], Awaitable[R]], job: J
) -> AsyncGenerator[Image.Image | R, None]:
    """Previews of a job as they come, and its result last; closing it takes the job back."""
    previews: asyncio.Queue[Image.Image | None] = asyncio.Queue()
    wanted = isinstance(job, EditJob) and job.previews > 0
    work = asyncio.ensure_future(do(job, previews.put_nowait if wanted else None))
    work.add_done_callback(lambda _: previews.put_nowait(None))
    try:
        while (preview := await previews.get()) is not None:
            yield preview
        yield work.result()
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
