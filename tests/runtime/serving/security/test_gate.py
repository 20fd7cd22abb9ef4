"""Who is let in, what is refused before it is read, and what an answer never says."""

import asyncio
import io
import re
import socket
import time
from collections.abc import Iterator
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
from tests.runtime.serving.conftest import (
    KEY,
    Served,
    SteeredEngine,
    base64_of,
    file_of,
    png,
    serve_in_thread,
    until,
)

LEAK = re.compile(r"0x[0-9a-f]{6,}|/(root|home|work|tmp|usr)/|\.py\b|Traceback|site-packages")
EDITS = "/v1/images/edits"
JSON = {"content-type": "application/json"}


def connected(served: Served, sent: bytes) -> socket.socket:
    host, port = served.url.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)), timeout=20)
    client.sendall(sent)
    return client


@pytest.fixture(scope="module")
def locked() -> Iterator[Served]:
    settings = ServeSettings(host="0.0.0.0", api_keys=("b" * 32, KEY))
    yield from serve_in_thread(SteeredEngine(), settings)


def test_every_route_but_public_ones_asks_for_a_key(http: httpx.Client, locked: Served) -> None:
    public: set[str] = locked.app.state.public
    assert "/health/live" in public
    described = locked.app.openapi()["paths"]
    routes = [(method.upper(), path) for path, methods in described.items() for method in methods]
    assert len(routes) > 8
    routes += [("GET", "/openapi.json"), ("GET", "/nothing")]
    routes.append(("POST", "/health/live/../../v1/models"))
    for method, path in routes:
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
    for body in (bytes(400_000), (bytes(10_000) for _ in range(40))):
        response = http.post(steered.url + EDITS, content=body, headers=JSON)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "payload_too_large"
    gate = steered.app.middleware_stack
    while not hasattr(gate, "budget"):
        gate = gate.app
    until(lambda: gate.budget.used == 0)  # all of it was given back
    text = http.get(f"{steered.url}/metrics").text
    assert 'klein_kv_requests_total{code="413",route="other"} ' in text


HEAD = (
    b"POST /v1/images/edits HTTP/1.1\r\nhost: 127.0.0.1\r\n"
    b"content-type: application/json\r\ncontent-length: 100\r\n"
)


@pytest.mark.parametrize(
    ("sent", "told"), [(HEAD + b"\r\n{", b"HTTP/1.1 408"), (HEAD, b""), (b"", b"")]
)
def test_slow_clients_are_left(steered: Served, sent: bytes, told: bytes) -> None:
    start = time.monotonic()
    with connected(steered, sent) as slow:
        answer = slow.recv(4096)
    assert answer[:12] == told
    assert 0.9 < time.monotonic() - start < 5


def test_a_client_that_goes_while_it_sends_is_no_error(
    steered: Served, caplog: pytest.LogCaptureFixture
) -> None:
    gone = steered.app.state.front.metrics.requests.labels(EDITS, "499")._value
    before = gone.get()
    connected(steered, HEAD + b"\r\n{").close()
    until(lambda: gone.get() == before + 1)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_more_requests_than_it_takes_at_a_time(steered: Served) -> None:
    async def ask() -> list[httpx.Response]:
        url = f"{steered.url}/v1/images/generations"
        async with httpx.AsyncClient(timeout=20) as client:
            ask = {"prompt": "a", "size": "128x128"}
            requests = [client.post(url, json=ask) for _ in range(12)]
            return list(await asyncio.gather(*requests))

    steered.engine.act = lambda: asyncio.sleep(0.5)
    answers = asyncio.run(ask())
    assert sorted(answer.status_code for answer in answers) == [200] * 8 + [429] * 4
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.json()["error"]["code"] == "queue_full"
    assert refused.headers["retry-after"] == "1"


def test_strangers_take_no_place_from_who_has_a_key(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait to be told that they have none, with half a request sent."""
    monkeypatch.setattr("klein_kv.runtime.serving.app._STRANGERS_S", 2.0)
    settings = ServeSettings(api_keys=(KEY,), max_connections=4)
    for served in serve_in_thread(SteeredEngine(), settings):
        start = time.monotonic()
        strangers = [connected(served, HEAD + b"\r\n{") for _ in range(6)]
        headers = {"authorization": f"Bearer {KEY}"}
        ask = {"prompt": "a", "size": "128x128"}
        url = f"{served.url}/v1/images/generations"
        assert http.post(url, json=ask, headers=headers).status_code == 200
        assert time.monotonic() - start < 1.9
        for stranger in strangers:  # 60 s are for those who may send
            assert stranger.recv(4096)[:12] == b"HTTP/1.1 401"
            stranger.close()
        assert 1.9 < time.monotonic() - start < 12


def test_forms_in_utf_8_alone(http: httpx.Client, steered: Served) -> None:
    """Decoding this as punycode would stop the service for minutes."""
    body = b'--x\r\ncontent-disposition: form-data; name="prompt"\r\n\r\n-%b\r\n--x--' % (
        b"b" * 250_000
    )
    for charset, code in (("punycode", "invalid_body"), ("UTF-8", "missing_required_parameter")):
        headers = {"content-type": f"multipart/form-data; boundary=x; charset={charset}"}
        answer = http.post(steered.url + EDITS, content=body, headers=headers)
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
    for path, told in ((EDITS, "invalid_body"), ("/runware/v1", "invalidRequest")):
        answer = http.post(steered.url + path, content=text, headers=JSON)
        assert answer.status_code == 400
        error = answer.json().get("error") or answer.json()["errors"][0]
        assert error["code"] == told


@pytest.mark.parametrize("lora", ["a," * 600, ["a"] * 10_000, [[["a"]]], 3])
def test_loras_are_counted_before_they_are_read(lora: Any) -> None:
    with pytest.raises(ServiceError) as refused:
        checked(EditFields, {"prompt": "a", "lora": lora})
    assert (refused.value.code, refused.value.param) == ("invalid_value", "lora")


def blank(width: int, height: int, kind: str = "PNG", mode: str = "L") -> bytes:
    return file_of(Image.new(mode, (width, height)), kind)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        blank(64, 64, "GIF"),  # another format than those three
        blank(64, 64, "TIFF"),
        file_of(Image.effect_noise((64, 64), 50))[:700],
        file_of(Image.effect_noise((64, 64), 50), "JPEG")[:700],
        blank(600, 600),  # above max_pixels
        blank(10_000, 10_000, mode="1"),  # above PIL's own warning
        blank(15_000, 15_000, mode="1"),  # above PIL's own limit
        blank(63, 64),
        blank(64, 576),
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
        png = blank(64, 64)
        return png[:33] + b"\0\0\0\0teSt\xa5\x81\x1e\xf7" * 5_000 + png[33:]
    jpeg = file_of(Image.new("L", (2048, 2048), 128), "JPEG", progressive=True)
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
    noise = Image.effect_noise((1000, 750), 90).convert("RGB")
    film = np.random.default_rng(0).bytes(4 << 20)
    jpegs: list[dict[str, Any]] = [{}, {"progressive": True}, {"restart_marker_blocks": 1}]
    profile = film[:1_000_000]
    files = [file_of(noise, "JPEG", quality=97, icc_profile=profile, **x) + film for x in jpegs]
    for data in (*files, file_of(noise), file_of(noise, "WEBP")):
        assert prepare_upload(data, 4096 * 4096, 16, "white").size


def test_an_upload_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = file_of(Image.open(io.BytesIO(png(128, 64))), "JPEG", exif=exif)
    assert prepare_upload(turned, 10**6, 16, "white").shape == (128, 64, 3)


def test_a_mask_is_what_is_transparent_or_white() -> None:
    white = Image.new("L", (64, 80))
    white.paste(255, (0, 0, 32, 80))
    hole = Image.new("RGBA", (64, 80), (9, 9, 9, 255))
    hole.paste((9, 9, 9, 0), (0, 0, 32, 80))
    solid = Image.merge("RGBA", [white] * 3 + [Image.new("L", (64, 80), 255)])
    for image in (white, hole, solid):
        mask = prepare_mask(file_of(image), 10**6, 16, (80, 64))
        assert mask.shape == (80, 64)
        assert (mask[:, :32] == 255).all()
        assert not mask[:, 32:].any()
    for image in (Image.new("L", (64, 64), 255), Image.new("L", (64, 80))):
        with pytest.raises(ServiceError) as refused:
            prepare_mask(file_of(image), 10**6, 16, (80, 64))
        assert (refused.value.code, refused.value.param) == ("invalid_value", "mask")


def test_base64_is_checked_before_it_is_decoded() -> None:
    for text, code in (
        ("data:image/png,abc", "invalid_image"),
        ("data:image/png;base64", "invalid_image"),
        ("data:image/png;base64,a*c=", "invalid_image"),
        ("é", "invalid_image"),
        ("QUJD" * 100, "payload_too_large"),
    ):
        with pytest.raises(ServiceError) as refused:
            bytes_from_base64(text, 100, "image")
        assert refused.value.code == code
    assert bytes_from_base64("data:;base64,QUJD", 3, "image") == b"ABC"


GOOD, ASK = png(64, 64), {"prompt": "a"}
URI = "data:image/png;base64," + base64_of(GOOD)
FORM = {"content-type": b"multipart/form-data; boundary=\xff"}
BEYOND = "unsupported_parameter"
REFUSED: list[tuple[dict[str, Any], str, str | None]] = [
    ({"data": ASK}, "invalid_body", None),  # no form that is read here
    ({"content": b"x", "headers": {"content-type": "text/plain"}}, "invalid_body", None),
    ({"content": b"x", "headers": FORM}, "invalid_body", None),
    (
        {"content": b"--x\r\n", "headers": {"content-type": "multipart/form-data"}},
        "invalid_body",
        None,
    ),
    ({"content": b"\xff\xfe", "headers": JSON}, "invalid_body", None),
    ({"content": b"[" * 100_000}, "invalid_body", None),
    ({"content": b'{"prompt": NaN}'}, "invalid_body", None),  # Python's, not JSON's
    ({"json": [1]}, "invalid_body", None),
    ({"json": ASK}, "missing_required_parameter", "image"),
    ({"files": {"image": GOOD}}, "missing_required_parameter", "prompt"),
    ({"json": ASK | {"references": "0" * 64}}, "reference_not_found", "references"),
    ({"json": ASK | {"references": ["../../x"]}}, "reference_not_found", "references"),
    ({"json": ASK | {"references": [{"a": 1}]}}, "invalid_value", "references"),
    ({"json": ASK | {"references": "0" * 64, "image": URI}}, "invalid_value", "references"),
    ({"json": ASK | {"image": "data:,x"}}, "invalid_image", "image"),
    ({"json": ASK | {"image": URI[:100]}}, "invalid_image", "image"),
    ({"json": ASK | {"image": "file:///etc/passwd"}}, "invalid_image", "image"),
    ({"json": ASK | {"image": "/etc/passwd"}}, "invalid_image", "image"),
    ({"json": ASK | {"image": [URI] * 5}}, "invalid_value", "image"),
    ({"json": ASK | {"image": [[]]}}, "invalid_value", "image"),
    ({"json": ASK | {"image": {"file_id": "f"}}}, BEYOND, "image"),
    ({"json": ASK | {"image": "http://127.0.0.1/"}}, "url_refused", "image"),
    ({"json": ASK | {"image": URI, "prompt": {"a": 1}}}, "invalid_value", "prompt"),
    ({"json": ASK | {"image": URI, "prompt": "a" * 32_001}}, "invalid_value", "prompt"),
    ({"json": ASK | {"image": URI, "lora": "/root/x.safetensors"}}, "invalid_value", "lora"),
    ({"json": ASK | {"image": URI, "lora": "style:9"}}, "invalid_value", "lora"),
    ({"json": ASK | {"image": URI, "n": 10**400}}, "invalid_value", "n"),
    ({"json": ASK | {"image": URI, "n": 11}}, "invalid_value", "n"),
    ({"json": ASK | {"image": URI, "seed": -1}}, "invalid_value", "seed"),
    ({"json": ASK | {"image": URI, "size": "100x100"}}, "invalid_value", "size"),
    ({"json": ASK | {"image": URI, "size": "wide"}}, "invalid_value", "size"),
    ({"json": ASK | {"image": URI, "prompt": ""}}, "invalid_value", "prompt"),
    ({"json": ASK | {"image": URI, "response_format": "url"}}, BEYOND, "response_format"),
    ({"json": ASK | {"image": URI, "background": "transparent"}}, BEYOND, "background"),
    ({"json": ASK | {"image": URI, "n": 2, "stream": True}}, "invalid_value", "n"),
    ({"json": ASK | {"image": URI, "partial_images": 1}}, "invalid_value", "partial_images"),
    ({"json": ASK | {"image": URI, "strength": 0.5}}, "invalid_value", "strength"),
    ({"json": ASK | {"image": URI, "mask": URI, "size": "1040x1024"}}, "invalid_value", "size"),
    ({"files": {"image": b"GIF89a"}, "data": ASK}, "invalid_image", "image"),
    ({"files": {"image": ("/etc/passwd", GOOD[:200])}, "data": ASK}, "invalid_image", "image"),
    ({"files": {"image": ("../../x.py", b"\0" * 99)}, "data": ASK}, "invalid_image", "image"),
    ({"files": {"picture": b"x"}, "data": ASK}, "unknown_parameter", "picture"),
    ({"files": [("prompt", (None, "a"))] * 2}, "invalid_value", "prompt"),
    ({"files": {"image": GOOD}, "data": ASK}, "internal_error", None),  # of the engine: see below
]


def test_refusals_say_what_is_wrong_and_nothing_of_the_inside(
    http: httpx.Client, steered: Served
) -> None:
    async def fail() -> None:
        raise OSError(2, "no such file", "/root/secret/at/0x7f0012345678.py")

    steered.engine.act = fail
    for body, code, param in REFUSED:
        response = http.post(steered.url + EDITS, **body)
        error = response.json()["error"]
        assert (error["code"], error["param"]) == (code, param), body
        assert set(error) == {"message", "type", "param", "code"}
        assert response.headers["x-should-retry"] == "false"
        assert not LEAK.search(response.text), response.text
    assert len(steered.engine.jobs) == 1
    for method, path, status in (
        ("GET", "/etc/passwd", 404),
        ("PUT", "/v1/models", 405),
        ("GET", "/v1/models/%00", 404),
    ):
        response = http.request(method, steered.url + path)
        assert response.status_code == status
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
        {"timeout_s": float("nan")},
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
    assert make_app(SteeredEngine(), ServeSettings(shelf_bytes=0)).docs_url is None
