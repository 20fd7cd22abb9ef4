"""Who is let in, what is refused before it is read, and what an answer never says."""

import asyncio
import base64
import io
import re
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from klein_kv.errors import RequestError
from klein_kv.runtime.serving.api.fields import EditFields, checked
from klein_kv.runtime.serving.app import make_app
from klein_kv.runtime.serving.errors import ServiceError
from klein_kv.runtime.serving.security.images_in import (
    bytes_from_base64,
    prepare_mask,
    prepare_upload,
)
from klein_kv.runtime.serving.settings import ServeSettings
from tests.runtime.serving.conftest import KEY, Served, SteeredEngine, serve_in_thread

Png = Callable[..., bytes]
LEAK = re.compile(r"0x[0-9a-f]{6,}|/(root|home|work|tmp|usr)/|\.py\b|Traceback|site-packages")


@pytest.fixture(scope="module")
def locked() -> Iterator[Served]:
    settings = ServeSettings(host="0.0.0.0", api_keys=("b" * 32, KEY))
    yield from serve_in_thread(SteeredEngine(), settings)


def test_every_route_but_public_ones_asks_for_a_key(http: httpx.Client, locked: Served) -> None:
    public: set[str] = locked.app.state.public
    assert "/health/live" in public
    routes = [
        (method.upper(), path)
        for path, methods in locked.app.openapi()["paths"].items()
        for method in methods
    ]
    assert len(routes) > 8
    routes.append(("GET", "/openapi.json"))
    for method, path in [*routes, ("GET", "/nothing"), ("POST", "/health/live/../../v1/models")]:
        if path in public or path.startswith(locked.app.state.public_below):
            continue
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {KEY}"}):
            response = http.request(method, locked.url + path, headers=headers)
            assert response.status_code == 401, path
            assert response.headers["www-authenticate"] == "Bearer"
            if method != "HEAD":
                assert response.json()["error"]["code"] == "invalid_api_key"
    for key in (KEY, "b" * 32):
        headers = {"authorization": f"bearer {key}"}
        assert http.get(f"{locked.url}/v1/models", headers=headers).status_code == 200
    assert http.get(f"{locked.url}/health/live").status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "evil.example"}, 403),  # a name that was bent to this machine
        ({"host": "evil.example:80", "origin": "http://evil.example:80"}, 403),
        ({"host": "localhost:1234", "origin": "http://localhost:1234"}, 200),
        ({"host": "[::1]:1234"}, 200),
    ],
)
def test_other_sites_pages_are_refused(
    http: httpx.Client, steered: Served, headers: dict[str, str], status: int
) -> None:
    response = http.get(f"{steered.url}/v1/models", headers=headers)
    assert response.status_code == status
    assert "access-control-allow-origin" not in response.headers
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "server" not in response.headers


def test_bodies_are_counted_whatever_they_say(http: httpx.Client, steered: Served) -> None:
    url, front = f"{steered.url}/v1/images/edits", steered.app.state.front
    headers = {"content-type": "application/json"}

    def parts() -> Iterator[bytes]:
        for _ in range(40):
            yield bytes(10_000)

    for body in (bytes(400_000), parts()):
        response = http.post(url, content=body, headers=headers)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "payload_too_large"
    gate = steered.app.middleware_stack
    while not hasattr(gate, "budget"):
        gate = gate.app
    end = time.monotonic() + 5
    while gate.budget.used and time.monotonic() < end:
        time.sleep(0.01)
    assert gate.budget.used == 0  # all of it was given back
    assert front.metrics.requests.labels("other", "413")._value.get() > 0


HEAD = (
    b"POST /v1/images/edits HTTP/1.1\r\nhost: 127.0.0.1\r\n"
    b"content-type: application/json\r\ncontent-length: 100\r\n"
)


@pytest.mark.parametrize(
    ("sent", "told"), [(HEAD + b"\r\n{", b"HTTP/1.1 408"), (HEAD, b""), (b"", b"")]
)
def test_slow_clients_are_left(steered: Served, sent: bytes, told: bytes) -> None:
    host, port = steered.url.removeprefix("http://").split(":")
    start = time.monotonic()
    with socket.create_connection((host, int(port)), timeout=10) as slow:
        slow.sendall(sent)
        answer = slow.recv(4096)
    assert answer[:12] == told
    assert 0.9 < time.monotonic() - start < 5


def test_a_client_that_goes_while_it_sends_is_no_error(
    steered: Served, caplog: pytest.LogCaptureFixture
) -> None:
    host, port = steered.url.removeprefix("http://").split(":")
    gone = steered.app.state.front.metrics.requests.labels("/v1/images/edits", "499")._value
    before, end = gone.get(), time.monotonic() + 5
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(HEAD + b"\r\n{")
    while gone.get() == before and time.monotonic() < end:
        time.sleep(0.01)
    assert gone.get() == before + 1
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_more_requests_than_it_takes_at_a_time(steered: Served) -> None:
    async def wait() -> None:
        await asyncio.sleep(0.5)

    async def ask() -> list[httpx.Response]:
        url = f"{steered.url}/v1/images/generations"
        async with httpx.AsyncClient(timeout=20) as client:
            ask = {"prompt": "a", "size": "128x128"}
            requests = [client.post(url, json=ask) for _ in range(12)]
            return list(await asyncio.gather(*requests))

    steered.engine.act = wait
    answers = asyncio.run(ask())
    assert sorted({answer.status_code for answer in answers}) == [200, 429]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) == 4
    assert refused[0].json()["error"]["code"] == "queue_full"
    assert refused[0].headers["retry-after"] == "1"


def test_strangers_take_no_place_from_who_has_a_key(http: httpx.Client) -> None:
    """They wait to be told that they have none, with half a request sent."""
    settings = ServeSettings(api_keys=(KEY,), max_connections=4)
    for served in serve_in_thread(SteeredEngine(), settings):
        host, port = served.url.removeprefix("http://").split(":")
        start = time.monotonic()
        strangers = [socket.create_connection((host, int(port)), timeout=20) for _ in range(6)]
        for stranger in strangers:
            stranger.sendall(HEAD + b"\r\n{")
        headers = {"authorization": f"Bearer {KEY}"}
        ask = {"prompt": "a", "size": "128x128"}
        url = f"{served.url}/v1/images/generations"
        assert http.post(url, json=ask, headers=headers).status_code == 200
        assert time.monotonic() - start < 4
        for stranger in strangers:  # 60 s are for those who may send
            assert stranger.recv(4096)[:12] == b"HTTP/1.1 401"
            stranger.close()
        assert 4 < time.monotonic() - start < 12


def test_forms_in_utf_8_alone(http: httpx.Client, steered: Served) -> None:
    """Decoding this as punycode would stop the service for minutes."""
    body = b'--x\r\ncontent-disposition: form-data; name="prompt"\r\n\r\n-%b\r\n--x--' % (
        b"b" * 250_000
    )
    for charset, code in (("punycode", "invalid_body"), ("UTF-8", "missing_required_parameter")):
        headers = {"content-type": f"multipart/form-data; boundary=x; charset={charset}"}
        answer = http.post(f"{steered.url}/v1/images/edits", content=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)


@pytest.mark.parametrize(
    "text",
    [
        '{"prompt": [' + "[]," * 50_000 + "[]]}",
        "{" + ",".join(f'"{i}":0' for i in range(65)) + "}",
        "[" * 50_000,
        "NaN",
    ],
)
def test_json_is_weighed_before_it_is_parsed(
    http: httpx.Client, steered: Served, text: str
) -> None:
    for path, told in (("/v1/images/edits", "invalid_body"), ("/runware/v1", "invalidRequest")):
        headers = {"content-type": "application/json"}
        answer = http.post(steered.url + path, content=text, headers=headers)
        assert answer.status_code == 400
        error = answer.json().get("error") or answer.json()["errors"][0]
        assert error["code"] == told


@pytest.mark.parametrize("lora", ["a," * 600, ["a"] * 10_000, [[["a"]]], 3])
def test_loras_are_counted_before_they_are_read(lora: Any) -> None:
    with pytest.raises(ServiceError) as refused:
        checked(EditFields, {"prompt": "a", "lora": lora})
    assert (refused.value.code, refused.value.param) == ("invalid_value", "lora")


def bomb(side: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (side, side)).save(file, "PNG")
    return file.getvalue()


def saved(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        saved(Image.new("RGB", (64, 64)), "GIF"),  # another format than those three
        saved(Image.new("RGB", (64, 64)), "TIFF"),
        saved(Image.effect_noise((64, 64), 50), "PNG")[:700],
        saved(Image.effect_noise((64, 64), 50), "JPEG")[:700],
        bomb(600),  # above max_pixels
        bomb(10_000),  # above PIL's own warning
        bomb(15_000),  # above PIL's own limit
        saved(Image.new("RGB", (63, 64)), "PNG"),
        saved(Image.new("RGB", (64, 576)), "PNG"),
    ],
)
def test_bad_images_are_refused_in_words_of_ours(data: bytes) -> None:
    with pytest.raises(ServiceError) as refused:
        prepare_upload(data, 512 * 512, 16, "white")
    assert refused.value.code == "invalid_image"
    assert not LEAK.search(refused.value.message)


def intricate(kind: str) -> bytes:
    """A small file that takes a decoder long, and long memory, in proportion to its size."""
    if kind == "chunks":
        png = saved(Image.new("RGB", (64, 64)), "PNG")
        return png[:33] + b"\0\0\0\0teSt\xa5\x81\x1e\xf7" * 5_000 + png[33:]
    file = io.BytesIO()
    Image.new("L", (2048, 2048), 128).save(file, "JPEG", progressive=True)
    jpeg = file.getvalue()
    if kind == "scans":
        return jpeg[:-2] + jpeg[jpeg.rindex(b"\xff\xda") : -2] * 100 + jpeg[-2:]
    more = {"segments": b"\xff\xe1\0\2", "junk": b"x", "fill": b"\xff", "ends": b"\xff\xd9"}
    hidden = b"\xff\xf0\xff\xff" if kind == "segments" else b""  # a marker without a length
    return jpeg[:2] + hidden + more[kind] * 5_000 + jpeg[2:]


@pytest.mark.parametrize("kind", ["chunks", "scans", "segments", "junk", "fill", "ends"])
def test_intricate_files_are_refused_before_they_are_decoded(kind: str) -> None:
    with pytest.raises(ServiceError, match="more parts than encoders write"):
        prepare_upload(intricate(kind), 4096 * 4096, 16, "white")


def test_large_photographs_are_not_intricate() -> None:
    """Noise, a profile of many segments, an EXIF thumbnail, and a film behind the image."""
    noise = Image.effect_noise((2000, 1500), 90).convert("RGB")
    film = np.random.default_rng(0).bytes(4 << 20)
    for options in ({}, {"progressive": True}, {"restart_marker_blocks": 1}):
        file = io.BytesIO()
        noise.save(file, "JPEG", quality=97, icc_profile=film[:1_000_000], **options)
        assert prepare_upload(file.getvalue() + film, 4096 * 4096, 16, "white").size
    for kind in ("PNG", "WEBP"):
        assert prepare_upload(saved(noise, kind), 4096 * 4096, 16, "white").size


def test_an_upload_is_turned_upright(png: Png) -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(io.BytesIO(png(128, 64))).save(file, "JPEG", exif=exif)
    assert prepare_upload(file.getvalue(), 10**6, 16, "white").shape == (128, 64, 3)


def test_a_mask_is_what_is_transparent_or_white() -> None:
    white = Image.new("L", (64, 80))
    white.paste(255, (0, 0, 32, 80))
    hole = Image.new("RGBA", (64, 80), (9, 9, 9, 255))
    hole.paste((9, 9, 9, 0), (0, 0, 32, 80))
    solid = Image.merge("RGBA", [white] * 3 + [Image.new("L", (64, 80), 255)])
    masks = [prepare_mask(saved(x, "PNG"), 10**6, 16, (80, 64)) for x in (white, hole, solid)]
    for mask in masks:
        assert mask.shape == (80, 64)
        assert (mask[:, :32] == 255).all()
        assert not mask[:, 32:].any()
    for image in (Image.new("L", (64, 64), 255), Image.new("L", (64, 80))):
        with pytest.raises(ServiceError) as refused:
            prepare_mask(saved(image, "PNG"), 10**6, 16, (80, 64))
        assert (refused.value.code, refused.value.param) == ("invalid_value", "mask")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("data:image/png,abc", "invalid_image"),
        ("data:image/png;base64", "invalid_image"),
        ("data:image/png;base64,a*c=", "invalid_image"),
        ("é", "invalid_image"),
        ("QUJD" * 100, "payload_too_large"),
    ],
)
def test_base64_is_checked_before_it_is_decoded(text: str, code: str) -> None:
    with pytest.raises(ServiceError) as refused:
        bytes_from_base64(text, 100, "image")
    assert refused.value.code == code
    assert bytes_from_base64("data:;base64,QUJD", 3, "image") == b"ABC"


def test_answers_say_nothing_of_the_inside(http: httpx.Client, steered: Served, png: Png) -> None:
    """Every kind of refusal, over everything that a body can be made of."""

    async def fail() -> None:
        raise OSError(2, "no such file", "/root/secret/at/0x7f0012345678.py")

    steered.engine.act = fail
    good, url = png(64, 64), f"{steered.url}/v1/images/edits"
    uri = "data:image/png;base64," + base64.b64encode(good[:100]).decode()
    bodies: list[dict[str, Any]] = [
        {"files": {"image": good}, "data": {"prompt": "a"}},
        {"files": {"image": ("/etc/passwd", good[:200])}, "data": {"prompt": "a"}},
        {"files": {"image": ("../../x.py", b"\0" * 99)}, "data": {"prompt": "a"}},
        {"files": {"mask": good, "image": good}, "data": {"prompt": "a"}},
        {"json": {"prompt": "a", "image": uri}},
        {"json": {"prompt": {"a": 1}, "image": uri}},
        {"json": {"prompt": "a", "image": [[]]}},
        {"json": {"prompt": "a", "image": "file:///etc/passwd"}},
        {"json": {"prompt": "a", "image": "/etc/passwd"}},
        {"json": {"prompt": "a", "references": [{"a": 1}]}},
        {"json": {"prompt": "a", "references": ["../../x"]}},
        {"json": {"prompt": "a", "lora": "/root/x.safetensors", "image": uri}},
        {"json": {"prompt": "a", "n": 10**400}},
        {"content": b"\xff\xfe", "headers": {"content-type": "application/json"}},
        {"content": b"x", "headers": {"content-type": b"multipart/form-data; boundary=\xff"}},
        {"content": b"x", "headers": {"content-type": "text/plain"}},
    ]
    for body in bodies:
        response = http.post(url, **body)
        assert response.status_code >= 400
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert not LEAK.search(response.text), response.text
    for method, path in (("GET", "/etc/passwd"), ("PUT", "/v1/models"), ("GET", "/v1/models/%00")):
        response = http.request(method, steered.url + path)
        assert response.json()["error"]["type"] == "invalid_request_error"
        assert not LEAK.search(response.text)


@pytest.mark.parametrize(
    "changes",
    [
        {"host": "0.0.0.0"},
        {"host": "::"},
        {"host": "example.com"},
        {"api_keys": ("short",)},
        {"api_keys": ("é" * 20,)},
        {"port": 65536},
        {"threads": 0},
        {"url_hosts": ("https://example.com",)},
    ],
)
def test_settings_that_are_unsafe_or_wrong(changes: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"expected|give one|shorter"):
        ServeSettings(**changes)


def test_settings_that_are_safe() -> None:
    for host in ("127.0.0.1", "::1", "[::1]", "localhost", "127.8.8.8"):
        ServeSettings(host=host)
    ServeSettings(host="0.0.0.0", open_to_all=True)
    assert make_app(SteeredEngine(), ServeSettings()).docs_url is None
