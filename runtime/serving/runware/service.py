"""Runware's tasks, done: one answer for each, however it came."""

import asyncio
import contextlib
import hashlib
import logging
import uuid
from collections.abc import Awaitable, Coroutine, Mapping
from dataclasses import dataclass, replace
from typing import Any

from klein_kv.runtime.serving.errors import ServiceError
from klein_kv.runtime.serving.front import Front, Upload
from klein_kv.runtime.serving.jobs import EditJob, Pixels
from klein_kv.runtime.serving.outputs import base64_text, encode_image, image_parameters
from klein_kv.runtime.serving.runware.answers import Answer, as_json, done, failed, frame
from klein_kv.runtime.serving.runware.kept import Kept
from klein_kv.runtime.serving.runware.store import Caller, ImageStore
from klein_kv.runtime.serving.runware.tasks import MODEL, ImageTask, image_task, task_uuid
from klein_kv.runtime.serving.security.fetch import Fetcher
from klein_kv.runtime.serving.security.images_in import prepare_upload

__all__ = ["RunwareService"]

_log = logging.getLogger(__name__)

_MOST_RUNNING = 64  # tasks that are answered later
_MOST_RUNNING_OF_ONE = 32  # the same of one owner
_MOST_WEBHOOKS = 256
_WEBHOOK_PAUSES_S = (0.0, 1.0, 5.0)  # before each try
_SOON_S = 1.0
_AGAIN_S = 0.5  # between looks at a full queue


@dataclass(frozen=True, slots=True)
class _Running:
    digest: str  # of the task as it came
    work: asyncio.Task[Answer]
    owner: str


@dataclass(frozen=True, slots=True)
class _Done:
    digest: str
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
        self._running: dict[str, _Running] = {}
        self._background: set[asyncio.Task[None]] = set()

    async def answer(self, task: object, caller: Caller) -> Answer:
        """Does a task, or refuses it; never raises but when it is cancelled."""
        return await _answered(task, self._do(task, caller))

    async def close(self) -> None:
        """Gives up what runs."""
        running = [running.work for running in self._running.values()]
        work: list[asyncio.Task[Any]] = [*running, *self._background]
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
        facts = self._front.engine.facts
        models = (MODEL, facts.model, *self._front.settings.model_names)
        task = image_task(sent, models, facts.loras, facts.unit)
        for url, param in ((task.webhook, "webhookURL"), (task.upload, "uploadEndpoint")):
            if url is not None:
                self._send.check(url, param)
        key = f"{caller.owner} {task.uuid}"
        digest = ""
        if task.later:
            digest = await self._front.in_thread(_digest, task, "seed" in sent)
        if known := self._running.get(key) or self._results.get(key):
            if known.digest != digest or not task.later:
                raise ServiceError(
                    "conflict", "another task has this taskUUID; make a new one", "taskUUID"
                )
            # Sent again, since the first answer was lost on the way.
            return known.answer if isinstance(known, _Done) else await _first(known.work, task)
        if not task.later:
            return await self._finished(sent, task, caller)
        own = sum(running.owner == caller.owner for running in self._running.values())
        if len(self._running) >= _MOST_RUNNING or own >= _MOST_RUNNING_OF_ONE:
            raise ServiceError(
                "queue_full",
                "too many tasks are under way; ask for their results first",
                retry_after_s=1.0,
            )
        work = asyncio.create_task(self._later(sent, task, caller, key, digest))
        self._running[key] = _Running(digest, work, caller.owner)
        return await _first(work, task)

    async def _later(
        self, sent: Mapping[str, Any], task: ImageTask, caller: Caller, key: str, digest: str
    ) -> Answer:
        try:
            answer = await self._finished(sent, task, caller)
            answer = Answer(
                tuple(item | {"status": "success"} for item in answer.items),
                None if answer.error is None else answer.error | {"status": "error"},
                answer.status,
            )
            document = await self._front.in_thread(as_json, frame([answer]))
            nbytes, ttl_s = len(document), self._front.settings.kept_s
            if not self._results.fits(nbytes):
                too_large = ServiceError("payload_too_large", "the images are too many to be kept")
                answer, nbytes = failed(sent, too_large), 0
            kept = _Done(digest, answer)
            self._results.put(key, kept, owner=caller.owner, nbytes=nbytes, ttl_s=ttl_s)
            return answer
        finally:
            del self._running[key]

    async def _finished(self, sent: Mapping[str, Any], task: ImageTask, caller: Caller) -> Answer:
        """What became of a task; a webhook hears of it as well."""
        answer = await _answered(sent, self._made(task, caller))
        if task.webhook is not None and len(self._background) < _MOST_WEBHOOKS:
            self._in_background(self._notify(task.webhook, answer))
        return answer

    async def _made(self, task: ImageTask, caller: Caller) -> Answer:
        front = self._front
        param = "inputs.referenceImages"
        uploads = [
            Upload(self.images.find(reference, caller, param) or reference, param)
            for reference in task.references
        ]
        end = asyncio.get_running_loop().time() + front.settings.timeout_s
        references, digest = await front.references(uploads)
        items = []
        most = front.settings.max_images
        for first in range(0, task.count, most):
            job = EditJob(
                prompt=task.prompt,
                references=references,
                digest=digest,
                height=task.height,
                width=task.width,
                steps=task.steps,
                seed=task.seed + first,
                num_images=min(most, task.count - first),
                loras=task.loras,
                timeout_s=max(0.0, end - asyncio.get_running_loop().time()),
            )
            images = await self._edit(job, wait=task.later, end=end)
            for i, pixels in enumerate(images):
                items.append(await self._item(task, job, i, pixels, caller))
        return done(*items)

    async def _edit(self, job: EditJob, *, wait: bool, end: float) -> tuple[Pixels, ...]:
        """Makes images; who asks for them later has the time to wait for a place in the queue."""
        while True:
            try:
                return (await self._front.edit(job)).images
            except ServiceError as error:
                left = end - asyncio.get_running_loop().time()
                if error.code != "queue_full" or not wait or left <= _AGAIN_S:
                    raise
            await asyncio.sleep(_AGAIN_S)

    async def _item(
        self, task: ImageTask, job: EditJob, index: int, pixels: Pixels, caller: Caller
    ) -> dict[str, Any]:
        front = self._front
        about = None
        if front.settings.metadata:
            about = image_parameters(job, front.engine.facts, pixels, index)
        data = await front.in_thread(encode_image, pixels, task.kind, task.quality, about)
        item: dict[str, Any] = {"taskType": "imageInference", "taskUUID": task.uuid}
        if task.output == "URL":
            ttl_s = min(task.ttl_s or front.settings.kept_s, front.settings.kept_s)
            item["imageUUID"], item["imageURL"] = self.images.put(data, task.kind, caller, ttl_s)
        else:
            item["imageUUID"] = str(uuid.uuid4())
            text = await front.in_thread(base64_text, data)
            if task.output == "base64Data":
                item["imageBase64Data"] = text
            else:
                item["imageDataURI"] = f"data:image/{task.kind};base64,{text}"
        item["seed"] = job.seed + index
        if task.cost:
            item["cost"] = 0
        if task.upload is not None:
            await self._send.put_bytes(task.upload, data, f"image/{task.kind}", "uploadEndpoint")
        return item

    # The rest -----------------------------------------------------------------------------------

    def _get_response(self, sent: Mapping[str, Any], caller: Caller) -> Answer:
        name = task_uuid(sent)
        key = f"{caller.owner} {name}"
        if key in self._running:
            status = {"taskUUID": name, "status": "processing"}
            return done({"taskType": "imageInference"} | status)
        result = self._results.get(key)
        if result is None:
            raise ServiceError("not_found", "there is no task of this UUID", "taskUUID")
        return result.answer

    async def _store(self, sent: Mapping[str, Any], caller: Caller, kind: str) -> Answer:
        name = task_uuid(sent)
        media = kind == "mediaStorage"
        param = "media" if media else "image"
        operation = sent.get("operation", "upload") if media else "upload"
        unknown = sent.keys() - {"taskType", "taskUUID", param, "operation", "deliveryMethod"}
        if unknown:
            raise ServiceError("unknown_parameter", "there is no such parameter", min(unknown)[:40])
        content = sent.get(param)
        if not isinstance(content, str) or not content:
            raise ServiceError(
                "missing_required_parameter", f"{param} is no data URI, base64 or URL", param
            )
        item: dict[str, Any] = {"taskType": kind, "taskUUID": name}
        if media:
            item["operation"] = operation
        if operation == "delete":
            self.images.drop(content, caller, param)
            return done(item | {"mediaUUID": content})
        if operation != "upload":
            raise ServiceError(
                "invalid_value", "operation is neither upload nor delete", "operation"
            )
        front, settings = self._front, self._front.settings
        data = await front.bytes_of(Upload(content, param))
        await front.in_thread(  # is it a reference?
            prepare_upload,
            data,
            settings.max_pixels,
            front.engine.facts.unit,
            settings.matte,
            param,
        )
        image, url = self.images.put(data, None, caller, settings.kept_s)
        return done(item | {f"{param}UUID": image, f"{param}URL": url})

    async def _notify(self, url: str, answer: Answer) -> None:
        body = await self._front.in_thread(as_json, frame([answer]))
        for pause in _WEBHOOK_PAUSES_S:
            await asyncio.sleep(pause)
            with contextlib.suppress(ServiceError):
                await self._send.post_json(url, body, "webhookURL")
                return
        _log.warning("a webhook was not delivered")

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


async def _answered(task: object, work: Awaitable[Answer]) -> Answer:
    """What came of it; an error is told in words of ours."""
    try:
        return await work
    except ServiceError as error:
        return failed(task, error)
    except Exception:  # noqa: BLE001 - logged
        _log.exception("a task failed")
        return failed(task, ServiceError("internal_error", "the task failed"))


def _digest(task: ImageTask, seeded: bool) -> str:
    """Tells a task from another one; a seed that was drawn here is no part of it."""
    rest = replace(task, references=(), seed=task.seed if seeded else 0)
    state = hashlib.sha256(f"{rest} {seeded}".encode())
    for reference in task.references:
        state.update(hashlib.sha256(reference.encode("utf-8", "surrogatepass")).digest())
    return state.hexdigest()


async def _first(work: asyncio.Task[Answer], task: ImageTask) -> Answer:
    """What is said at first: that a task was taken on, or the result, if it comes soon enough.

    Runware's client asks after a second, and takes a result that comes before that.
    """
    finished, _ = await asyncio.wait({work}, timeout=_SOON_S)
    if finished:
        return work.result()
    return done({"taskType": "imageInference", "taskUUID": task.uuid})
