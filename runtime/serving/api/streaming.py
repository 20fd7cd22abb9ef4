"""Server-sent events: previews while the steps run, then the image."""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from PIL import Image

from klein_kv.runtime.serving.api.answers import error_body
from klein_kv.runtime.serving.api.disconnect import unless_gone
from klein_kv.runtime.serving.errors import ServiceError
from klein_kv.runtime.serving.front import Front
from klein_kv.runtime.serving.jobs import EditJob, EditResult, previews_and_result
from klein_kv.runtime.serving.outputs import OutputFormat, base64_text, encode_image

__all__ = ["stream_images"]

_log = logging.getLogger(__name__)

_FIRST_S = 2.0
"""Until then a refusal still has a status of its own; after it, it is an event."""

_SILENCE_S = 10.0
"""Of a stream: a comment then tells proxies that it is alive."""


async def stream_images(
    request: Request,
    front: Front,
    job: EditJob,
    output_format: OutputFormat,
    kind: str,
    completed: Callable[[EditResult], bytes],
) -> Response:
    """An answer that begins with the first event, or after `_FIRST_S`.

    Args:
        request: whose client may go.
        front: of the service.
        job: what to make.
        output_format: of previews.
        kind: "image_edit" or "image_generation".
        completed: makes the data of the last event; called in a thread.

    Raises:
        ClientGoneError: the client went before that.
        ServiceError: the job was refused before that.
    """
    events = _events(front, job, output_format, kind, completed)
    first = asyncio.ensure_future(anext(events))
    try:
        await unless_gone(request, asyncio.wait({first}, timeout=_FIRST_S))
        if first.done():
            first.result()
    except BaseException:
        first.cancel()
        raise
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(_body(events, first), media_type="text/event-stream", headers=headers)


async def _events(
    front: Front,
    job: EditJob,
    output_format: OutputFormat,
    kind: str,
    completed: Callable[[EditResult], bytes],
) -> AsyncGenerator[bytes, None]:
    """Every event as it is sent."""
    created, index = int(time.time()), 0
    async with contextlib.aclosing(previews_and_result(front.edit, job)) as made:
        async for event in made:
            if isinstance(event, EditResult):
                name = f"{kind}.completed"
                data = await front.in_thread(completed, event)
            else:
                name = f"{kind}.partial_image"
                data = await front.in_thread(_partial, event, output_format, name, index, created)
                index += 1
            yield b"event: %b\ndata: %b\n\n" % (name.encode(), data)


def _partial(
    image: Image.Image, output_format: OutputFormat, name: str, index: int, created: int
) -> bytes:
    value = {
        "type": name,
        "b64_json": base64_text(encode_image(image, output_format)),
        "partial_image_index": index,
        "created_at": created,
        "background": "opaque",
        "output_format": output_format,
        "quality": "auto",
        "size": f"{image.width}x{image.height}",
    }
    return json.dumps(value).encode()


async def _body(
    events: AsyncGenerator[bytes, None], event: "asyncio.Future[bytes]"
) -> AsyncIterator[bytes]:
    """The events from this one on, and a refusal last; the job ends with the connection."""
    try:
        while True:
            await asyncio.wait({event}, timeout=_SILENCE_S)
            if event.done():
                yield event.result()
                event = asyncio.ensure_future(anext(events))
            else:
                yield b": still at work\n\n"
    except StopAsyncIteration:
        return
    except Exception as error:  # noqa: BLE001 - logged, and told in words of ours
        if not isinstance(error, ServiceError):
            _log.exception("a stream failed")
            error = ServiceError("internal_error", "the request failed")
        yield b"data: " + json.dumps(error_body(error)).encode() + b"\n\n"
    finally:
        event.cancel()
