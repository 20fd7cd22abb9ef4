"""What a service answers when it refuses: a code from a fixed list, and a sentence of ours.

To refuse is to raise a `ServiceError`. No text of an exception below, no path and no address ever
gets into an answer.
"""

from klein_kv.errors import KleinKVError

__all__ = ["ServiceError", "draining", "expired", "not_ready"]

_STATUS = {
    "invalid_value": 400,
    "missing_required_parameter": 400,
    "unknown_parameter": 400,
    "unsupported_parameter": 400,
    "invalid_image": 400,
    "invalid_body": 400,
    "url_refused": 400,
    "invalid_api_key": 401,
    "forbidden": 403,
    "not_found": 404,
    "model_not_found": 404,
    "reference_not_found": 404,
    "method_not_allowed": 405,
    "body_timeout": 408,
    "conflict": 409,
    "payload_too_large": 413,
    "queue_full": 429,
    "internal_error": 500,
    "draining": 503,
    "not_ready": 503,
    "out_of_memory": 503,
    "deadline": 504,
}

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ServiceError(KleinKVError):
    """A refusal.

    Args:
        code: one of the list above.
        message: a sentence for the caller, which says what, got, expected.
        param: the parameter at fault.
        retry_after_s: when to come again.
    """

    def __init__(
        self,
        code: str,
        message: str,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type["ServiceError"], tuple[object, ...]]:
        return type(self), (self.code, self.message, self.param, self.retry_after_s)

    @property
    def status(self) -> int:
        """Of HTTP."""
        return _STATUS[self.code]

    @property
    def type(self) -> str:
        """OpenAI's name of its kind."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return _TYPES.get(self.status, kind)


def not_ready() -> ServiceError:
    """Not warmed up, or no replica is up."""
    return ServiceError("not_ready", "the service is not ready", retry_after_s=2)


def draining() -> ServiceError:
    """Nothing is taken on any more."""
    return ServiceError("draining", "the service is about to end", retry_after_s=2)


def expired() -> ServiceError:
    """A deadline has passed."""
    return ServiceError("deadline", "the deadline of the request has passed")
