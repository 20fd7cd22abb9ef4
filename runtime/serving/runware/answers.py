"""Answers in Runware's form: `{"data": [...]}` and `{"errors": [...]}`, task by task."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from klein_kv.runtime.serving.errors import ServiceError

__all__ = ["Answer", "as_json", "done", "failed", "frame", "http_status"]

# Runware's own names where there are some; its client sorts others by how they begin and end.
_CODES = {
    "invalid_value": "invalidParameter",
    "missing_required_parameter": "missingParameter",
    "unknown_parameter": "unknownParameter",
    "unsupported_parameter": "unsupportedParameter",
    "invalid_image": "invalidImage",
    "invalid_body": "invalidRequest",
    "url_refused": "invalidURL",
    "invalid_api_key": "invalidApiKey",
    "forbidden": "forbidden",
    "not_found": "taskNotFound",
    "model_not_found": "modelNotFound",
    "reference_not_found": "imageNotFound",
    "method_not_allowed": "invalidRequest",
    "body_timeout": "timeout",
    "conflict": "conflictTaskUUID",
    "payload_too_large": "maxSizeExceeded",
    "queue_full": "rateLimitExceeded",
    "internal_error": "internalServerError",
    "draining": "serviceUnavailable",
    "not_ready": "serviceUnavailable",
    "out_of_memory": "serviceUnavailable",
    "deadline": "timeout",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """To one task: items, or an error.

    Attributes:
        status: of HTTP, if no task of a request fares better.
        retry_after_s: when to come again.
    """

    items: tuple[dict[str, Any], ...] = ()
    error: dict[str, Any] | None = None
    status: int = 200
    retry_after_s: float | None = None


def done(*items: dict[str, Any]) -> Answer:
    """A task went well."""
    return Answer(items)


def failed(task: object, error: ServiceError) -> Answer:
    """A task was refused, or failed; its type and name are given back as they came."""
    told: dict[str, Any] = {"code": _CODES[error.code], "message": error.message}
    if error.param is not None:
        told["parameter"] = error.param
    if isinstance(task, dict):
        for name in ("taskType", "taskUUID"):
            if isinstance(value := task.get(name), str):
                told[name] = value[:100]
    return Answer((), told, error.status, error.retry_after_s)


def frame(answers: Sequence[Answer]) -> dict[str, Any]:
    """One document of several answers."""
    document: dict[str, Any] = {}
    if items := [item for answer in answers for item in answer.items]:
        document["data"] = items
    if errors := [answer.error for answer in answers if answer.error is not None]:
        document["errors"] = errors
    return document


def as_json(document: dict[str, Any]) -> bytes:
    """ASCII, so that half a character of a client's text does no harm."""
    return json.dumps(document, separators=(",", ":")).encode()


def http_status(answers: Sequence[Answer]) -> tuple[int, dict[str, str]]:
    """HTTP's status, and headers, of several answers: 200 if one went well."""
    if not answers or any(answer.error is None for answer in answers):
        return 200, {}
    first = answers[0]
    if first.retry_after_s is None:
        return first.status, {}
    return first.status, {"retry-after": str(max(1, math.ceil(first.retry_after_s)))}
