"""Bytes of requests, counted as they arrive and before anything reads them."""

import asyncio
import json
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Message, Receive

from klein_kv.runtime.serving.errors import ServiceError
from klein_kv.runtime.serving.settings import ServeSettings

__all__ = ["BodyBudget", "CountedBody", "json_value"]

_MOST_VALUES = 100_000
"""Of a JSON document: a prompt of commas is within it, and it is parsed in a tenth of a second."""


def json_value(text: str | bytes | bytearray) -> Any:
    """What a JSON document holds.

    Two bytes may be a value, which takes 60 in memory; and no other thread runs while they are
    parsed. So values are counted first, by what stands before each.

    Raises:
        ServiceError: "invalid_body": too many of them, or no JSON.
    """
    marks: tuple[Any, ...] = (",", "[", "{") if isinstance(text, str) else (b",", b"[", b"{")
    if sum(map(text.count, marks)) > _MOST_VALUES:
        raise ServiceError("invalid_body", f"the JSON holds more than {_MOST_VALUES} values")
    try:
        return json.loads(text, parse_constant=_refused)
    except (ValueError, RecursionError):
        raise ServiceError("invalid_body", "the request is no valid JSON") from None


def _refused(_name: str) -> None:
    raise ValueError  # NaN and infinities are Python's, not JSON's


class BodyBudget:
    """Bytes of all requests that are being served, against one limit."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.used = 0


class CountedBody:
    """The `receive` of one request, which refuses bodies that are too large or too slow."""

    def __init__(
        self, receive: Receive, headers: Headers, settings: ServeSettings, budget: BodyBudget
    ) -> None:
        self._receive = receive
        self._most = settings.max_body_bytes
        self._seconds = settings.body_timeout_s
        self._budget = budget
        self._bytes = 0
        self._more = True
        self._end: float | None = None
        self._headers = headers

    def check_length(self) -> None:
        """Refuses what says itself that it is too large.

        Raises:
            ServiceError: "payload_too_large".
        """
        said = self._headers.get("content-length", "0")
        if not (said.isascii() and said.isdigit()):
            raise ServiceError("invalid_body", "content-length is no number")
        if len(said) > 18 or int(said) > self._most:
            raise self._too_large()

    async def __call__(self) -> Message:
        """See ASGI.

        Raises:
            ServiceError: "payload_too_large", "body_timeout", or "queue_full" where all bodies
                together are too much.
        """
        if not self._more:
            return await self._receive()
        try:
            message = await self._next()
        except TimeoutError:
            raise ServiceError(
                "body_timeout", f"the request did not arrive within {self._seconds:g} s"
            ) from None
        size = len(message.get("body", b""))
        self._bytes += size
        self._budget.used += size
        if self._bytes > self._most:
            raise self._too_large()
        if self._budget.used > self._budget.most:
            raise ServiceError("queue_full", "too many large requests at a time", retry_after_s=1.0)
        return message

    async def discard(self, seconds: float) -> None:
        """Reads what is left of a request that is refused, for a while, up to once more the limit.

        Without that the connection may end before the client has read why. One that asked first
        (`Expect: 100-continue`) has sent nothing.
        """
        end = asyncio.get_running_loop().time() + seconds
        self._end = end if self._end is None else min(self._end, end)
        asked = "100-continue" in self._headers.get("expect", "").lower()
        left = 0 if asked and not self._bytes else self._most
        try:
            while self._more and left > 0:
                left -= len((await self._next()).get("body", b""))
        except TimeoutError:
            return

    async def _next(self) -> Message:
        if self._end is None:
            self._end = asyncio.get_running_loop().time() + self._seconds
        async with asyncio.timeout_at(self._end):
            message = await self._receive()
        self._more = message["type"] == "http.request" and message.get("more_body", False)
        return message

    def done(self) -> None:
        """Gives the bytes back."""
        self._budget.used -= self._bytes
        self._bytes = 0

    def _too_large(self) -> ServiceError:
        return ServiceError(
            "payload_too_large", f"the request is too large, expected at most {self._most} bytes"
        )
