"""What every route of a service shares: the engine, limits, threads, and uploads made into jobs."""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

from PIL import Image
from starlette.datastructures import Headers

from klein_kv.runtime.outputs.metadata import ImageParameters
from klein_kv.runtime.references.reference_set import images_digest
from klein_kv.runtime.serving.errors import ServiceError, not_ready
from klein_kv.runtime.serving.jobs import (
    EditJob,
    EditResult,
    Engine,
    EngineFacts,
    OnPreview,
    Pixels,
)
from klein_kv.runtime.serving.kept import Kept
from klein_kv.runtime.serving.metrics import Metrics
from klein_kv.runtime.serving.outputs import OutputFormat, encode_image
from klein_kv.runtime.serving.security.fetch import Fetcher
from klein_kv.runtime.serving.security.images_in import (
    bytes_from_base64,
    prepare_mask,
    prepare_upload,
)
from klein_kv.runtime.serving.security.keys import KeyRing
from klein_kv.runtime.serving.settings import ServeSettings

__all__ = ["Front", "ShelvedReferences", "Upload"]

_log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Upload:
    """An image in a field `param`: a file's bytes; or text: a data URI, base64, or a URL."""

    content: bytes | str
    param: str = "image"


@dataclass(frozen=True, slots=True, eq=False)
class ShelvedReferences:
    """An ordered set of prepared images that were uploaded as a resource.

    The engine keeps keys and values; these are what they are made from, so that any replica can
    make them again, and a set that the GPU gave up costs a first step instead of an error.

    Attributes:
        digest: their `images_digest`, which is the id of the resource.
        created: seconds since 1970.
    """

    digest: str
    images: tuple[Pixels, ...]
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass(frozen=True, slots=True, eq=False)
class Front:
    """The same for HTTP, WebSocket, and whatever engine. Used on the event loop."""

    engine: Engine
    settings: ServeSettings
    keys: KeyRing
    shelf: Kept[ShelvedReferences]
    metrics: Metrics
    threads: ThreadPoolExecutor
    fetch: Fetcher

    @property
    def facts(self) -> EngineFacts:
        """What the engine has opened; refuses with "not_ready" before that."""
        if self.engine.facts is None:
            raise not_ready()
        return self.engine.facts

    async def in_thread(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs what takes long outside the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.threads, lambda: call(*args, **kwargs))

    async def references(self, uploads: Sequence[Upload]) -> tuple[tuple[Pixels, ...], str]:
        """Prepared images of uploads, in order, and their digest; refuses too many."""
        if not uploads:
            return (), ""
        self._check_count(len(uploads), uploads[0].param)
        images = await asyncio.gather(*(self.prepared(upload) for upload in uploads))
        return tuple(images), await self.in_thread(digest_of, images)

    async def prepared(self, upload: Upload) -> Pixels:
        """A reference of one upload; refuses as `prepare_upload` does."""
        data = await self.bytes_of(upload)
        settings, unit = self.settings, self.facts.unit
        return await self.in_thread(
            prepare_upload, data, settings.max_pixels, unit, settings.matte, upload.param
        )

    async def mask(self, upload: Upload, first: Pixels) -> Pixels:
        """The mask of an edit whose first reference this is; refuses as `prepare_mask` does."""
        data = await self.bytes_of(upload)
        unit, most = self.facts.unit, self.settings.max_pixels
        return await self.in_thread(prepare_mask, data, most, unit, first.shape[:2])

    async def shelved(self, ids: Sequence[str]) -> tuple[tuple[Pixels, ...], str]:
        """Images that were uploaded before, and their digest; refuses unknown ids, and too many."""
        sets = [self.on_shelf(i) for i in ids]
        images = [image for held in sets for image in held.images]
        self._check_count(len(images), "references")
        if len(sets) == 1:
            return sets[0].images, sets[0].digest
        return tuple(images), await self.in_thread(digest_of, images)

    def shelve(self, images: tuple[Pixels, ...], digest: str) -> ShelvedReferences:
        """Keeps images under their digest."""
        held = self.shelf.get(digest) or ShelvedReferences(digest, images)
        self.shelf.put(digest, held, sum(image.nbytes for image in images), param="image")
        return held

    def on_shelf(self, digest: str) -> ShelvedReferences:
        """What is kept under an id; refuses others with "reference_not_found"."""
        held = self.shelf.get(digest)
        if held is None:
            raise ServiceError(
                "reference_not_found",
                "there are no references of this id; upload the images again",
                "references",
            )
        return held

    async def edit(self, job: EditJob, on_preview: OnPreview | None = None) -> EditResult:
        """Makes images and counts the job."""
        result = await self.engine.do(job, on_preview)
        assert isinstance(result, EditResult)  # noqa: S101 - of an EditJob
        self.metrics.note_edit(result, len(job.references))
        _log.info(
            "%d of %dx%d in %d steps, %d references, %s: %.3f s after %.3f s in the queue",
            len(result.images),
            *result.images[0].size,
            job.steps,
            len(job.references),
            "known" if result.references_known else "not known",
            result.stages_s.get("total", 0.0),
            result.queued_s,
        )
        return result

    def encode(
        self,
        job: EditJob,
        image: Image.Image,
        index: int,
        kind: OutputFormat,
        quality: int | None,
    ) -> bytes:
        """Image `index` of a job as a file's bytes; called in a thread."""
        if not self.settings.metadata:
            return encode_image(image, kind, quality)
        facts = self.facts
        loras = [f"{name}:{weight:g}" for name, weight in job.loras]
        parameters = ImageParameters(
            prompt=job.prompt,
            steps=job.steps,
            width=image.width,
            height=image.height,
            references=len(job.references),
            model=" + ".join([facts.model, *loras]),
            model_digest=facts.model_digest,
            seed=job.seed + index,
        )
        return encode_image(image, kind, quality, parameters)

    def check_model(self, name: str | None, other: str | None = None) -> None:
        """Refuses names that are not this model's, with "model_not_found"; `other` is one too."""
        own = self.facts.model
        names = (own, own.rpartition("/")[2], "klein-kv", *self.settings.model_names, other)
        if name is not None and name not in names:
            raise ServiceError(
                "model_not_found",
                f"there is no model {name[:60]!r}, expected {other or own!r}",
                "model",
            )

    def check_loras(self, loras: Sequence[tuple[str, float]]) -> None:
        """Refuses names that the operator did not register, with "invalid_value"."""
        known = self.facts.loras
        if any(name not in known for name, _ in loras):
            names = ", ".join(known) or "none"
            raise ServiceError("invalid_value", f"there is no such LoRA; expected: {names}", "lora")

    def timeout_s(self, headers: Headers, field: float | None = None) -> float:
        """Seconds that a request gives its answer: a field, the header `x-timeout-s`, or ours.

        Raises:
            ServiceError: a header that is no number of seconds.
        """
        asked = field
        if asked is None and (text := headers.get("x-timeout-s")) is not None:
            try:
                asked = float(text)
            except ValueError:
                asked = math.nan
            if not 0 < asked < math.inf:
                raise ServiceError(
                    "invalid_value", "x-timeout-s is no number of seconds above 0", "x-timeout-s"
                )
        most = self.settings.timeout_s
        return most if asked is None else min(asked, most)

    async def bytes_of(self, upload: Upload) -> bytes:
        """A file's bytes, decoded or fetched; refuses as `bytes_from_base64` and `Fetcher` do."""
        content = upload.content
        if isinstance(content, bytes):
            return content
        if content[:4].lower() == "http":
            return await self.fetch.get(content, upload.param)
        most = self.settings.max_body_bytes
        return await self.in_thread(bytes_from_base64, content, most, upload.param)

    def _check_count(self, count: int, param: str) -> None:
        most = self.settings.max_references
        if count > most:
            raise ServiceError(
                "invalid_value", f"{count} reference images, expected at most {most}", param
            )


def digest_of(images: Sequence[Pixels]) -> str:
    """`images_digest` of images without the batch's axis."""
    return images_digest([image[None] for image in images])
