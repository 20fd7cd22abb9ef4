"""`/v1/models`, `/health/...` and `/metrics`."""

from fastapi import APIRouter, Response

from klein_kv.runtime.serving.api.answers import json_response
from klein_kv.runtime.serving.errors import not_ready
from klein_kv.runtime.serving.front import Front

__all__ = ["health_routes"]


def health_routes(front: Front) -> APIRouter:
    """What machines ask."""
    routes = APIRouter()

    @routes.get("/v1/models")
    async def models() -> Response:
        """The model, in OpenAI's form, and what else there is to know of it."""
        return json_response({"object": "list", "data": [_model(front)]})

    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """The same of one name."""
        front.check_model(name)
        return json_response(_model(front))

    @routes.get("/health/live")
    async def live() -> Response:
        """The process answers."""
        return json_response({"status": "live"})

    @routes.get("/health/ready")
    async def ready() -> Response:
        """Warmed up, and not about to end."""
        if not front.engine.ready:
            raise not_ready()
        return json_response({"status": "ready"})

    @routes.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(front.metrics.text(), media_type="text/plain; version=0.0.4")

    return routes


def _model(front: Front) -> dict[str, object]:
    facts = front.facts
    return {
        "id": facts.model,
        "object": "model",
        "created": 0,
        "owned_by": "klein-kv",
        "digest": facts.model_digest,
        "variant": facts.variant,
        "backend": facts.backend,
        "loras": list(facts.loras),
        "size_unit": facts.unit,
        "max_references": front.settings.max_references,
    }
