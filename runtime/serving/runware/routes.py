"""`/runware/v1`: tasks by POST and over a WebSocket, and the files behind URLs of results."""

import asyncio
import contextlib
import functools
import uuid
from collections.abc import AsyncIterator
from typing import Any, NoReturn

from fastapi import APIRouter, FastAPI, Request, Response, WebSocket
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.websockets import WebSocketDisconnect

from klein_kv.runtime.serving.api.disconnect import unless_gone
from klein_kv.runtime.serving.api.fields import described
from klein_kv.runtime.serving.errors import ServiceError
from klein_kv.runtime.serving.front import Front
from klein_kv.runtime.serving.runware.answers import (
    Answer,
    as_json,
    done,
    failed,
    frame,
    http_status,
)
from klein_kv.runtime.serving.runware.service import RunwareService
from klein_kv.runtime.serving.runware.store import PATH, Caller
from klein_kv.runtime.serving.runware.tasks import is_uuid
from klein_kv.runtime.serving.security.limits import json_value

__all__ = ["runware_routes"]

_MOST_TASKS = 32  # of one message
_MOST_AT_ONCE = 32  # of one connection
_MOST_CONNECTIONS = 64
_MOST_UNKNOWN = 8
_LARGEST_WITHOUT_KEY = 1 << 20  # bytes of a request whose key is in a task
_LARGEST_FIRST = 4096  # characters of the message that authenticates
_SECONDS_TO_AUTHENTICATE = 10.0
_TASK = {
    "type": "object",
    "required": ["taskType"],
    "properties": {
        "taskType": {"type": "string"},
        "taskUUID": {"type": "string", "format": "uuid"},
    },
}
_TASKS = {"type": "array", "minItems": 1, "maxItems": _MOST_TASKS, "items": _TASK}


def runware_routes(front: Front, service: RunwareService) -> APIRouter:
    """The routes; they ask for a key themselves, since it may be in a task."""

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    routes = APIRouter(lifespan=lifespan)
    connections = _Connections(front, service)

    @routes.post(PATH, openapi_extra=described({"application/json": _TASKS}))
    async def tasks(request: Request) -> Response:
        """A list of tasks, each answered for itself."""
        try:
            answers = await _post(request, front, service)
        except ServiceError as error:
            answers = [failed(None, error)]
        status, headers = http_status(answers)
        body = await front.in_thread(as_json, frame(answers))
        return Response(body, status, headers, "application/json")

    @routes.get(PATH + "/images/{name}/{file}", include_in_schema=False)
    async def image(name: str, file: str) -> Response:
        """A file; its URL is all that it takes."""
        found = service.images.at(name, file)
        if found is None:
            raise ServiceError("not_found", "there is no such image, or its time is over")
        headers = {"cross-origin-resource-policy": "cross-origin"}
        return Response(found.data, media_type=f"image/{found.kind}", headers=headers)

    routes.add_api_websocket_route(PATH, connections.serve)
    return routes


async def _post(request: Request, front: Front, service: RunwareService) -> list[Answer]:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a page of another site may not send without asking
        raise ServiceError("invalid_body", "expected a list of tasks as application/json")
    owner = _owner(front, request.headers)
    most = front.settings.max_body_bytes if owner is not None else _LARGEST_WITHOUT_KEY
    tasks = await front.in_thread(_tasks, await _body(request, most))
    answers: list[Answer] = []
    if _is_login(tasks[0]):
        owner = _known(front.keys.owner(tasks[0].get("apiKey")))
        answers = [done({"taskType": "authentication"})]
        tasks = tasks[1:]
    caller = Caller(_known(owner), _base(request))
    work = asyncio.gather(*(service.answer(task, caller) for task in tasks))
    return answers + await unless_gone(request, work)


async def _body(request: Request, most: int) -> bytearray:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise _no_key()  # the limit of all requests is counted before this
    return body


def _tasks(text: str | bytearray) -> list[Any]:
    tasks = json_value(text)
    if not isinstance(tasks, list) or not 1 <= len(tasks) <= _MOST_TASKS:
        raise ServiceError("invalid_body", f"expected a list of 1 to {_MOST_TASKS} tasks")
    return tasks


def _owner(front: Front, headers: Headers) -> str | None:
    """Whose request it is by its headers; None if they say nothing of it. Refuses wrong keys."""
    if front.keys.open:
        return ""
    if "authorization" not in headers:
        return None
    return _known(front.keys.bearer(headers))


def _known(owner: str | None) -> str:
    if owner is None:
        raise _no_key()
    return owner


def _no_key() -> ServiceError:
    return ServiceError(
        "invalid_api_key",
        "the API key is missing or wrong; send Authorization: Bearer KEY, or a first task "
        "authentication with apiKey",
        "apiKey",
    )


def _base(connection: HTTPConnection) -> str:
    """How the caller calls this server."""
    scheme = connection.url.scheme.replace("ws", "http")
    return f"{scheme}://{connection.headers.get('host', '')}"


def _is_login(task: object) -> bool:
    return isinstance(task, dict) and task.get("taskType") == "authentication"


class _Connections:
    """WebSockets, at most so many, and few whose first message is not here yet.

    Attributes:
        held: characters of all messages whose tasks are under way.
    """

    def __init__(self, front: Front, service: RunwareService) -> None:
        self.front = front
        self.service = service
        self.held = 0
        self.unknown = 0
        self._open = 0

    def admits(self, size: int) -> bool:
        """Whether a message of so many characters is not too much."""
        return self.held + size <= self.front.settings.max_bodies_bytes

    async def serve(self, socket: WebSocket) -> None:
        """One connection from its first message to its end."""
        unknown = "authorization" not in socket.headers and self.unknown >= _MOST_UNKNOWN
        if unknown or self._open >= _MOST_CONNECTIONS:
            await socket.close(1013)  # before it is accepted: HTTP 403
            return
        self._open += 1
        try:
            await _Connection(socket, self).serve()
        except WebSocketDisconnect:
            pass
        finally:
            self._open -= 1


class _Connection:
    """One client. What it waits for ends with it; what it may ask for later does not."""

    def __init__(self, socket: WebSocket, connections: _Connections) -> None:
        self._socket = socket
        self._all = connections
        self._front = connections.front
        self._service = connections.service
        self._sending = asyncio.Lock()
        self._work: set[asyncio.Task[None]] = set()
        self._session = str(uuid.uuid4())
        self._rest: list[Any] = []  # of the first message

    async def serve(self) -> None:
        try:
            self._all.unknown += 1
            try:
                caller = await self._authenticated()
            finally:
                self._all.unknown -= 1
            await self._start(self._rest, caller, 0)
            while True:
                # No name for the message: it would be kept until the next one.
                await self._take(await self._received(), caller)
        finally:
            for task in self._work:
                task.cancel()

    async def _received(self) -> str:
        """The next message; raises `WebSocketDisconnect` when there is none."""
        message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005))
        text = message.get("text")
        return text if isinstance(text, str) else await self._leave(1003)

    async def _leave(self, code: int) -> NoReturn:
        await self._socket.close(code)
        raise WebSocketDisconnect(code)

    async def _authenticated(self) -> Caller:
        """Accepts, and hears who it is; where that fails, the client is told, and left."""
        base = _base(self._socket)
        await self._socket.accept()
        try:
            owner = _owner(self._front, self._socket.headers)
            if owner is not None and not self._front.keys.open:
                return Caller(owner, base)
            async with asyncio.timeout(_SECONDS_TO_AUTHENTICATE):
                text = await self._received()
            if len(text) > _LARGEST_FIRST:
                raise _no_key()
            first, *self._rest = _tasks(text)
            if not _is_login(first):
                raise _no_key()
            owner = _known(self._front.keys.owner(first.get("apiKey")))
            session = first.get("connectionSessionUUID")
            if isinstance(session, str) and is_uuid(session):
                self._session = session
            await self._send(self._hello())
            return Caller(owner, base)
        except (ServiceError, TimeoutError) as error:
            refusal = error if isinstance(error, ServiceError) else _no_key()
            await self._send(failed({"taskType": "authentication"}, refusal))
            await self._leave(1008)

    def _hello(self) -> Answer:
        return done({"taskType": "authentication", "connectionSessionUUID": self._session})

    async def _take(self, text: str, caller: Caller) -> None:
        if len(text) > self._front.settings.max_body_bytes:
            await self._leave(1009)
        try:
            tasks = await self._front.in_thread(_tasks, text)
        except ServiceError as error:
            await self._send(failed(None, error))
            return
        await self._start(tasks, caller, len(text) // len(tasks))

    async def _start(self, tasks: list[Any], caller: Caller, size: int) -> None:
        for task in tasks:
            if len(self._work) >= _MOST_AT_ONCE or not self._all.admits(size):
                busy = "too many tasks are under way"
                await self._send(failed(task, ServiceError("queue_full", busy)))
                continue
            self._all.held += size
            work = asyncio.create_task(self._do(task, caller))
            self._work.add(work)
            work.add_done_callback(functools.partial(self._done, size))

    def _done(self, size: int, work: asyncio.Task[None]) -> None:
        self._work.discard(work)
        self._all.held -= size

    async def _do(self, task: object, caller: Caller) -> None:
        if _is_login(task):
            answer = self._hello()  # again; it stays whose it is
        else:
            answer = await self._service.answer(task, caller)
        with contextlib.suppress(WebSocketDisconnect):
            await self._send(answer)

    async def _send(self, answer: Answer) -> None:
        """One task's answer a message: the client reads no items beside errors."""
        text = (await self._front.in_thread(as_json, frame([answer]))).decode()
        async with self._sending:
            try:
                await self._socket.send_text(text)
            except RuntimeError:  # Starlette's word for a connection that is closed
                raise WebSocketDisconnect(1006) from None
