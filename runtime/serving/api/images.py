"""`/v1/images/generations` and `/v1/images/edits`, as OpenAI's clients call them."""

import json
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from PIL import Image

from klein_kv.artifacts.pixels import MAX_AREA
from klein_kv.runtime.inputs.noise import random_seed
from klein_kv.runtime.serving.api.disconnect import unless_gone
from klein_kv.runtime.serving.api.fields import EditFields, Sent, body_schema, checked, read_fields
from klein_kv.runtime.serving.api.streaming import stream_images
from klein_kv.runtime.serving.errors import ServiceError
from klein_kv.runtime.serving.front import Front
from klein_kv.runtime.serving.jobs import EditJob, EditResult
from klein_kv.runtime.serving.outputs import base64_text

__all__ = ["image_routes"]

_TEXT_TOKENS = 512
"""Every prompt is padded to it."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A job, and how its images are to be sent."""

    job: EditJob
    fields: EditFields
    created: int


def image_routes(front: Front) -> APIRouter:
    """The two routes."""
    routes = APIRouter()

    @routes.post("/v1/images/generations", openapi_extra=body_schema(EditFields))
    async def generations(request: Request) -> Response:
        """An image from a prompt."""
        sent = await read_fields(request, front)
        if sent.images or sent.mask or sent.values.get("references"):
            raise ServiceError(
                "unsupported_parameter", "references go to /v1/images/edits", "image"
            )
        return await _answer(request, front, sent, "image_generation")

    @routes.post("/v1/images/edits", openapi_extra=body_schema(EditFields, "image", "mask"))
    async def edits(request: Request) -> Response:
        """An image from a prompt and reference images."""
        sent = await read_fields(request, front)
        if not (sent.images or sent.values.get("references")):
            raise ServiceError(
                "missing_required_parameter",
                "image is missing: send one, or the id of uploaded references",
                "image",
            )
        return await _answer(request, front, sent, "image_edit")

    return routes


async def _answer(request: Request, front: Front, sent: Sent, kind: str) -> Response:
    ask = await _ask(request, front, sent)
    if ask.fields.stream:
        completed = partial(_completed, front, ask, f"{kind}.completed")
        output_format = ask.fields.output_format
        return await stream_images(request, front, ask.job, output_format, kind, completed)
    return await unless_gone(request, _make(front, ask))


async def _make(front: Front, ask: Ask) -> Response:
    result = await front.edit(ask.job)
    body = await front.in_thread(_document, front, ask, result)
    known = "known" if result.references_known else "new"
    total = result.stages_s.get("total", 0.0)
    headers = {
        "x-references": known if ask.job.references else "none",
        "server-timing": f"queue;dur={result.queued_s * 1e3:.1f}, gpu;dur={total * 1e3:.1f}",
    }
    return Response(body, media_type="application/json", headers=headers)


async def _ask(request: Request, front: Front, sent: Sent) -> Ask:
    """Checks everything that was sent, and prepares references."""
    fields = checked(EditFields, sent.values)
    facts = front.facts
    front.check_model(fields.model)
    fields.check(front.settings, facts.unit)
    if sent.images and fields.references:
        raise ServiceError(
            "invalid_value", "image and references are given, expected one of them", "references"
        )
    front.check_loras(fields.lora)
    if fields.references:
        images, digest = await front.shelved(fields.references)
    else:
        images, digest = await front.references(sent.images)
    mask = None
    if sent.mask is not None:
        mask = await front.mask(sent.mask, images[0])
    elif fields.strength is not None:
        raise ServiceError("invalid_value", "strength needs a mask", "strength")
    width, height = fields.size or (None, None)
    if mask is not None and width is not None and height is not None and width * height > MAX_AREA:
        raise ServiceError(
            "invalid_value", "size is larger than 1024x1024, expected less with a mask", "size"
        )
    job = EditJob(
        prompt=fields.prompt,
        references=images,
        digest=digest,
        height=height,
        width=width,
        steps=fields.num_inference_steps,
        seed=random_seed() if fields.seed is None else fields.seed,
        num_images=fields.n,
        loras=fields.lora,
        mask=mask,
        strength=1.0 if fields.strength is None else fields.strength,
        previews=fields.partial_images,
        timeout_s=front.timeout_s(request.headers, fields.timeout),
    )
    return Ask(job, fields, int(time.time()))


def _encoded(front: Front, ask: Ask, image: Image.Image, index: int) -> str:
    kind, quality = ask.fields.output_format, ask.fields.output_compression
    return base64_text(front.encode(ask.job, image, index, kind, quality))


def _document(front: Front, ask: Ask, result: EditResult) -> bytes:
    data = [
        {"b64_json": _encoded(front, ask, image, i), "seed": ask.job.seed + i}
        for i, image in enumerate(result.images)
    ]
    described = _described(front, ask, result.images[0])
    return json.dumps({"created": ask.created, "data": data, **described}).encode()


def _completed(front: Front, ask: Ask, kind: str, result: EditResult) -> bytes:
    """The last event of a stream."""
    image = result.images[0]
    value = {
        "type": kind,
        "b64_json": _encoded(front, ask, image, 0),
        "created_at": ask.created,
        "seed": ask.job.seed,
        "references_known": result.references_known,
        "timings": {"queued": result.queued_s, **result.stages_s},
        **_described(front, ask, image),
    }
    return json.dumps(value).encode()


def _described(front: Front, ask: Ask, image: Image.Image) -> dict[str, Any]:
    """What both a document and the last event of a stream say of images."""
    area = front.facts.unit**2
    width, height = image.size
    text = _TEXT_TOKENS
    references = sum(x.shape[0] * x.shape[1] // area for x in ask.job.references)
    made = ask.job.num_images * (height * width // area)
    return {
        "background": "opaque",
        "output_format": ask.fields.output_format,
        "quality": "auto",
        "size": f"{width}x{height}",
        "usage": {
            "input_tokens": text + references,
            "input_tokens_details": {"text_tokens": text, "image_tokens": references},
            "output_tokens": made,
            "total_tokens": text + references + made,
        },
    }
