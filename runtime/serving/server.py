"""Listens until a signal comes, and ends when all that was taken on is done."""

import asyncio
import contextlib
import logging
import math
import socket
import sys
import warnings
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from klein_kv.errors import RequestError
from klein_kv.runtime.serving.app import make_app
from klein_kv.runtime.serving.jobs import Engine
from klein_kv.runtime.serving.security.slow_clients import PunctualProtocol
from klein_kv.runtime.serving.settings import ServeSettings, is_loopback

__all__ = ["OpenEngine", "serve", "uvicorn_config"]

_log = logging.getLogger(__name__)

_LAST_ANSWERS_S = 3
_MOST_FILES = 65536

OpenEngine = Callable[[Callable[[BaseException], None]], Engine]
"""Opens an engine on the event loop, at once; what it gets is called with what ends the engine."""


def serve(
    open_engine: OpenEngine,
    settings: ServeSettings,
    *,
    drain_timeout_s: float = 30.0,
) -> None:
    """Serves an engine until SIGTERM or SIGINT; what was taken on by then is done.

    Raises:
        RequestError: the address cannot be listened on.
        DeviceLostError: the device does not answer any more: the process should be a new one.
        KleinKVError: the pipeline could not be opened.
    """
    listening = _listen(settings)
    _allow_files()
    warnings.filterwarnings("ignore", module="PIL")  # thousands of lines for one bad upload
    if not (settings.api_keys or is_loopback(settings.host)):
        _log.warning("everybody who reaches %s may use this service", settings.host)
    try:
        asyncio.run(_serve(open_engine, settings, listening, drain_timeout_s))
    finally:
        listening.close()


async def _serve(
    open_engine: OpenEngine,
    settings: ServeSettings,
    listening: socket.socket,
    drain_timeout_s: float,
) -> None:
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of every broken form
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    failures: list[BaseException] = []

    def failed(error: BaseException) -> None:
        failures.append(error)
        loop.call_soon_threadsafe(stop.set)

    engine = open_engine(failed)
    config = uvicorn_config(make_app(engine, settings), settings)
    server = _Server(config, loop, stop)
    serving = asyncio.ensure_future(server.serve([listening]))
    host, port = listening.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    _log.info("listening on http://%s:%d, not ready yet", host, port)
    stopped = asyncio.ensure_future(stop.wait())
    await asyncio.wait((serving, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not failures:
        _log.info("draining")
        end = loop.time() + drain_timeout_s
        drained = asyncio.ensure_future(engine.drain(drain_timeout_s))
        await asyncio.wait((drained, serving), return_when=asyncio.FIRST_COMPLETED)
        drained.cancel()  # where a second signal came
        # Images that were made still have to be encoded and sent.
        config.timeout_graceful_shutdown = math.ceil(max(_LAST_ANSWERS_S, end - loop.time()))
    server.should_exit = True
    await serving
    if failures:
        raise failures[0]
    await asyncio.to_thread(engine.close)


def uvicorn_config(app: FastAPI, settings: ServeSettings) -> uvicorn.Config:
    """How uvicorn serves it."""
    return uvicorn.Config(
        app,
        http=PunctualProtocol,
        access_log=False,
        log_level="warning",
        server_header=False,
        limit_concurrency=2 * settings.max_connections,  # the app refuses earlier, and in JSON
        timeout_graceful_shutdown=_LAST_ANSWERS_S,
        timeout_keep_alive=30,
        ws_max_size=settings.max_body_bytes,
        ws_max_queue=1,
        ws_per_message_deflate=False,  # what was read at once would become a thousand times as much
    )


class _Server(uvicorn.Server):
    """A first signal asks for the end, a second one does not wait for it."""

    def __init__(
        self, config: uvicorn.Config, loop: asyncio.AbstractEventLoop, stop: asyncio.Event
    ) -> None:
        super().__init__(config)
        self._loop = loop
        self._stop = stop

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's
        """See uvicorn."""
        if self._stop.is_set():
            self.should_exit = self.force_exit = True
        self._loop.call_soon_threadsafe(self._stop.set)


def _allow_files() -> None:
    """Raises what the system lets a process open: each mapped weight is a file, and each client."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, _MOST_FILES)), hard))


def _listen(settings: ServeSettings) -> socket.socket:
    """A socket that says it is TCP: asyncio sends at once (TCP_NODELAY) on no other.

    `socket.create_server` leaves the protocol open, and every answer on a connection that is kept
    would wait 40 ms for the client's delayed acknowledgement.
    """
    host = settings.host.strip("[]")
    listening = None
    try:
        found = socket.getaddrinfo(host, settings.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        listening = socket.socket(family, kind, protocol)
        if sys.platform != "win32":  # there it would share the port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
        return listening
    except OSError as error:
        if listening is not None:
            listening.close()
        raise RequestError(
            f"{settings.host}:{settings.port} cannot be listened on ({error.strerror}); choose "
            "another --host or --port"
        ) from error
