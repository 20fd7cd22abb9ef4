"""Work that ends when the client goes: nobody would see its result."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from fastapi import Request

__all__ = ["ClientGoneError", "unless_gone"]

T = TypeVar("T")


class ClientGoneError(Exception):
    """The client closed the connection."""


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Awaits `work`, or cancels it when the client closes the connection.

    The body has to be read already: `http.disconnect` is what comes next. Asking
    `Request.is_disconnected` now and then would be late, and is wrong behind some middleware.

    Raises:
        ClientGoneError: the client went.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
