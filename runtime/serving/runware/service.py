"""Runware's tasks, done: one answer for each, however it came."""

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from klein_kv.runtime.serving.api.fields import checked
from klein_kv.runtime.serving.errors import ServiceError
from klein_kv.runtime.serving.front import Front, Upload
from klein_kv.runtime.serving.kept import Kept
from klein_kv.runtime.serving.runware.answers import Answer, as_json, done, failed, frame
from klein_kv.runtime.serving.runware.maker import Order, answered
from klein_kv.runtime.serving.runware.store import Caller, ImageStore
from klein_kv.runtime.serving.runware.tasks import MODEL, ImageTask, MediaTask, Task, UploadTask
from klein_kv.runtime.serving.security.fetch import Fetcher

__all__ = ["RunwareService"]

_log = logging.getLogger(__name__)

_MOST_LATER = 64  # tasks that are answered later
_MOST_LATER_OF_ONE = 32  # the same of one owner
_MOST_WEBHOOKS = 256
_WEBHOOK_PAUSES_S = (0.0, 1.0, 5.0)  # before each try
_SOON_S = 1.0
_LAST_S = 3.0  # for what is under way when the service ends


@dataclass(frozen=True, slots=True)
class _Done:
    digest: str  # of the order
    answer: Answer


class RunwareService:
    """Does tasks of any transport. Used on the event loop.

    Args:
        front: the engine, threads and limits.
        send: what may be called with results.
    """

    def __init__(self, front: Front, send: Fetcher) -> None:
        self._front = front
        self._send = send
        settings = front.settings
        share = 1.0 if len(settings.api_keys) < 2 else 0.5
        self.images = ImageStore(Kept(settings.kept_bytes, share=share))
        self._results: Kept[_Done] = Kept(settings.kept_bytes, share=share)
        self._running: dict[str, tuple[Order, asyncio.Task[Answer]]] = {}
        self._webhooks: set[asyncio.Task[None]] = set()

    async def answer(self, task: object, caller: Caller) -> Answer:
        """Does a task, or refuses it; never raises but when it is cancelled."""
        return await answered(task, self._do(task, caller))

    async def close(self) -> None:
        """Gives what runs a moment, and then gives it up."""
        work: set[asyncio.Task[Any]] = {work for _, work in self._running.values()}
        if work := work | self._webhooks:
            await asyncio.wait(work, timeout=_LAST_S)
        work |= self._webhooks  # of what ended by now
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)

    async def _do(self, task: object, caller: Caller) -> Answer:
        if not isinstance(task, dict):
            raise ServiceError("invalid_body", "a task is no JSON object")
        kind = task.get("taskType")
        if kind == "imageInference":
            return await self._inference(task, caller)
        if kind in ("imageUpload", "mediaStorage"):
            return await self._store(task, caller, kind)
        if kind == "getResponse":
            return self._get_response(task, caller)
        if kind == "ping":
            return done({"taskType": "ping", "pong": True})
        raise ServiceError(
            "unsupported_parameter" if isinstance(kind, str) else "missing_required_parameter",
            "taskType is none of imageInference, imageUpload, mediaStorage, getResponse, "
            "authentication, ping",
            "taskType",
        )

    # imageInference -----------------------------------------------------------------------------

    async def _inference(self, sent: Mapping[str, Any], caller: Caller) -> Answer:
        task = checked(ImageTask, sent)
        self._front.check_model(task.model, MODEL)
        task.check(self._front.facts.unit)
        self._front.check_loras(task.loras)
        urls = {"webhookURL": task.webhook_url, "uploadEndpoint": task.upload_endpoint}
        for param, url in urls.items():
            if url is not None:
                self._send.check(url, param)
        later = task.delivery_method == "async"
        digest = await self._front.in_thread(_digest, task) if later else ""
        order = Order(self._front, self.images, self._send, task, caller, digest)
        key = f"{caller.owner} {task.task_uuid}"
        running, result = self._running.get(key), self._results.get(key)
        known = running[0].digest if running else result.digest if result else None
        if known is not None and not (later and known == digest):
            raise ServiceError(
                "conflict", "another task has this taskUUID; make a new one", "taskUUID"
            )
        if not later:
            return await self._finished(order)
        if result is not None:  # sent again, since an answer was lost on the way
            return result.answer
        if running is None:
            self._admit(caller)
            running = order, asyncio.create_task(self._later(order, key))
            self._running[key] = running
        return await _first(*running)

    def _admit(self, caller: Caller) -> None:
        """Refuses more tasks than may be under way, with "queue_full"."""
        orders = [order for order, _ in self._running.values()]
        own = sum(order.caller.owner == caller.owner for order in orders)
        nbytes = sum(order.nbytes for order in orders)
        full = len(orders) >= _MOST_LATER or nbytes >= self._front.settings.max_bodies_bytes
        if full or own >= _MOST_LATER_OF_ONE:
            raise ServiceError(
                "queue_full",
                "too many tasks are under way; ask for their results first",
                retry_after_s=1.0,
            )

    async def _later(self, order: Order, key: str) -> Answer:
        try:
            answer = await self._finished(order)
            answer = Answer(
                tuple(item | {"status": "success"} for item in answer.items),
                None if answer.error is None else answer.error | {"status": "error"},
                answer.status,
            )
            document = await self._front.in_thread(as_json, frame([answer]))
            nbytes, ttl_s = len(document), self._front.settings.kept_s
            if not self._results.fits(nbytes):
                too_large = ServiceError("payload_too_large", "the images are too many to be kept")
                answer, nbytes = failed(order.named, too_large), 0
            kept, owner = _Done(order.digest, answer), order.caller.owner
            self._results.put(key, kept, nbytes, owner=owner, ttl_s=ttl_s)
            return answer
        finally:
            del self._running[key]

    async def _finished(self, order: Order) -> Answer:
        """What became of a task; a webhook hears of it as well."""
        answer = await answered(order.named, order.make())
        url = order.task.webhook_url
        if url is not None and len(self._webhooks) < _MOST_WEBHOOKS:
            webhook = asyncio.create_task(self._notify(url, answer))
            self._webhooks.add(webhook)
            webhook.add_done_callback(self._webhooks.discard)
        return answer

    async def _notify(self, url: str, answer: Answer) -> None:
        body = await self._front.in_thread(as_json, frame([answer]))
        for pause in _WEBHOOK_PAUSES_S:
            await asyncio.sleep(pause)
            with contextlib.suppress(ServiceError):
                await self._send.send("POST", url, body, "application/json", "webhookURL")
                return
        _log.warning("a webhook was not delivered")

    # The rest -----------------------------------------------------------------------------------

    def _get_response(self, sent: Mapping[str, Any], caller: Caller) -> Answer:
        name = checked(Task, sent).task_uuid
        key = f"{caller.owner} {name}"
        if key in self._running:
            status = {"taskUUID": name, "status": "processing"}
            return done({"taskType": "imageInference"} | status)
        result = self._results.get(key)
        if result is None:
            raise ServiceError("not_found", "there is no task of this UUID", "taskUUID")
        return result.answer

    async def _store(self, sent: Mapping[str, Any], caller: Caller, kind: str) -> Answer:
        media = kind == "mediaStorage"
        task = checked(MediaTask, sent) if media else checked(UploadTask, sent)
        item = {"taskType": kind, "taskUUID": task.task_uuid}
        if media:
            item["operation"] = task.operation
        param = "media" if media else "image"
        if task.operation == "delete":
            self.images.drop(task.content, caller, param)
            return done(item | {"mediaUUID": task.content})
        front = self._front
        data = await front.bytes_of(Upload(task.content, param))
        await front.prepared(Upload(data, param))  # is it a reference?
        image, url = self.images.put(data, caller, front.settings.kept_s)
        return done(item | {f"{param}UUID": image, f"{param}URL": url})


def _digest(task: ImageTask) -> str:
    """Tells a task from another one; a seed that was drawn here is no part of it."""
    rest = task.model_dump(exclude_unset=True, exclude={"inputs", "reference_images"})
    state = hashlib.sha256(repr(rest).encode())
    for reference in task.references:
        state.update(hashlib.sha256(reference.encode()).digest())
    return state.hexdigest()


async def _first(order: Order, work: asyncio.Task[Answer]) -> Answer:
    """What is said at first: that a task was taken on, or the result, if it comes soon enough.

    Runware's client asks after a second, and takes a result that comes before that. Until the
    references are pixels nothing is said, since only requests under way are counted by their size.
    """
    await asyncio.wait({work}, timeout=_SOON_S)
    prepared = asyncio.ensure_future(order.prepared.wait())
    try:
        await asyncio.wait({work, prepared}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        prepared.cancel()
    return work.result() if work.done() else done(order.named)
