"""Calls to addresses that a client names: images to read, webhooks and uploads to send.

Whoever names a URL has this server's place in the network, so a URL is nobody's to choose freely:
none unless the operator lists hosts, https alone, public addresses alone. The name is resolved
once, every address is judged, and the one that was judged is dialled: no second answer of a
resolver is asked for. TLS still checks the certificate against the name. Redirects are URLs like
any other. Proxies of the environment, cookies and credentials have no part in it.
"""

import asyncio
import contextlib
import logging
import re
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

import httpx

from klein_kv.runtime.serving.errors import ServiceError
from klein_kv.runtime.serving.security.addresses import is_name, is_public

__all__ = ["Fetcher", "Resolve"]

T = TypeVar("T")

_log = logging.getLogger(__name__)

Resolve = Callable[[str, int], Awaitable[list[str]]]
"""Addresses of a name and a port, in the order to try them."""

_LONGEST_URL = 4096
_MAX_REDIRECTS = 3
_MAX_TRIED = 3  # addresses of one name
_MOST_CONNECTIONS = 16  # others wait, and their time runs
_NOT_ALLOWED = "the URL names a host that this server may not call"
# Names that never are the public's: RFC 6761, 6762, 7686, 8375, ICANN's "internal", and habit.
# fmt: off
_OWN_NAMES = (
    "arpa", "corp", "home", "internal", "invalid", "lan", "local", "localdomain", "localhost",
    "onion", "test",
)
# fmt: on


class Fetcher:
    """Reads from and sends to hosts of a list; without one, to nobody.

    Args:
        hosts: names; "*.example.com" stands for all names below it, "*" for all there are.
        ports: of https.
        max_bytes: of what is read.
        timeout_s: for everything: the resolver, all redirects, the last byte.
        resolve: another resolver than the system's.
        transport: what dials an address, for tests.

    Every method raises `ServiceError("url_refused")`, whose message names no host and no address,
    and tells what this server may not call from what did not answer, but no more.
    """

    def __init__(
        self,
        hosts: tuple[str, ...] = (),
        *,
        ports: tuple[int, ...] = (443,),
        max_bytes: int = 20 * 1024 * 1024,
        timeout_s: float = 10.0,
        resolve: Resolve | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._hosts = tuple(host.lower() for host in hosts)
        self._ports = ports
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._resolve = resolve or _system_addresses
        # A kept connection would be found by its address, whatever name its certificate was for.
        limits = httpx.Limits(max_connections=_MOST_CONNECTIONS, max_keepalive_connections=0)
        self._transport = transport or httpx.AsyncHTTPTransport(trust_env=False, limits=limits)

    async def get(self, url: str, param: str) -> bytes:
        """What is at a URL."""
        return await self._timed(self._get(url, param), param)

    async def send(self, method: str, url: str, data: bytes, content_type: str, param: str) -> None:
        """Sends a body; anything but 2xx is a failure."""
        await self._timed(self._send(method, url, data, content_type, param), param)

    async def _timed(self, work: Awaitable[T], param: str) -> T:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await work
        except (TimeoutError, OSError, httpx.TransportError) as error:
            _log.info("a URL of %s was not reached: %s", param, type(error).__name__)
            raise _refused("the URL did not answer as it should", param) from None

    async def _get(self, url: str, param: str) -> bytes:
        target = self.check(url, param)
        for _ in range(_MAX_REDIRECTS + 1):
            answer = await self._dial("GET", target, param)
            try:
                if answer.has_redirect_location:
                    target = self.check(_joined(target, answer.headers["location"]), param)
                    continue
                return await self._body(answer, param)
            finally:
                await answer.aclose()
        raise _refused(f"the URL leads on more than {_MAX_REDIRECTS} times", param)

    async def _send(
        self, method: str, url: str, data: bytes, content_type: str, param: str
    ) -> None:
        target, headers = self.check(url, param), {"content-type": content_type}
        answer = await self._dial(method, target, param, data, headers)
        await answer.aclose()  # what it says is of no interest
        _require_success(answer, param)

    async def _body(self, answer: httpx.Response, param: str) -> bytes:
        _require_success(answer, param)
        if answer.headers.get("content-encoding", "identity").lower() != "identity":
            # Nothing else was asked for, and a few bytes may become gigabytes.
            raise _refused("the URL answers with a compressed body", param)
        body = bytearray()
        too_large = int(answer.headers.get("content-length", 0)) > self._max_bytes
        if not too_large:
            async for part in answer.aiter_raw():
                body += part
                too_large = len(body) > self._max_bytes
                if too_large:
                    break
        if too_large:
            raise _refused(f"what is at the URL is larger than {self._max_bytes} bytes", param)
        return bytes(body)

    def check(self, url: str, param: str) -> httpx.URL:
        """Refuses a URL for what it says, before anything is resolved."""
        if not self._hosts:
            raise _refused(
                "this server calls no URLs; send the data itself (a data URI), or ask its operator "
                "to allow the host",
                param,
            )
        # Browsers take a backslash for a slash, others drop control characters.
        plain = len(url) <= _LONGEST_URL and not re.search(r"[\x00-\x20\x7f\\]", url)
        try:
            target = httpx.URL(url if plain else "")
            host = target.raw_host.decode("ascii")
        except (httpx.InvalidURL, ValueError, TypeError):
            plain = False
        if not plain:
            raise _refused(f"not a URL of at most {_LONGEST_URL} plain characters", param)
        if "@" in re.split("[/?#]", url.partition("//")[2])[0]:
            raise _refused("the URL holds a name or a password", param)
        if target.scheme != "https":
            raise _refused("the URL is of another scheme than https", param)
        if (443 if target.port is None else target.port) not in self._ports:
            raise _refused("the URL names a port that is not allowed", param)
        own = host.rpartition(".")[2] in _OWN_NAMES
        if not is_name(host) or own or not self._listed(host):
            raise _refused(_NOT_ALLOWED, param)  # nor is an address, in whatever spelling
        return target

    def _listed(self, host: str) -> bool:
        return any(
            pattern in ("*", host) or (pattern[:2] == "*." and host.endswith(pattern[1:]))
            for pattern in self._hosts
        )

    async def _dial(
        self,
        method: str,
        target: httpx.URL,
        param: str,
        data: bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """Resolves, judges and calls; the answer's body is not read yet."""
        host = target.raw_host.decode("ascii")
        found: list[str] = []
        with contextlib.suppress(socket.gaierror):  # no name of an inner network is told from none
            found = await self._resolve(host, target.port or 443)
        if not found or not all(map(is_public, found)):
            raise _refused(_NOT_ALLOWED, param)  # one such among public ones is no accident
        port = "" if target.port is None else f":{target.port}"
        sent = {"host": host + port, "accept-encoding": "identity", "user-agent": "klein-kv"}
        limits = dict.fromkeys(("read", "write", "pool"), self._timeout_s)
        limits["connect"] = self._timeout_s / _MAX_TRIED
        failed: httpx.TransportError
        for address in found[:_MAX_TRIED]:
            request = httpx.Request(
                method,
                target.copy_with(host=address),
                headers=sent | dict(headers or {}),
                content=data or None,
                extensions={"sni_hostname": host, "timeout": limits},
            )
            try:
                return await self._transport.handle_async_request(request)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failed = error
        raise failed


def _joined(base: httpx.URL, location: str) -> str:
    try:
        return str(base.join(location))
    except (httpx.InvalidURL, ValueError, TypeError):
        return ""


def _refused(why: str, param: str) -> ServiceError:
    return ServiceError("url_refused", why, param)


def _require_success(answer: httpx.Response, param: str) -> None:
    if not answer.is_success:
        raise _refused("the URL did not answer as it should", param)


async def _system_addresses(host: str, port: int) -> list[str]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))
