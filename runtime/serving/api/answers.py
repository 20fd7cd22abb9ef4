"""Answers in OpenAI's form."""

import json
import math
from collections.abc import Mapping
from typing import Any

from fastapi import Response

from klein_kv.runtime.serving.errors import ServiceError

__all__ = ["error_body", "error_response", "json_response"]

_WORTH_RETRYING = ("queue_full", "draining", "not_ready", "out_of_memory", "body_timeout")


def json_response(body: Mapping[str, Any], status: int = 200) -> Response:
    """A JSON document; small ones."""
    return Response(json.dumps(body), status, media_type="application/json")


def error_body(error: ServiceError) -> dict[str, Any]:
    """What OpenAI's clients read."""
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }


def error_response(error: ServiceError) -> Response:
    """A refusal, with when to come again, or that it is of no use."""
    response = json_response(error_body(error), error.status)
    headers = response.headers
    if error.code not in _WORTH_RETRYING:
        headers["x-should-retry"] = "false"
    elif error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
        headers["retry-after-ms"] = str(math.ceil(error.retry_after_s * 1000))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return response
