"""Whatever is sent, the service refuses it in words of its own; `--examples N` sends more of it."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
import websockets.sync.client
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from klein_kv.runtime.serving.api.fields import EditFields
from klein_kv.runtime.serving.runware.tasks import MODEL, ImageTask
from tests.runtime.serving.conftest import Served, png

LEAKS = re.compile(r'0x[0-9a-f]{6,}|Traceback|File "|/site-packages|(Error|Exception)\(')
QUOTED = re.compile(r""" (is|model) ('.{0,80}?'|\\?".{0,80}?\\?")( \(\d+ characters\))?[:,]""")
UUID = "50836053-a0ee-4cf5-b9d6-ae7c5d140ada"

texts = st.text(max_size=40) | st.sampled_from(
    [UUID, MODEL, "data:image/png;base64,AAAA", "https://127.0.0.1/", "http://[::1", "\ud800", "\0"]
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(2**63), 0, 16, 1024])
    | st.floats()
    | texts
)
values = st.recursive(
    scalars, lambda x: st.lists(x, max_size=5) | st.dictionaries(texts, x, max_size=4), max_leaves=8
)
PLAUSIBLE: dict[str, Any] = {
    "taskType": "imageInference",
    "taskUUID": UUID,
    "model": MODEL,
    "positivePrompt": "a kite",
    "width": 128,
    "height": 128,
    "numberResults": 2,
    "outputType": "dataURI",
    "deliveryMethod": "async",
    "ttl": 60,
    "lora": [{"model": "style", "weight": 1}],
    "inputs": {"referenceImages": ["AAAA"]},
}
fields = st.sampled_from(sorted(str(field.alias) for field in ImageTask.model_fields.values()))
changes = st.dictionaries(fields | texts, values, max_size=4)
tasks = st.builds(
    lambda kept, kind, changed: {x: PLAUSIBLE[x] for x in kept} | kind | changed,
    st.sets(st.sampled_from(sorted(PLAUSIBLE))),
    st.sampled_from(
        [
            {},
            {"taskType": "imageUpload", "image": "AAAA"},
            {"taskType": "mediaStorage", "operation": "delete", "media": UUID},
            {"taskType": "getResponse"},
            {"taskType": "ping"},
            {"taskType": "authentication"},
        ]
    ),
    changes,
)
OPENAI = [*EditFields.model_fields, "image", "images", "image[]", "url", "mask"]
IMAGES = ("/v1/images/generations", "/v1/images/edits", "/v1/references")
SMALL = {"prompt": "a kite", "size": "128x128"}


@pytest.fixture
def many(request: pytest.FixtureRequest) -> settings:
    """Other examples in every run; hypothesis prints how to repeat what failed."""
    return settings(
        max_examples=request.config.getoption("--examples"),
        derandomize=False,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture
def http(steered: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=steered.url, trust_env=False, timeout=30) as client:
        yield client


def sendable(document: Any) -> bytes:
    """JSON, with what JSON does not have: NaN, infinities, half characters."""
    return json.dumps(document).encode()


def leaks(text: str) -> bool:
    """Whether an answer says more of us than of what was sent, which is quoted."""
    return LEAKS.search(QUOTED.sub("", text)) is not None


def check_openai(answer: httpx.Response) -> None:
    assert answer.status_code < 500, answer.text
    assert not leaks(answer.text)
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert error["message"]
        assert error["type"] in ("invalid_request_error", "authentication_error")
        assert answer.headers["x-request-id"]


def check_runware(answer: dict[str, Any], sent: int | None = None) -> None:
    data, errors = answer.get("data", []), answer.get("errors", [])
    assert answer.keys() <= {"data", "errors"}
    assert len(data) + len(errors) >= 1
    if sent is not None:
        assert len(errors) <= sent
    for error in errors:
        assert error["code"] not in ("internalServerError", "unknown")
        assert error["message"]
        assert not leaks(json.dumps(error))


def test_runware_answers_every_task(many: settings, http: httpx.Client) -> None:
    @many
    @given(st.lists(tasks | values, max_size=3) | values, st.binary(max_size=8))
    def check(body: Any, rubbish: bytes) -> None:
        content = sendable(body)
        for sent in (content, content[: len(content) // 2] + rubbish):
            answer = http.post(
                "/runware/v1", content=sent, headers={"content-type": "application/json"}
            )
            assert answer.status_code < 500, answer.text
            check_runware(answer.json())

    check()


def test_a_connection_answers_every_message(many: settings, steered: Served) -> None:
    url = steered.url.replace("http", "ws") + "/runware/v1"
    with websockets.sync.client.connect(url, proxy=None) as socket:
        socket.send(json.dumps([{"taskType": "authentication", "apiKey": "any"}]))
        socket.recv(5)

        @many
        @given(tasks | values, texts)
        def check(task: Any, rubbish: str) -> None:
            for message in (sendable([task]).decode(), rubbish.encode("utf-8", "replace").decode()):
                socket.send(message)
                check_runware(json.loads(socket.recv(5)), 1)

        check()


def test_openai_routes_take_any_json(many: settings, http: httpx.Client) -> None:
    named = st.dictionaries(st.sampled_from(OPENAI) | texts, values, max_size=4)

    @many
    @given(st.sampled_from(IMAGES), named.map(lambda x: SMALL | x) | values)
    def check(path: str, body: Any) -> None:
        headers = {"content-type": "application/json"}
        check_openai(http.post(path, content=sendable(body), headers=headers))

    check()


def test_openai_routes_take_any_form(many: settings, http: httpx.Client) -> None:
    image = png(64, 64)
    plain = st.text(st.characters(codec="utf-8"), max_size=30)
    parts = st.tuples(
        st.sampled_from(OPENAI) | plain,
        st.none() | plain | st.sampled_from(["../../etc/passwd", "\0", 'a"; x="']),
        st.sampled_from([image, image[:40], b"\x89PNG\r\n\x1a\n", b"1", b"128x128", b""])
        | st.binary(),
    )
    edits = st.lists(st.tuples(st.integers(0, 2000), st.binary(max_size=3)), max_size=3)

    @many
    @given(st.sampled_from(IMAGES), st.lists(parts, max_size=6), edits, st.sampled_from(["", "x"]))
    def check(path: str, sent: Any, changed: Any, wrong: str) -> None:
        files = [(name, (file, data) if file else (None, data)) for name, file, data in sent]
        request = http.build_request("POST", path, files=[("prompt", (None, b"a kite")), *files])
        body = bytearray(request.read())
        for at, change in changed:
            body[at : at + len(change)] = change
        kind = request.headers["content-type"] + wrong
        check_openai(http.post(path, content=bytes(body), headers={"content-type": kind}))

    check()


def test_what_openapi_describes(many: settings, steered: Served) -> None:
    """Requests of its form and beside it, to every route."""
    schema = schemathesis.openapi.from_url(f"{steered.url}/openapi.json")
    routes = [found.ok() for found in schema.get_all_operations()]
    assert {route.path for route in routes} >= {"/runware/v1", *IMAGES}
    few = settings(many, max_examples=max(1, many.max_examples // 5))

    def check(case: schemathesis.Case) -> None:
        answer = case.call()
        assert answer.status_code < 500, answer.text
        assert not leaks(answer.text)

    for route in routes:
        right = route.as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE)
        wrong = route.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)
        few(given(right | wrong if route.method == "post" else right)(check))()
