"""The service as an ASGI application, over whatever engine."""

import logging
import math
import secrets
import time
from concurrent.futures import ThreadPoolExecutor

from fastapi import FastAPI, Request, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from klein_kv import __version__
from klein_kv.runtime.serving.api.answers import error_response
from klein_kv.runtime.serving.api.disconnect import ClientGoneError
from klein_kv.runtime.serving.api.health import health_routes
from klein_kv.runtime.serving.api.images import image_routes
from klein_kv.runtime.serving.api.references import reference_routes
from klein_kv.runtime.serving.errors import ServiceError
from klein_kv.runtime.serving.front import Front, ShelvedReferences
from klein_kv.runtime.serving.jobs import Engine
from klein_kv.runtime.serving.kept import Kept
from klein_kv.runtime.serving.metrics import Metrics
from klein_kv.runtime.serving.page.routes import PAGE_PATHS, page_routes
from klein_kv.runtime.serving.runware.routes import runware_routes
from klein_kv.runtime.serving.runware.service import RunwareService
from klein_kv.runtime.serving.runware.store import PATH
from klein_kv.runtime.serving.security.fetch import Fetcher
from klein_kv.runtime.serving.security.keys import KeyRing, check_origin
from klein_kv.runtime.serving.security.limits import BodyBudget, CountedBody
from klein_kv.runtime.serving.settings import ServeSettings, is_loopback

__all__ = ["make_app"]

_log = logging.getLogger(__name__)

_STRANGERS_S = 5.0
"""For the rest of a request that has no key, so that its client can read why it is refused."""

_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}


def make_app(engine: Engine, settings: ServeSettings, calls: Fetcher | None = None) -> FastAPI:
    """Puts the service together; `calls` stands in for the guarded calls to other hosts.

    `app.state.front` is what all routes share; `app.state.public` are paths that need no key, or
    ask for it themselves, and `app.state.public_below` what all such paths begin with.
    """
    shelf: Kept[ShelvedReferences] = Kept(settings.shelf_bytes)
    front = Front(
        engine=engine,
        settings=settings,
        keys=KeyRing(settings.api_keys),
        shelf=shelf,
        metrics=Metrics(engine.gauges, lambda: shelf.nbytes),
        threads=ThreadPoolExecutor(settings.threads, "klein-kv-images"),
        fetch=calls or Fetcher(settings.url_hosts, max_bytes=settings.max_body_bytes),
    )
    app = FastAPI(
        title="klein-kv", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.state.front = front
    app.state.public = {"/health/live", PATH, *PAGE_PATHS}
    app.state.public_below = (f"{PATH}/images/",)
    app.include_router(health_routes(front))
    app.include_router(image_routes(front))
    app.include_router(reference_routes(front))
    service = RunwareService(front, calls or Fetcher(settings.send_hosts, timeout_s=30))
    app.include_router(runware_routes(front, service))
    app.include_router(page_routes())
    app.add_exception_handler(HTTPException, _refused)
    app.add_middleware(Gate, front=front, public=app.state.public, below=app.state.public_below)
    return app


async def _refused(_request: Request, error: Exception) -> Response:
    return error_response(_service_error(error))


def _service_error(error: Exception) -> ServiceError:
    """What a client is told of an error."""
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, HTTPException):
        if error.status_code == 405:
            return ServiceError("method_not_allowed", "this path has no such method")
        if error.status_code == 404:
            return ServiceError("not_found", "there is no such path")
        if error.status_code < 500:
            return ServiceError("invalid_body", "the request cannot be read")
    return ServiceError("internal_error", "the request failed")


class Gate:
    """What every request passes first and last: key, origin, limits, headers, metrics.

    Who is behind a WebSocket is asked in its first message.
    """

    def __init__(
        self, app: ASGIApp, front: Front, public: set[str], below: tuple[str, ...]
    ) -> None:
        self.app = app
        self.front = front
        self.public = public
        self.below = below
        self.local = is_loopback(front.settings.host)
        self.active = [0, 0]  # strangers, and who has a key
        self.budget = BodyBudget(front.settings.max_bodies_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        known = self.front.keys.bearer(Headers(scope=scope)) is not None
        self.active[known] += 1
        try:
            if scope["type"] == "websocket":
                await self._websocket(scope, receive, send, known)
            else:
                await self._http(scope, receive, send, known)
        finally:
            self.active[known] -= 1

    def _check(self, scope: Scope, headers: Headers, known: bool) -> None:
        """Refuses other sites' pages, strangers, and more than there is room for.

        Strangers take no room from who has a key.
        """
        path = scope["path"]
        if self.front.keys.open:
            check_origin(headers, local=self.local)
        elif not (known or path in self.public or path.startswith(self.below)):
            raise ServiceError(
                "invalid_api_key", "the API key is missing or wrong; send Authorization: Bearer KEY"
            )
        most = self.front.settings.max_connections
        if path != "/health/live" and self.active[known] > (most if known else max(1, most // 4)):
            raise ServiceError("queue_full", "too many requests at a time", retry_after_s=1.0)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send, known: bool) -> None:
        try:
            self._check(scope, Headers(scope=scope), known)
        except ServiceError:
            await send({"type": "websocket.close", "code": 1008})
            return
        await self.app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send, known: bool) -> None:
        start, status = time.perf_counter(), 0
        headers = Headers(scope=scope)
        body = CountedBody(receive, headers, self.front.settings, self.budget)
        request_id = f"req_{secrets.token_hex(12)}"

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if status >= 400:
                    await body.discard(math.inf if known else _STRANGERS_S)
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check(scope, headers, known)
            body.check_length()
            await self.app(scope, body, sending)
        except (ClientGoneError, ClientDisconnect):
            status = 499  # nginx' number; nobody is there to read it
            await sending({"type": "http.response.start", "status": status, "headers": []})
            await sending({"type": "http.response.body", "body": b""})
        except Exception as error:  # noqa: BLE001 - logged, and told in words of ours
            if not isinstance(error, ServiceError):
                _log.exception("request %s failed", request_id)
            if not status:
                await error_response(_service_error(error))(scope, receive, sending)
        finally:
            body.done()
            route = getattr(scope.get("route"), "path", "other")
            self.front.metrics.requests.labels(route, str(status)).inc()
            self.front.metrics.seconds.labels(route).observe(time.perf_counter() - start)
