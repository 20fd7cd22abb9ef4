"""Runware's own client, and what it does not show: limits, keys, other people's images."""

import asyncio
import base64
import io
import json
import uuid
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event
from typing import Any

import httpx
import numpy as np
import pytest
import websockets
from PIL import Image
from runware import Runware, RunwareError

from klein_kv.runtime.serving.errors import ServiceError
from klein_kv.runtime.serving.jobs import EditJob, EditResult, Engine, Job, OnPreview, Result
from klein_kv.runtime.serving.runware import service
from klein_kv.runtime.serving.security.fetch import Fetcher
from klein_kv.runtime.serving.settings import ServeSettings
from tests.runtime.serving.conftest import (
    KEY,
    Served,
    SteeredEngine,
    base64_of,
    file_of,
    pixels,
    png,
    serve_in_thread,
    until,
)

KEYS = (KEY, "another key of the tests, long enough")
PLAIN = {
    "taskType": "imageInference",
    "model": "runware:400@6",
    "positivePrompt": "a red kite",
    "width": 128,
    "height": 128,
    "seed": 7,
    "outputFormat": "PNG",
}


class PaintingEngine(SteeredEngine):
    """Red is the seed, green that of the first reference, blue the steps."""

    async def do(self, job: Job, on_preview: OnPreview | None = None) -> Result:
        result = await super().do(job)
        assert isinstance(job, EditJob)
        assert isinstance(result, EditResult)
        level = int(job.references[0][0, 0, 1]) if job.references else 0
        images = [
            Image.new("RGB", image.size, ((job.seed + i) % 256, level, job.steps))
            for i, image in enumerate(result.images)
        ]
        return EditResult(tuple(images), references_known=False)


Work = Callable[[Runware], Coroutine[Any, Any, Any]]


@dataclass
class Server:
    """A service, its engine, and a client that has no key."""

    url: str
    engine: Any
    http: httpx.Client

    @property
    def runware(self) -> str:
        return f"{self.url}/runware/v1"

    @property
    def socket(self) -> str:
        return self.runware.replace("http", "ws")

    def get(self, url: str) -> httpx.Response:
        return self.http.get(url)

    def post(self, tasks: Any, key: str | None = KEYS[0], kind: str = "json") -> httpx.Response:
        """Sends tasks, or whatever bytes."""
        headers = {"content-type": f"application/{kind}"}
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        content = tasks if isinstance(tasks, bytes) else json.dumps(tasks)
        return self.http.post(self.runware, content=content, headers=headers)

    def error(self, task: Any, key: str | None = KEYS[0]) -> dict[str, Any]:
        """Of a task that is refused."""
        error: dict[str, Any]
        (error,) = self.post([task], key).json()["errors"]
        return error

    def run(self, transport: str, work: Work, key: str = KEYS[0]) -> Any:
        """What Runware's client makes of it."""

        async def main() -> Any:
            options: dict[str, Any] = {"api_key": key, "transport": transport, "max_retries": 0}
            options |= {"http_base_url": self.runware, "ws_base_url": self.socket}
            async with Runware(**options) as client:
                return await work(client)

        return asyncio.run(main())

    def refusal(self, transport: str, key: str = KEYS[0], **fields: Any) -> RunwareError:
        with pytest.raises(RunwareError) as caught:
            self.run(transport, lambda c: c.run(PLAIN | fields), key)
        return caught.value

    def talk(self, *messages: Any, **options: Any) -> list[Any]:
        """One answer to each message, and what comes then: a closed connection's code, or more."""

        async def main() -> list[Any]:
            got: list[Any] = []
            async with websockets.connect(self.socket, proxy=None, **options) as socket:
                assert socket.response is not None
                assert "sec-websocket-extensions" not in socket.response.headers  # none to inflate
                try:
                    for message in messages:
                        text = isinstance(message, str | bytes)
                        await socket.send(message if text else json.dumps(message))
                        got.append(json.loads(await socket.recv()))
                    got.append(json.loads(await asyncio.wait_for(socket.recv(), 0.2)))
                except websockets.ConnectionClosed as error:
                    got.append(error.rcvd.code if error.rcvd else None)
                except TimeoutError:
                    pass
            return got

        return asyncio.run(main())


@contextmanager
def serving(engine: Engine, calls: Fetcher | None = None, **settings: Any) -> Iterator[Server]:
    with httpx.Client(trust_env=False, timeout=10) as http:
        for served in serve_in_thread(engine, ServeSettings(**settings), calls):
            yield Server(served.url, engine, http)


@pytest.fixture(params=["rest", "websocket"])
def transport(request: pytest.FixtureRequest) -> str:
    """Of Runware's client."""
    return str(request.param)


class Sink(httpx.AsyncBaseTransport):
    """A web server of the client's, which has a picture too."""

    url = "https://client.example.com/"

    def __init__(self) -> None:
        self.got: list[tuple[str, str, bytes]] = []
        self.statuses: list[int] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, stream=httpx.ByteStream(green(9)))
        self.got.append((request.method, request.headers["content-type"], request.content))
        return httpx.Response(self.statuses.pop(0) if self.statuses else 200)


SINK = Sink()


async def resolve(_host: str, _port: int) -> list[str]:
    return ["93.184.215.14"]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    limits: dict[str, Any] = {"kept_bytes": 1 << 20, "max_images": 3}
    limits |= {"max_body_bytes": 1 << 21, "max_bodies_bytes": 1 << 22}
    calls = Fetcher(("*",), resolve=resolve, transport=SINK)
    with serving(PaintingEngine(), calls, api_keys=KEYS, **limits) as server:
        yield server


@pytest.fixture
def engine(server: Server) -> PaintingEngine:
    """The server's, as if it were new."""
    vars(server.engine).update(vars(PaintingEngine()))
    engine: PaintingEngine = server.engine
    return engine


@pytest.fixture
def sink() -> Sink:
    """As if it were new."""
    SINK.__init__()  # type: ignore[misc]
    return SINK


def green(level: int, side: int = 64) -> bytes:
    return file_of(Image.new("RGB", (side, side), (0, level, 0)))


def pixel(data: bytes) -> Any:
    with Image.open(io.BytesIO(data)) as image:
        return image.getpixel((0, 0))


def failing(*errors: Exception) -> Callable[[], Coroutine[Any, Any, None]]:
    """Has an engine fail so often, and then no more."""
    left = list(errors)

    async def act() -> None:
        if left:
            raise left.pop(0)

    return act


def waiting(gate: Event) -> Callable[[], Coroutine[Any, Any, None]]:
    async def act() -> None:
        while not gate.is_set():
            await asyncio.sleep(0.01)

    return act


def busy() -> ServiceError:
    return ServiceError("queue_full", "the queue is full", retry_after_s=0.01)


def new(**fields: Any) -> dict[str, Any]:
    return PLAIN | {"taskUUID": str(uuid.uuid4())} | fields


@pytest.mark.parametrize("delivery", ["sync", "async"])
def test_client_gets_images(
    server: Server, engine: PaintingEngine, transport: str, delivery: str
) -> None:
    fields = {"numberResults": 5, "deliveryMethod": delivery, "includeCost": True, "steps": 6}
    fields["lora"] = [{"model": "style", "weight": -0.5}]
    items = server.run(transport, lambda c: c.run(PLAIN | fields))
    assert [item["seed"] for item in items] == [7, 8, 9, 10, 11]
    assert {item["cost"] for item in items} == {0}
    assert len({item["imageUUID"] for item in items}) == 5
    assert [job.num_images for job in engine.jobs] == [3, 2]  # the operator's limit of a job
    assert engine.jobs[0].loras == (("style", -0.5),)
    for item in items:
        got = server.get(item["imageURL"])
        assert got.headers["content-type"] == "image/png"
        assert got.headers["x-content-type-options"] == "nosniff"
        assert pixel(got.content) == (item["seed"], 0, 6)
        with Image.open(io.BytesIO(got.content)) as image:
            assert "a red kite" in image.info["parameters"]
            assert image.size == (128, 128)


def test_client_polls_for_what_takes_longer(
    server: Server, engine: PaintingEngine, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_SOON_S", 0.01)
    engine.act = lambda: asyncio.sleep(0.2)
    (item,) = server.run(transport, lambda c: c.run(PLAIN | {"outputType": "base64Data"}))
    assert item["status"] == "success"
    assert pixel(base64.b64decode(item["imageBase64Data"])) == (7, 0, 4)


@pytest.mark.parametrize(("kind", "name"), [("JPG", "jpeg"), ("PNG", "png"), ("WEBP", "webp")])
def test_formats(server: Server, kind: str, name: str) -> None:
    tasks = [new(outputFormat=kind, outputType="dataURI", outputQuality=q) for q in (20, 99)]
    first, second = server.post(tasks).json()["data"]
    head, _, data = first["imageDataURI"].partition(",")
    assert head == f"data:image/{name};base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.format == name.upper()
    if kind == "JPG":
        assert len(second["imageDataURI"]) != len(first["imageDataURI"])


def test_uploads_are_references(server: Server, engine: PaintingEngine, transport: str) -> None:
    data = base64_of(green(200))

    async def work(c: Runware) -> Any:
        (upload,) = await c.image_upload({"image": data})
        (media,) = await c.media_storage({"operation": "upload", "media": data})
        uri, name = f"data:image/png;base64,{data}", media["mediaUUID"]
        images = [upload["imageUUID"], upload["imageURL"], name, uri]
        task = {k: v for k, v in PLAIN.items() if k not in ("width", "height")}
        (first,) = await c.run(task | {"inputs": {"referenceImages": images}})
        (again,) = await c.run(PLAIN | {"referenceImages": [first["imageUUID"]]})
        await c.media_storage({"operation": "delete", "media": name})
        with pytest.raises(RunwareError) as caught:
            await c.run(PLAIN | {"referenceImages": [name]})
        return upload, again, caught.value

    upload, again, gone = server.run(transport, work)
    assert pixel(server.get(upload["imageURL"]).content) == (0, 200, 0)
    assert pixel(server.get(again["imageURL"]).content) == (7, 200, 4)
    assert [len(job.references) for job in engine.jobs] == [4, 1]
    assert engine.jobs[0].digest != engine.jobs[1].digest
    assert (gone.code, gone.parameter) == ("notFound", "inputs.referenceImages")
    for name in (upload["imageURL"], "x"):
        task = {"taskType": "mediaStorage", "taskUUID": str(uuid.uuid4()), "operation": "delete"}
        error = server.error(task | {"media": name})
        assert (error["code"], error["parameter"]) == ("invalidParameter", "media")


@pytest.mark.parametrize(
    ("fields", "code", "parameter"),
    [
        ({"CFGScale": 4.0}, "validation", "CFGScale"),
        ({"model": "runware:100@1"}, "notFound", "model"),
        ({"referenceImages": ["!"]}, "validation", "inputs.referenceImages"),
        ({"referenceImages": [str(uuid.uuid4())]}, "notFound", "inputs.referenceImages"),
        ({"webhookURL": "https://10.0.0.1/"}, "validation", "webhookURL"),
        ({"uploadEndpoint": "file:///etc"}, "validation", "uploadEndpoint"),
    ],
)
def test_client_is_told_what_is_wrong(
    server: Server,
    engine: PaintingEngine,
    transport: str,
    fields: dict[str, Any],
    code: str,
    parameter: str,
) -> None:
    error = server.refusal(transport, **fields)
    assert (error.code, error.parameter) == (code, parameter)
    assert not engine.jobs


def test_errors_of_the_engine(server: Server, engine: PaintingEngine, transport: str) -> None:
    engine.act = failing(ServiceError("out_of_memory", "no memory"))
    assert server.refusal(transport, deliveryMethod="sync").code == "serverError"
    engine.act = failing(RuntimeError("secret at 0x7fffdeadbeef"))
    error = server.refusal(transport, deliveryMethod="async")
    assert (error.code, error.message) == ("serverError", "the task failed")
    engine.act = failing(busy())  # who asks later has the time to wait
    assert server.run(transport, lambda c: c.run(PLAIN))[0]["seed"] == 7
    engine.act = failing(busy())
    answer = server.post([new()])
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")


def test_tasks_stand_for_themselves(server: Server) -> None:
    right = new(seed=1, model="org/steered")  # the model's own name
    tasks = [right, new(seed=-1), "task", new(taskType="dance"), {"taskType": "ping"}]
    answer = server.post(tasks)
    assert answer.status_code == 200
    data, errors = answer.json()["data"], answer.json()["errors"]
    assert [item.get("seed") for item in data] == [1, None]
    assert data[1] == {"taskType": "ping", "pong": True}
    assert [error.get("parameter") for error in errors] == ["seed", None, "taskType"]
    assert errors[0]["taskUUID"] == tasks[1]["taskUUID"]
    only = server.post([new(seed=-1)])
    assert (only.status_code, set(only.json())) == (400, {"errors"})
    for body in (b"{}", b"[]", b"[" * 10_000, b"[NaN]", b"\xff", b"[1" + b"9" * 5000 + b"]"):
        assert server.post(body).json()["errors"][0]["code"] == "invalidRequest"
    assert server.post([new()], kind="x-www-form-urlencoded").status_code == 400


def test_a_task_that_is_sent_again_is_not_done_again(
    server: Server, engine: PaintingEngine
) -> None:
    task = new(deliveryMethod="async")
    first, again = (server.post([task]).json() for _ in range(2))
    assert first == again
    asked = {"taskType": "getResponse", "taskUUID": task["taskUUID"]}
    assert server.post([asked]).json() == first
    assert len(engine.jobs) == 1
    assert server.error(task | {"seed": 8})["code"] == "conflictTaskUUID"
    assert server.error(asked, KEYS[1])["code"] == "taskNotFound"
    assert server.post([task], KEYS[1]).status_code == 200  # the same name, another owner
    stolen = new(referenceImages=[first["data"][0]["imageUUID"]])
    assert server.error(stolen, KEYS[1])["code"] == "imageNotFound"


def test_images_end(server: Server) -> None:
    def exists(url: str) -> bool:
        answer = server.get(url)
        assert answer.status_code in (200, 404)
        return answer.status_code == 200

    (item,) = server.post([new()]).json()["data"]
    url = item["imageURL"]
    assert exists(url)
    for wrong in (url[:-1], url[:-3] + "jpg", url[:-6] + "xx.png", url + "/x", url + "%ff"):
        assert not exists(wrong)
    for wrong, code in ((url[:-1], "imageNotFound"), (url + "\ud800", "invalidParameter")):
        assert server.error(new(referenceImages=[wrong]))["code"] == code
    noise = np.random.default_rng(0).integers(0, 255, (512, 512, 3), np.uint8)
    noisy = base64_of(file_of(Image.fromarray(noise)))
    upload = {"taskType": "imageUpload", "taskUUID": str(uuid.uuid4()), "image": noisy}
    assert server.error(upload)["code"] == "maxSizeExceeded"  # more than half of what is kept


def test_webhooks_and_uploads(server: Server, sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_WEBHOOK_PAUSES_S", (0.0, 0.1))
    task = new(webhookURL=sink.url, uploadEndpoint=sink.url, numberResults=2, outputFormat="WEBP")
    answer = server.post([task]).json()
    until(lambda: len(sink.got) == 3)
    put, again, hook = sink.got
    assert (put[0], put[1], hook[0], hook[1]) == ("PUT", "image/webp", "POST", "application/json")
    assert put[2] != again[2]
    assert json.loads(hook[2]) == answer
    sink.statuses = [500]  # a webhook is tried again, and hears of errors
    sink.got.clear()
    bad = server.post([new(webhookURL=sink.url, referenceImages=["!"])]).json()
    until(lambda: len(sink.got) == 2)
    assert [json.loads(body) for _, _, body in sink.got] == [bad, bad]
    sink.statuses = [403]
    refused = server.error(new(uploadEndpoint=sink.url))
    assert (refused["code"], refused["parameter"]) == ("invalidURL", "uploadEndpoint")
    (item,) = server.post([new(referenceImages=[sink.url])]).json()["data"]
    assert pixel(server.get(item["imageURL"]).content) == (7, 9, 4)


def test_nothing_without_a_key(server: Server, engine: PaintingEngine) -> None:
    for key in (None, "wrong", KEYS[0][:-1]):
        answer = server.post([new()], key)
        assert answer.status_code == 401
        assert answer.json()["errors"][0]["code"] == "invalidApiKey"
    login = {"taskType": "authentication", "apiKey": KEYS[0]}
    assert server.post([login, new()], None).json()["data"][1]["seed"] == 7
    assert server.post([login | {"apiKey": "wrong"}, new()], None).status_code == 401
    large = server.post([login, new(referenceImages=["A" * 1_500_000])], None)
    assert large.status_code == 401
    assert len(engine.jobs) == 1
    assert server.refusal("websocket", "wrong").code == "auth"


def test_a_connection_speaks_runwares_protocol(server: Server) -> None:
    login = [{"taskType": "authentication", "apiKey": KEYS[0]}]
    session = str(uuid.uuid4())
    resumed = [login[0] | {"connectionSessionUUID": session}]
    hello, pong, bad = server.talk(resumed, [{"taskType": "ping", "ping": True}], "nonsense")
    assert hello["data"] == [{"taskType": "authentication", "connectionSessionUUID": session}]
    assert pong["data"] == [{"taskType": "ping", "pong": True}]
    assert bad["errors"][0]["code"] == "invalidRequest"
    for first in ([new()], "nonsense", [login[0] | {"apiKey": "wrong"}], login * 99):
        answer, code = server.talk(first)
        assert (set(answer), code) == ({"errors"}, 1008)
    assert server.talk(login, b"bytes")[1:] == [1003]
    hello, pong = server.talk([*login, {"taskType": "ping"}])
    assert pong == {"data": [{"taskType": "ping", "pong": True}]}
    assert server.talk(login, "x" * (3 << 20))[1:] == [1009]
    headers = {"authorization": f"Bearer {KEYS[1]}"}
    (pong,) = server.talk([{"taskType": "ping"}], additional_headers=headers)
    assert pong["data"][0]["pong"]


def test_what_waits_is_counted(
    server: Server, engine: PaintingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_SOON_S", 0.01)
    gate = Event()
    engine.act = waiting(gate)

    def later(key: str, **fields: Any) -> str:
        answer = server.post([new(deliveryMethod="async", **fields)], key).json()
        return str(answer["errors"][0]["code"]) if "errors" in answer else "taken"

    try:
        assert [later(KEYS[0]) for _ in range(33)] == ["taken"] * 32 + ["rateLimitExceeded"]
        large = base64_of(green(1, 1024))  # 3 MiB of pixels each
        assert [later(KEYS[1], referenceImages=[large]) for _ in range(2)] == ["taken"] * 2
        assert later(KEYS[1]) == "rateLimitExceeded"
        assert later(KEYS[1], referenceImages=["!"]) == "rateLimitExceeded"
    finally:
        gate.set()
    until(lambda: later(KEYS[1]) == "taken")


def test_a_closed_connection_takes_its_work_with_it(server: Server, engine: PaintingEngine) -> None:
    gate = Event()
    engine.act = waiting(gate)
    login = [{"taskType": "authentication", "apiKey": KEYS[0]}]
    later = new(deliveryMethod="async")

    async def main() -> list[Any]:
        got = []
        async with websockets.connect(server.socket, proxy=None) as socket:
            await socket.send(json.dumps(login))
            await socket.recv()
            for _ in range(2):
                await socket.send(json.dumps([new() for _ in range(16)]))
            await socket.send(json.dumps([new()]))
            got.append(json.loads(await socket.recv()))
            while len(engine.jobs) < 32:
                await asyncio.sleep(0.01)
        async with httpx.AsyncClient(trust_env=False) as http:
            headers = {"authorization": f"Bearer {KEYS[0]}"}
            got.append((await http.post(server.runware, json=[later], headers=headers)).json())
            with pytest.raises(httpx.ReadTimeout):
                await http.post(server.runware, json=[new()], headers=headers, timeout=0.3)
        return got

    try:
        busy, accepted = asyncio.run(main())
        assert busy["errors"][0]["code"] == "rateLimitExceeded"
        assert accepted["data"] == [{"taskType": "imageInference", "taskUUID": later["taskUUID"]}]
        until(lambda: engine.cancelled == 33)
        asked = [{"taskType": "getResponse", "taskUUID": later["taskUUID"]}]
        assert server.post(asked).json()["data"][0]["status"] == "processing"
        gate.set()
        until(lambda: server.post(asked).json()["data"][0]["status"] == "success")
        assert engine.cancelled == 33
    finally:
        gate.set()


def test_pages_of_other_sites_are_kept_out() -> None:
    with serving(PaintingEngine()) as server:
        login = [{"taskType": "authentication", "apiKey": "any"}]
        assert "data" in server.talk(login)[0]
        assert "data" in server.talk(login, origin=server.url)[0]
        with pytest.raises(websockets.InvalidStatus) as caught:
            server.talk(login, origin="https://evil.example")
        assert caught.value.response.status_code == 403
        headers = {"origin": "https://evil.example"}
        assert server.http.post(server.runware, json=[new()], headers=headers).status_code == 403
        hooked = new(webhookURL="https://example.com/")  # off unless allowed
        assert server.error(hooked, None)["code"] == "invalidURL"


def test_pocket_makes_the_same_image_for_both_apis(pocket_service: Served) -> None:
    data = base64_of(png())
    fields = {"positivePrompt": "make it night", "width": 128, "height": 128, "steps": 2}

    async def work(c: Runware) -> Any:
        (upload,) = await c.image_upload({"image": data})
        return await c.run(PLAIN | fields | {"inputs": {"referenceImages": [upload["imageUUID"]]}})

    with httpx.Client(trust_env=False, timeout=60) as http:
        server = Server(pocket_service.url, None, http)
        (item,) = server.run("rest", work)
        with Image.open(io.BytesIO(server.get(item["imageURL"]).content)) as image:
            ours = np.asarray(image)
        body = {
            "prompt": "make it night",
            "images": [{"image_url": f"data:image/png;base64,{data}"}],
        }
        body |= {"seed": 7, "size": "128x128", "num_inference_steps": 2}
        headers = {"authorization": f"Bearer {KEY}"}
        answer = http.post(f"{server.url}/v1/images/edits", json=body, headers=headers).json()
    theirs = pixels(answer["data"][0]["b64_json"])
    assert ours.shape == (128, 128, 3)
    assert np.array_equal(ours, theirs)
