"""What one `imageInference` becomes: references, jobs, files, and word to who wants it."""

import asyncio
import logging
import uuid
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from klein_kv.runtime.serving.errors import ServiceError
from klein_kv.runtime.serving.front import Front, Upload
from klein_kv.runtime.serving.jobs import EditJob, Pixels
from klein_kv.runtime.serving.outputs import base64_text
from klein_kv.runtime.serving.runware.answers import Answer, done, failed
from klein_kv.runtime.serving.runware.store import Caller, ImageStore
from klein_kv.runtime.serving.runware.tasks import ImageTask
from klein_kv.runtime.serving.security.fetch import Fetcher

__all__ = ["Order", "answered"]

_log = logging.getLogger(__name__)

_AGAIN_S = 0.5  # between looks at a full queue
_REFERENCES = "inputs.referenceImages"


@dataclass(slots=True, eq=False)
class Order:
    """A task under way.

    Attributes:
        images: where files behind URLs go, and where references are found.
        send: what may be called with results.
        digest: tells it from another task of the same UUID.
        prepared: set when the references are pixels.
        nbytes: of these.
    """

    front: Front
    images: ImageStore
    send: Fetcher
    task: ImageTask
    caller: Caller
    digest: str = ""
    prepared: asyncio.Event = field(default_factory=asyncio.Event)
    nbytes: int = 0

    @property
    def named(self) -> dict[str, Any]:
        """What an answer begins with."""
        return {"taskType": "imageInference", "taskUUID": self.task.task_uuid}

    async def make(self) -> Answer:
        """From the first to the last image; refuses as the engine does."""
        loop, settings, task = asyncio.get_running_loop(), self.front.settings, self.task
        end = loop.time() + settings.timeout_s
        references, digest = await self._prepare()
        items = []
        for first in range(0, task.number_results, settings.max_images):
            job = EditJob(
                prompt=task.positive_prompt,
                references=references,
                digest=digest,
                height=task.height,
                width=task.width,
                steps=task.steps,
                seed=task.seed + first,
                num_images=min(settings.max_images, task.number_results - first),
                loras=task.loras,
                timeout_s=max(0.0, end - loop.time()),
            )
            images = await self._edit(job, end)
            for i, image in enumerate(images):
                items.append(await self._item(job, i, image))
        return done(*items)

    async def _prepare(self) -> tuple[tuple[Pixels, ...], str]:
        """Pixels of the references, and their digest; what they were made of is given up."""
        uploads = [
            Upload(self.images.find(reference, self.caller, _REFERENCES) or reference, _REFERENCES)
            for reference in self.task.references
        ]
        self.task.references.clear()
        pixels, digest = await self.front.references(uploads)
        self.nbytes = sum(image.nbytes for image in pixels)
        self.prepared.set()
        return pixels, digest

    async def _edit(self, job: EditJob, end: float) -> tuple[Image.Image, ...]:
        """Makes images; who asks for them later has the time to wait for a place in the queue."""
        while True:
            try:
                return (await self.front.edit(job)).images
            except ServiceError as error:
                left = end - asyncio.get_running_loop().time()
                wait = self.task.delivery_method == "async" and left > _AGAIN_S
                if error.code != "queue_full" or not wait:
                    raise
            await asyncio.sleep(_AGAIN_S)

    async def _item(self, job: EditJob, index: int, image: Image.Image) -> dict[str, Any]:
        front, task, kind = self.front, self.task, self.task.kind
        data = await front.in_thread(front.encode, job, image, index, kind, task.output_quality)
        item = self.named
        if task.output_type == "URL":
            ttl_s = min(task.ttl or front.settings.kept_s, front.settings.kept_s)
            name, url = self.images.put(data, self.caller, ttl_s)
            item |= {"imageUUID": name, "imageURL": url}
        else:
            text = await front.in_thread(base64_text, data)
            item["imageUUID"] = str(uuid.uuid4())
            if task.output_type == "base64Data":
                item["imageBase64Data"] = text
            else:
                item["imageDataURI"] = f"data:image/{kind};base64,{text}"
        item["seed"] = job.seed + index
        if task.include_cost:
            item["cost"] = 0
        if task.upload_endpoint is not None:
            url, param = task.upload_endpoint, "uploadEndpoint"
            await self.send.send("PUT", url, data, f"image/{kind}", param)
        return item


async def answered(task: object, work: Awaitable[Answer]) -> Answer:
    """What came of it; an error is told in words of ours."""
    try:
        return await work
    except ServiceError as error:
        return failed(task, error)
    except Exception:  # noqa: BLE001 - logged
        _log.exception("a task failed")
        return failed(task, ServiceError("internal_error", "the task failed"))
