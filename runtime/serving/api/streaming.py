"""Server-sent events: previews while the steps run, then the image."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from klein_kv.runtime.serving.api.answers import error_body
from klein_kv.runtime.serving.api.disconnect import unless_gone
from klein_kv.runtime.serving.api.fields import EditFields
from klein_kv.runtime.serving.errors import ServiceError
from klein_kv.runtime.serving.front import Front
from klein_kv.runtime.serving.jobs import EditJob, EditResult, Pixels
from klein_kv.runtime.serving.outputs import base64_text, encode_image

__all__ = ["stream_images"]

_FIRST_S = 2.0
"""Until then a refusal still has a status of its own; after it, it is an event."""

_SILENCE_S = 10.0
"""Of a stream: a comment then tells proxies that it is alive."""

Event = tuple[str, bytes]


async def stream_images(
    request: Request,
    front: Front,
    job: EditJob,
    fields: EditFields,
    kind: str,
    completed: Callable[[EditResult], bytes],
) -> Response:
    """An answer that begins with the first event, or after `_FIRST_S`.

    Args:
        request: whose client may go.
        front: of the service.
        job: what to make.
        fields: how to send it.
        kind: "image_edit" or "image_generation".
        completed: the data of the last event; called in a thread.

    Raises:
        ClientGoneError: the client went before that.
        ServiceError: the job was refused before anything was sent.
    """
    events: asyncio.Queue[Event | ServiceError] = asyncio.Queue()
    task = asyncio.ensure_future(_produce(front, job, fields, kind, completed, events))
    try:
        first = await unless_gone(request, _next_event(events, _FIRST_S))
    except BaseException:
        task.cancel()
        raise
    if isinstance(first, ServiceError):
        raise first
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    body = _body(events, first, task, f"{kind}.completed")
    return StreamingResponse(body, media_type="text/event-stream", headers=headers)


async def _next_event(
    events: "asyncio.Queue[Event | ServiceError]", seconds: float
) -> Event | ServiceError | None:
    """None where nothing happens for so long."""
    try:
        async with asyncio.timeout(seconds):
            return await events.get()
    except TimeoutError:
        return None


async def _produce(
    front: Front,
    job: EditJob,
    fields: EditFields,
    kind: str,
    completed: Callable[[EditResult], bytes],
    events: "asyncio.Queue[Event | ServiceError]",
) -> None:
    """Puts every event into `events`, and a refusal last."""
    partials: list[asyncio.Future[bytes]] = []
    created = int(time.time())

    def on_preview(_step: int, pixels: Pixels) -> None:
        index = len(partials)
        data = front.in_thread(_partial, pixels, fields, f"{kind}.partial_image", index, created)
        partials.append(asyncio.ensure_future(_sent_in_order(data, index)))

    async def _sent_in_order(data: "asyncio.Future[bytes] | object", index: int) -> bytes:
        made: bytes = await data  # type: ignore[misc]
        if index:
            await partials[index - 1]
        events.put_nowait((f"{kind}.partial_image", made))
        return made

    try:
        result = await front.edit(job, on_preview if job.previews else None)
        await asyncio.gather(*partials)
        events.put_nowait((f"{kind}.completed", await front.in_thread(completed, result)))
    except ServiceError as error:
        events.put_nowait(error)
    except Exception:
        events.put_nowait(ServiceError("internal_error", "the request failed"))
        raise


def _partial(pixels: Pixels, fields: EditFields, kind: str, index: int, created: int) -> bytes:
    height, width = pixels.shape[:2]
    value = {
        "type": kind,
        "b64_json": base64_text(encode_image(pixels, fields.output_format)),
        "partial_image_index": index,
        "created_at": created,
        "background": "opaque",
        "output_format": fields.output_format,
        "quality": "auto",
        "size": f"{width}x{height}",
    }
    return json.dumps(value).encode()


async def _body(
    events: "asyncio.Queue[Event | ServiceError]",
    first: Event | None,
    task: "asyncio.Task[None]",
    last: str,
) -> AsyncIterator[bytes]:
    """The events as they are sent; the job ends with the connection."""
    event: Event | ServiceError | None = first
    try:
        while True:
            if isinstance(event, ServiceError):
                yield b"data: " + json.dumps(error_body(event)).encode() + b"\n\n"
                return
            if event is not None:
                yield b"event: %b\ndata: %b\n\n" % (event[0].encode(), event[1])
                if event[0] == last:
                    return
            event = await _next_event(events, _SILENCE_S)
            if event is None:
                yield b": still at work\n\n"
    finally:
        task.cancel()
