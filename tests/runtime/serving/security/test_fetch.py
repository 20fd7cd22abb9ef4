"""What a client may not have this server call. Nothing but loopback is ever dialled here."""

import asyncio
import shutil
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest

from klein_kv.errors import RequestError
from klein_kv.runtime.serving.errors import ServiceError
from klein_kv.runtime.serving.security.addresses import is_host_pattern, is_public
from klein_kv.runtime.serving.security.fetch import Fetcher
from klein_kv.runtime.serving.settings import ServeSettings

PUBLIC = "93.184.215.14"
NAME = "images.example.com"
GOOD = f"https://{NAME}/a.png"


class Wire(httpx.AsyncBaseTransport):
    """Notes who is dialled, and answers from a list."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers = list(answers)
        self.dialled: list[httpx.Request] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.dialled.append(request)
        answer = (
            self.answers.pop(0)
            if self.answers
            else httpx.Response(200, stream=httpx.ByteStream(b"image"))
        )
        if isinstance(answer, Exception):
            raise answer
        return answer


class Names:
    """A resolver that answers from a list, the last one for ever."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers) or [[PUBLIC]]
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def fetcher(wire: Wire, names: Names | None = None, **options: Any) -> Fetcher:
    return Fetcher(
        options.pop("hosts", ("*",)), resolve=names or Names(), transport=wire, **options
    )


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


def refusal(work: Coroutine[Any, Any, Any]) -> str:
    with pytest.raises(ServiceError) as caught:
        run(work)
    assert (caught.value.code, caught.value.status, caught.value.param) == ("url_refused", 400, "x")
    return caught.value.message


CALLS: dict[str, Callable[[Fetcher, str], Coroutine[Any, Any, Any]]] = {
    "get": lambda fetch, url: fetch.get(url, "x"),
    "post": lambda fetch, url: fetch.send("POST", url, b"{}", "application/json", "x"),
    "put": lambda fetch, url: fetch.send("PUT", url, b"data", "image/png", "x"),
}

# fmt: off
WRONG_URLS = [
    # an address of this machine or a private one, in every spelling that some parser reads
    "https://127.0.0.1/", "https://127.1/", "https://2130706433/", "https://0x7f000001/",
    "https://0x7f.0x1/", "https://127.0.0.0x1/", "https://0177.0.0.1/", "https://017700000001/",
    "https://0/", "https://0.0.0.0/", "https://10.0.0.1/", "https://①②⑦.⓪.⓪.①/",
    "https://169.254.169.254/latest/meta-data/", "https://127。0。0。1/",
    "https://%31%32%37.0.0.1/", "https://[::1]/", "https://[::]/", "https://[::ffff:127.0.0.1]/",
    "https://[::ffff:7f00:1]/", "https://[fe80::1%25eth0]/", "https://[fe80::1%eth0]/",
    "https://[64:ff9b::a9fe:a9fe]/",
    "https://93.184.215.14/",  # a public address as well: certificates are for names
    # names that are never the public's, or that only look like the listed one
    "https://localhost/", "https://localhost./", "https://metadata.google.internal/",
    "https://printer.local/", "https://router.home.arpa/", "https://intranet/",
    f"https://{NAME}./", f"https://{NAME}.evil/..", f"https://evil%00.{NAME}/",
    # two parsers, two hosts
    f"https://{NAME}@evil.example.org/", f"https://{NAME}:secret@{NAME}/", f"https://@{NAME}/",
    f"https://evil.example.org\\@{NAME}/", f"https://{NAME}\\.evil.example.org/",
    f"https://{NAME}/a\r\nHost: evil", f"https://{NAME}\t/", f"https://{NAME} /",
    # schemes, ports, and what is no URL
    f"http://{NAME}/", "file:///etc/passwd", "gopher://127.0.0.1:6379/_FLUSHALL", f"//{NAME}/",
    f"https://{NAME}:22/", f"https://{NAME}:0/", f"https://{NAME}:80:443/",
    f"https://{NAME}:99999/", "https:///etc", "https:", "", "https://" + "a" * 64 + ".com/",
    GOOD + "?" + "x" * 5000,
]
# fmt: on


@pytest.mark.parametrize("url", WRONG_URLS)
def test_a_wrong_url_is_refused_before_anybody_is_asked(url: str) -> None:
    wire, names = Wire(), Names()
    hosts = ("*",) if "evil" not in url else (NAME, f"*.{NAME}")
    fetch = fetcher(wire, names, hosts=hosts)
    for call in CALLS.values():
        message = refusal(call(fetch, url))
        for secret in ("127", "evil", "local", NAME, "secret", "0x"):
            assert secret not in message
    assert not wire.dialled
    assert not names.asked
    with pytest.raises(ServiceError):
        fetch.check(url, "x")


# fmt: off
NOT_PUBLIC = [
    "0.0.0.0", "0.1.2.3", "10.1.2.3", "100.64.0.1", "100.100.100.200", "127.0.0.1",
    "127.255.255.255", "169.254.169.254", "168.63.129.16", "172.16.0.1", "172.31.255.255",
    "192.0.0.192", "192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1", "198.51.100.1",
    "203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "::", "::1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:a9fe:a9fe", "::127.0.0.1", "::93.184.215.14",
    "64:ff9b::127.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "100::1", "2001::1",
    "2001:0:7f00:1::1", "2001:db8::1", "2001:10::1", "2002:7f00:1::", "2002:a9fe:a9fe::1",
    "3fff::1", "5f00::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%eth0",
    "2606:4700::5efe:7f00:1", "2606:4700::200:5efe:a00:1", "2606:4700::1%eth0", "fec0::1",
    "ff02::1", "printer", "0177.0.0.1", "127.1",
]
# fmt: on
ARE_PUBLIC = (PUBLIC, "8.8.8.8", "2606:4700::6810:84e5", "::ffff:8.8.8.8", "64:ff9b::808:808")


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_no_name_leads_to_a_private_address(address: str) -> None:
    assert not is_public(address)
    for answer in ([address], [PUBLIC, address], [address, PUBLIC]):
        wire = Wire()
        for call in CALLS.values():
            assert address not in refusal(call(fetcher(wire, Names(answer)), GOOD))
        assert not wire.dialled


@pytest.mark.parametrize("address", ARE_PUBLIC)
def test_the_judged_address_is_the_dialled_one(address: str) -> None:
    wire, names = Wire(), Names([address], ["127.0.0.1"])  # the second answer is never asked for
    assert run(fetcher(wire, names).get(f"https://{NAME}/é.png?q=1#x", "x")) == b"image"
    (request,) = wire.dialled
    assert request.url.host == address
    assert request.url.raw_path == b"/%C3%A9.png?q=1"
    assert request.headers["host"] == NAME
    assert request.extensions["sni_hostname"] == NAME
    assert set(request.headers) == {"host", "accept-encoding", "user-agent"}
    assert names.asked == [NAME]


def test_off_unless_hosts_are_listed() -> None:
    wire = Wire()
    assert "calls no URLs" in refusal(fetcher(wire, hosts=()).get(GOOD, "x"))
    for url in (GOOD, "https://example.com/", f"https://evil{NAME}/", f"https://a.{NAME}/"):
        refusal(fetcher(wire, hosts=("other.org", "images.org")).get(url, "x"))
    below = fetcher(wire, hosts=("*.Example.com",))
    refusal(below.get("https://example.com/", "x"))
    assert not wire.dialled
    run(below.get(GOOD, "x"))
    run(fetcher(wire, hosts=(NAME,), ports=(443, 8443)).get(f"https://{NAME}:8443/", "x"))
    assert wire.dialled[1].headers["host"] == f"{NAME}:8443"
    good = ("*", NAME, "*.example.com", "Example.COM")
    assert [is_host_pattern(x) for x in good] == [True] * 4
    bad = ("", "*.*", "*.", "127.0.0.1", f"https://{NAME}", f"{NAME}:443", "*example.com", "[::1]")
    assert [is_host_pattern(x) for x in bad] == [False] * 8
    for name in ("url_hosts", "send_hosts"):
        with pytest.raises(RequestError, match=r"'10\.0\.0\.1' is no host"):
            ServeSettings(**{name: (NAME, "10.0.0.1")})


def to(location: str, status: int = 302) -> httpx.Response:
    return httpx.Response(status, headers={"location": location})


# fmt: off
LOCATIONS = [
    f"http://{NAME}/", "https://127.0.0.1/", "https://[::1]/", "//localhost/", "file:///etc/passwd",
    "https://other.org/", f"https://u:p@{NAME}/", f"//{NAME}:22/", "https://[",
    "https://a\x00b.com/",
]
# fmt: on


@pytest.mark.parametrize("location", LOCATIONS)
def test_a_redirect_is_a_url_like_any_other(location: str) -> None:
    wire = Wire(to(location))
    refusal(fetcher(wire, hosts=(NAME,)).get(GOOD, "x"))
    assert len(wire.dialled) == 1


def test_redirects() -> None:
    wire = Wire(to("/b"), to("c", 307), to(f"https://{NAME}/d", 308))
    assert run(fetcher(wire).get(GOOD, "x")) == b"image"
    assert [str(x.url.raw_path, "ascii") for x in wire.dialled] == ["/a.png", "/b", "/c", "/d"]
    wire = Wire(*[to("/b") for _ in range(9)])
    assert "more than 3 times" in refusal(fetcher(wire).get(GOOD, "x"))
    assert len(wire.dialled) == 4
    wire = Wire(to("/b"))  # the name is another's by then
    refusal(fetcher(wire, Names([PUBLIC], ["10.0.0.1"])).get(GOOD, "x"))
    assert len(wire.dialled) == 1
    for call in ("post", "put"):
        wire = Wire(to("/b", 307))
        refusal(CALLS[call](fetcher(wire), GOOD))
        assert len(wire.dialled) == 1


def test_the_system_is_asked_for_addresses_and_they_are_judged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def answer(host: str, port: int, *_: Any) -> list[Any]:
        asked.append(host)
        return [(2, 1, 6, "", (address, port)) for address in (PUBLIC, PUBLIC, "10.0.0.1")]

    monkeypatch.setattr("socket.getaddrinfo", answer)
    wire = Wire()
    assert "may not call" in refusal(Fetcher(("*",), transport=wire).get(GOOD, "x"))
    assert (asked, wire.dialled) == ([NAME], [])


def test_a_silent_address_is_not_the_last_one() -> None:
    silent = httpx.ConnectError("10.9.8.7 refused")
    wire = Wire(silent, httpx.ConnectTimeout(""))
    names = Names(["8.8.8.8", "8.8.4.4", PUBLIC])
    assert run(fetcher(wire, names).get(GOOD, "x")) == b"image"
    assert [x.url.host for x in wire.dialled] == ["8.8.8.8", "8.8.4.4", PUBLIC]
    wire = Wire(silent, silent, silent, silent)
    assert "10.9" not in refusal(fetcher(wire, Names([PUBLIC] * 9)).get(GOOD, "x"))
    assert len(wire.dialled) == 3
    assert "may not call" in refusal(fetcher(wire, Names([])).get(GOOD, "x"))


class Endless(httpx.AsyncByteStream):
    """Sends for ever, and counts."""

    def __init__(self, pause_s: float) -> None:
        self.pause_s, self.sent, self.closed = pause_s, 0, False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            self.sent += 1000
            await asyncio.sleep(self.pause_s)
            yield bytes(1000)

    async def aclose(self) -> None:
        self.closed = True


def test_size_and_time_have_an_end() -> None:
    flood, drip = Endless(0), Endless(0.05)
    wire = Wire(httpx.Response(200, stream=flood))
    assert "larger than 10000" in refusal(fetcher(wire, max_bytes=10_000).get(GOOD, "x"))
    assert flood.sent == 11_000
    begin = time.perf_counter()  # each read is in time, all of them are not
    refusal(fetcher(Wire(httpx.Response(200, stream=drip)), timeout_s=0.2).get(GOOD, "x"))
    assert time.perf_counter() - begin < 1
    assert flood.closed
    assert drip.closed
    large = httpx.Response(200, headers={"content-length": "10001"}, stream=(unread := Endless(0)))
    refusal(fetcher(Wire(large), max_bytes=10_000).get(GOOD, "x"))
    assert (unread.sent, unread.closed) == (0, True)
    bomb = httpx.Response(200, headers={"content-encoding": "gzip"}, stream=Endless(0))
    assert "compressed" in refusal(fetcher(Wire(bomb)).get(GOOD, "x"))
    for status in (204 + 100, 401, 404, 500):
        refusal(fetcher(Wire(httpx.Response(status))).get(GOOD, "x"))


def test_what_is_sent() -> None:
    wire = Wire(httpx.Response(204), httpx.Response(200), httpx.Response(500))
    run(fetcher(wire).send("POST", GOOD, b'{"a": 1}', "application/json", "x"))
    run(fetcher(wire).send("PUT", GOOD, b"pixels", "image/webp", "x"))
    post, put = wire.dialled
    assert (post.method, post.content) == ("POST", b'{"a": 1}')
    assert post.headers["content-type"] == "application/json"
    assert (put.method, put.content, put.headers["content-length"]) == ("PUT", b"pixels", "6")
    assert put.headers["content-type"] == "image/webp"
    refusal(CALLS["post"](fetcher(wire), GOOD))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for `NAME`, and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-subj", f"/CN={NAME}", "-addext"]
    command += [f"subjectAltName=DNS:{NAME}", "-out", "cert.pem", "-keyout", "key.pem"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"


class Loopback(httpx.AsyncHTTPTransport):
    """Dials this machine in place of the address that was judged."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        assert request.url.host == PUBLIC
        request.url = request.url.copy_with(host="127.0.0.1")
        return await super().handle_async_request(request)


def test_tls_is_checked_against_the_name_and_no_proxy_is_asked(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server on loopback, dialled by its address."""
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    cert, key = certificate
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    asked: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nset-cookie: a=b\r\ncontent-length: 2\r\n\r\nok")
        await writer.drain()
        writer.close()

    async def talk() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
        port = server.sockets[0].getsockname()[1]
        trust = ssl.create_default_context(cafile=str(cert))
        limits = httpx.Limits(max_keepalive_connections=0)
        wire = Loopback(verify=trust, trust_env=False, limits=limits)
        fetch = Fetcher(("*",), ports=(port,), resolve=Names(), transport=wire)
        for _ in range(2):
            assert await fetch.get(f"https://{NAME}:{port}/a", "x") == b"ok"
        with pytest.raises(ServiceError, match="did not answer"):
            await fetch.get(f"https://other.example.com:{port}/a", "x")  # not this certificate's
        await wire.aclose()
        server.close()

    run(talk())
    assert len(asked) == 2
    assert f"host: {NAME}:".encode() in asked[0].lower()
    assert b"cookie" not in asked[1]
