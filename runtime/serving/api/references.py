"""`/v1/references`: images that are uploaded and encoded once, before any prompt is known."""

from typing import Any

from fastapi import APIRouter, Request, Response

from klein_kv.runtime.serving.api.answers import json_response
from klein_kv.runtime.serving.api.disconnect import unless_gone
from klein_kv.runtime.serving.api.fields import ReferenceFields, body_schema, checked, read_fields
from klein_kv.runtime.serving.errors import ServiceError
from klein_kv.runtime.serving.front import Front, ShelvedReferences
from klein_kv.runtime.serving.jobs import EncodeResult, Job

__all__ = ["reference_routes"]


def reference_routes(front: Front) -> APIRouter:
    """Upload, look at, forget."""
    routes = APIRouter()

    body = body_schema(ReferenceFields, "image")

    @routes.post("/v1/references", status_code=201, openapi_extra=body)
    async def upload(request: Request) -> Response:
        """Keys and values of 1 to 4 images; the id is the images' digest."""
        sent = await read_fields(request, front)
        fields = checked(ReferenceFields, sent.values)
        front.check_model(fields.model)
        front.check_loras(fields.lora)
        if not sent.images:
            raise ServiceError("missing_required_parameter", "image is missing", "image")
        if front.facts.variant == "plain":
            raise ServiceError(
                "unsupported_parameter",
                "this model has no references that can be kept; send images with each edit",
                "image",
            )
        images, digest = await front.references(sent.images)
        timeout_s = front.timeout_s(request.headers, fields.timeout)
        job = Job(images, digest, fields.lora, timeout_s)
        encoded = await unless_gone(request, front.engine.do(job))
        assert isinstance(encoded, EncodeResult)  # noqa: S101 - of a Job that is no EditJob
        held = front.shelve(images, digest)
        facts = {"tokens": encoded.tokens, "bytes": encoded.nbytes, "known": encoded.known}
        return json_response({**_described(held), **facts}, 201)

    @routes.get("/v1/references/{reference}")
    async def look(reference: str) -> Response:
        """What is kept under an id."""
        return json_response(_described(front.on_shelf(reference)))

    @routes.delete("/v1/references/{reference}")
    async def forget(reference: str) -> Response:
        """Forgets the images; keys and values make room when others need it."""
        front.shelf.drop(front.on_shelf(reference).digest)
        return json_response({"id": reference, "object": "references", "deleted": True})

    return routes


def _described(held: ShelvedReferences) -> dict[str, Any]:
    return {
        "id": held.digest,
        "object": "references",
        "created": held.created,
        "images": [{"width": x.shape[1], "height": x.shape[0]} for x in held.images],
    }
