"""What does the service add to an edit, and does it stay flat under load?

    python benchmarks/serving.py [--requests 2000] [--clients 16] [--rounds 100]

`klein-kv serve` runs pocket in float32 on ONNX Runtime, on one thread, as a process of its own. First
the bare pipeline and the service take turns at one edit of known references, each process alone at
its turn. Then clients visit the service all at once, as `MIX` has it: a tenth of them vanish or send
rubbish. Every answer is checked against what was sent: status and code of a refusal; format and size
of an image, and that the same question always has the same bytes. Memory, files and threads of the
process are read meanwhile. Last on stdout: a line of JSON; anything unexpected is listed there as a
failure, and the exit code is 1.
"""

import argparse
import asyncio
import base64
import contextlib
import http.client
import io
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from contenders import pictures
from edit import describe
from PIL import Image

from klein_kv import KleinKVPipeline
from klein_kv.export.checkpoints.fixture import make_fixture
from klein_kv.export.exporter import export_checkpoint

KEY = "the key of a benchmark on loopback"
MARK = "xyzzy"  # in every prompt: the log must not hold it
PROMPTS = [f"the same scene, {MARK} {i}" for i in range(16)]
FORMATS = ("png", "jpeg", "webp")
MIX = {
    "edit": 0.58,  # known references by id, 128x128, 1 step
    "four_steps": 0.08,  # an image in the form, 192x192
    "stream": 0.06,  # the same as events, with 3 previews
    "generation": 0.06,  # no reference, 128x128, 1 step
    "references": 0.04,  # new ones: uploaded, looked at, deleted, asked for in vain
    "runware": 0.04,  # the first by Runware's route
    "look": 0.04,  # models, metrics, readiness, the page
    "rubbish": 0.05,
    "vanish": 0.05,  # half a request sent, or all of it, or a stream begun: then the socket closes
}
MAX_BODY = 1 << 20
Rubbish = tuple[str, dict[str, Any], int, str]
"""Path, httpx' arguments, and the status and code that it deserves."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--requests", type=int, default=2000, help="visits; some take several requests")
    add("--clients", type=int, default=16)
    add("--rounds", type=int, default=100, help="of the bare pipeline and the service in turn")
    add("--work", type=Path, help="keep pocket's artifacts and the server's log here")
    args = parser.parse_args()
    args.device = "cpu"  # for `describe`
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        artifacts = prepare(work)
        document = describe(args) | {"benchmark": "serving", "mix": MIX}
        with served(artifacts, work / "server.log") as server:
            document["overhead"] = overhead(server.port, artifacts, args.rounds)
            document |= asyncio.run(Load(server, args.requests, args.clients).run())
        document["failures"] += server.failures
    document["load_after"] = os.getloadavg()[0]
    report(document)
    print(json.dumps(document))
    sys.exit(bool(document["failures"]))


def prepare(work: Path) -> Path:
    """Pocket's artifacts, which are made once."""
    checkpoint, artifacts = work / "pocket-checkpoint", work / "pocket-fp32"
    work.mkdir(parents=True, exist_ok=True)
    if not artifacts.exists():
        make_fixture(checkpoint, "pocket", 0)
        export_checkpoint(checkpoint, artifacts, dtype="float32")
    return artifacts


class Server:
    """The process, seen from outside."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.pid, self.log, self.failures = process.pid, log, list[str]()
        end = time.monotonic() + 120
        while b"listening on" not in log.read_bytes():
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the server did not start: {log.read_text()[-2000:]}")
            time.sleep(0.05)
        line = log.read_text().partition("listening on http://127.0.0.1:")[2]
        self.port = int(line.partition(",")[0])
        url = f"http://127.0.0.1:{self.port}/health/ready"
        while httpx.get(url, headers=authorized()).status_code != 200:
            time.sleep(0.1)

    def facts(self) -> tuple[int, int, int]:
        """Resident bytes, open files, threads."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        files, threads = (len(os.listdir(f"/proc/{self.pid}/{x}")) for x in ("fd", "task"))
        return pages * os.sysconf("SC_PAGE_SIZE"), files, threads


@contextlib.contextmanager
def served(artifacts: Path, log: Path) -> Iterator[Server]:
    """Serves, and ends as an operator ends it."""
    command = [sys.executable, "-m", "klein_kv.cli", "serve", str(artifacts), "--port", "0"]
    command += "--device cpu --backend onnxruntime --threads 1 --references 0.05".split()
    command += ["--max-body", str(MAX_BODY / 2**20), "--warm-up", "192x192:1"]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stderr=file, env=os.environ | {"KLEIN_KV_API_KEY": KEY})
    try:
        server = Server(process, log)
        yield server
        process.send_signal(signal.SIGTERM)
        if code := process.wait(30):
            server.failures.append(f"the server ended with {code}")
        text = log.read_text()
        server.failures += [f"the log holds {x}" for x in (MARK, KEY, "Traceback") if x in text]
    finally:
        process.kill()
        process.wait()


def authorized() -> dict[str, str]:
    return {"authorization": f"Bearer {KEY}"}


def png(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


# The overhead ---------------------------------------------------------------------------------------


def overhead(port: int, artifacts: Path, rounds: int) -> dict[str, Any]:
    """Milliseconds of one edit, 4 steps at 192x192 with one known reference, four times in turn.

    "in_server" is what the service itself says of the GPU's thread in its turn for JPEG: the rest of
    that turn is HTTP, queue, threads and the image's encoding.
    """
    (picture,) = pictures(1, 192)
    connection = http.client.HTTPConnection("127.0.0.1", port)

    def ask(path: str, fields: dict[str, Any]) -> tuple[float, http.client.HTTPResponse, Any]:
        headers = authorized() | {"content-type": "application/json"}
        start = time.perf_counter()
        connection.request("POST", path, json.dumps(fields), headers)
        answer = connection.getresponse()
        body = json.loads(answer.read())
        return 1e3 * (time.perf_counter() - start), answer, body

    image = base64.b64encode(png(picture)).decode()
    reference = ask("/v1/references", {"image": image})[2]["id"]
    fields = {"prompt": PROMPTS[0], "references": reference, "seed": 0}
    turns: dict[str, list[float]] = defaultdict(list)
    with KleinKVPipeline.from_pretrained(
        artifacts, backend="onnxruntime", device="cpu", threads=1
    ) as pipe:
        pipe.set_progress_bar_config(disable=True)
        known = pipe.encode_references([picture])
        for i in range(rounds + 3):
            start = time.perf_counter()
            pipe(PROMPTS[0], references=known, seed=0)
            times = {"bare": 1e3 * (time.perf_counter() - start)}
            for kind in ("png", "jpeg"):
                times[kind], answer, _ = ask("/v1/images/edits", fields | {"output_format": kind})
                timing = answer.headers["server-timing"]
                times["in_server"] = float(timing.partition("gpu;dur=")[2])
            if i >= 3:
                for name, value in times.items():
                    turns[name].append(value)
    connection.close()
    bare = statistics.median(turns["bare"])
    return {
        "rounds": rounds,
        "milliseconds": {name: spread(values) for name, values in turns.items()},
        "added": {
            kind: {
                "median": statistics.median(turns[kind]) - bare,
                "median_of_rounds": statistics.median(
                    a - b for a, b in zip(turns[kind], turns["bare"], strict=True)
                ),
                "ratio": statistics.median(turns[kind]) / bare,
            }
            for kind in ("png", "jpeg")
        },
        "added_outside_pipeline": statistics.median(
            a - b for a, b in zip(turns["jpeg"], turns["in_server"], strict=True)
        ),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median and extremes."""
    ordered = sorted(values)
    p99 = ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))]
    return {"p50": statistics.median(ordered), "p99": p99, "max": ordered[-1]}


# The load -------------------------------------------------------------------------------------------


class Load:
    """Clients that visit at the same time."""

    def __init__(self, server: Server, visits: int, clients: int) -> None:
        self.server, self.clients = server, clients
        self.random = random.Random(0)
        kinds = [kind for kind, share in MIX.items() for _ in range(round(share * visits))]
        self.random.shuffle(kinds)
        self.kinds = iter(enumerate(kinds))
        self.visits = len(kinds)
        self.images = [png(x) for x in pictures(4, 192)]
        self.known: list[str] = []
        self.rubbish = itertools.cycle(rubbish(self.images[0]))
        self.first: dict[str, str] = {}  # the image that a question had
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.codes: Counter[str] = Counter()
        self.samples: list[tuple[int, int, int]] = []
        self.failures: list[str] = []

    async def run(self) -> dict[str, Any]:
        url, limits = f"http://127.0.0.1:{self.server.port}", httpx.Limits(max_connections=None)
        async with self._client(url, limits) as client:
            for image in self.images[:3]:
                answer = await client.post("/v1/references", files={"image": image})
                self.known.append(answer.json()["id"])
            for kind in MIX:  # all threads have started, and all shapes were seen
                await self._visit(client, kind, -1)
        self.seconds.clear()
        before = await self._idle()
        start = time.perf_counter()
        async with self._client(url, limits) as client:
            await asyncio.gather(*(self._visitor(client) for _ in range(self.clients)))
        wall = time.perf_counter() - start
        after = await self._idle()
        return self._summary(wall, before, after)

    def _client(self, url: str, limits: httpx.Limits) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=url, headers=authorized(), limits=limits, timeout=60)

    async def _idle(self) -> tuple[int, int, int]:
        """Facts of the process when nobody is there; nothing may be left behind."""
        await asyncio.sleep(1)
        async with self._client(f"http://127.0.0.1:{self.server.port}", httpx.Limits()) as client:
            text = (await client.get("/metrics")).text
        for gauge in ("queue_depth", "in_flight"):
            if f"klein_kv_engine_{gauge} 0.0" not in text:
                self.failures.append(f"{gauge} is not 0 when nobody is there")
        await asyncio.sleep(0.5)
        return self.server.facts()

    async def _visitor(self, client: httpx.AsyncClient) -> None:
        for number, kind in self.kinds:
            start = time.perf_counter()
            try:
                await self._visit(client, kind, number)
            except Exception as error:  # noqa: BLE001 - told in the result
                self.failures.append(f"visit {number}, {kind}: {type(error).__name__}: {error}")
            self.seconds[kind].append(time.perf_counter() - start)
            self.samples.append(self.server.facts())

    async def _visit(self, client: httpx.AsyncClient, kind: str, number: int) -> None:
        draw, prompt = self.random, self.random.choice(PROMPTS)
        fields: dict[str, Any] = {"prompt": prompt, "seed": draw.randrange(4)}
        fields["output_format"] = output = draw.choice(FORMATS)
        small = fields | {"size": "128x128", "num_inference_steps": 1}
        image = draw.choice(self.images)
        text = base64.b64encode(image).decode()
        if kind == "edit":
            small["references"] = draw.choice(self.known)
            answer = await self._ask(client, "/v1/images/edits", json=small)
            self._check(answer["data"][0]["b64_json"], small, 128, output)
        elif kind == "four_steps":
            answer = await self._ask(
                client, "/v1/images/edits", data=fields, files={"image[]": image}
            )
            self._check(answer["data"][0]["b64_json"], fields | {"image": text}, 192, output)
        elif kind == "stream":
            sent = fields | {"image": text, "stream": True, "partial_images": 3}
            async with client.stream("POST", "/v1/images/edits", json=sent) as response:
                lines = [line async for line in response.aiter_lines() if line[:5] == "data:"]
            events = [json.loads(line[5:]) for line in lines]
            self._expect(
                [e.get("type", "")[11:] for e in events], [*["partial_image"] * 3, "completed"]
            )
            self._check(events[-1]["b64_json"], fields | {"image": text}, 192, output)
        elif kind == "generation":
            answer = await self._ask(client, "/v1/images/generations", json=small)
            self._check(answer["data"][0]["b64_json"], small, 128, output)
        elif kind == "references":
            new = Image.new("RGB", (64, 64), (number % 256, number // 256 % 256, 99))
            answer = await self._ask(client, "/v1/references", 201, files={"image": png(new)})
            path = f"/v1/references/{answer['id']}"
            self._expect((await self._ask(client, path, get=True))["id"], answer["id"])
            self._expect((await client.delete(path)).json()["deleted"], True)
            await self._ask(client, path, 404, "reference_not_found", get=True)
        elif kind == "runware":
            task = {"taskType": "imageInference", "taskUUID": str(uuid.uuid4()), "steps": 1}
            task |= {"model": "runware:400@6", "positivePrompt": prompt, "seed": fields["seed"]}
            task |= {"width": 128, "height": 128, "outputType": "base64Data"}
            sent = task | {"inputs": {"referenceImages": [text]}}
            answer = await self._ask(client, "/runware/v1", json=[sent])
            question = sent | {"taskUUID": None}
            self._check(answer["data"][0]["imageBase64Data"], question, 128, "jpeg")
        elif kind == "look":
            path = draw.choice(("/v1/models", "/metrics", "/health/ready", "/", "/page/page.js"))
            self._expect((await client.get(path)).status_code, 200)
        elif kind == "rubbish":
            path, arguments, status, code = next(self.rubbish)
            await self._ask(client, path, status, code, **arguments)
        else:
            await self._vanish(fields | {"image": text, "stream": True, "partial_images": 3})

    async def _ask(
        self,
        client: httpx.AsyncClient,
        path: str,
        status: int = 200,
        code: str = "",
        *,
        get: bool = False,
        **arguments: Any,
    ) -> Any:
        """An answer's document; raises where it is not as it should be."""
        answer = await client.request("GET" if get else "POST", path, **arguments)
        document, sent = answer.json(), f"{path} {str(arguments)[:80]}"
        error = document.get("error") or (document.get("errors") or [{}])[0]
        self.codes[f"{answer.status_code} {error.get('code', '')}".strip()] += 1
        if (answer.status_code, error.get("code", "")) != (status, code):
            raise ValueError(f"{sent}: {answer.status_code} {answer.text[:200]}")
        if not answer.headers.get("x-request-id", "").startswith("req_"):
            raise ValueError(f"{sent}: no x-request-id")
        return document

    def _check(self, text: str, question: dict[str, Any], side: int, kind: str) -> None:
        """An image has its size and format, and the bytes that it had when it was first asked for."""
        with Image.open(io.BytesIO(base64.b64decode(text))) as image:
            self._expect((image.size, image.format), ((side, side), kind.upper()))
        if self.first.setdefault(json.dumps(question, sort_keys=True), text) != text:
            raise ValueError("another image than the first time")

    def _expect(self, got: object, expected: object) -> None:
        if got != expected:
            raise ValueError(f"got {got!r}, expected {expected!r}")

    async def _vanish(self, fields: dict[str, Any]) -> None:
        body = json.dumps(fields).encode()
        head = (
            f"POST /v1/images/edits HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {KEY}\r\n"
        )
        head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        how = self.random.randrange(3)
        writer.write(head.encode() + (body[: len(body) // 2] if how == 0 else body))
        await writer.drain()
        if how == 2:
            begun = await reader.readuntil(b"event: ")
            self._expect(begun[:12], b"HTTP/1.1 200")
        await asyncio.sleep(self.random.uniform(0, 0.2))
        if self.random.random() < 0.5:
            writer.transport.abort()
        writer.close()

    def _summary(
        self, wall: float, before: tuple[int, int, int], after: tuple[int, int, int]
    ) -> dict[str, Any]:
        quarter = len(self.samples) // 4
        second, last = (
            [statistics.median(x) for x in zip(*self.samples[k * quarter :][:quarter], strict=True)]
            for k in (1, 3)
        )
        growth = last[0] / second[0]
        if abs(growth - 1) > 0.03:
            self.failures.append(f"memory is {growth:.3f} of what it was, expected within 3 %")
        for name, a, b in zip(("files", "threads"), before[1:], after[1:], strict=True):
            if b > a:
                self.failures.append(f"{b} {name} when nobody is there, {a} before the load")
        everything = [x for values in self.seconds.values() for x in values]
        return {
            "visits": self.visits,
            "clients": self.clients,
            "seconds": wall,
            "visits_per_second": self.visits / wall,
            "visit_seconds": {"all": spread(everything)}
            | {kind: {"visits": len(x)} | spread(x) for kind, x in self.seconds.items()},
            "answers": dict(self.codes),
            "different_images": len(self.first),
            "memory": {"second_quarter": second[0], "last_quarter": last[0], "growth": growth},
            "resident_bytes": [samples[0] for samples in self.samples[:: max(1, quarter // 10)]],
            "under_load": {"files": [second[1], last[1]], "threads": [second[2], last[2]]},
            "idle": {"before": before, "after": after},
            "failures": self.failures[:50],
        }


def rubbish(image: bytes) -> list[Rubbish]:
    """What nobody should send."""
    edits, made, form = (
        "/v1/images/edits",
        "/v1/images/generations",
        "multipart/form-data; boundary=x",
    )
    json_type, prompt = {"content-type": "application/json"}, {"prompt": MARK}
    bomb, text = png(Image.new("1", (15_000, 15_000))), base64.b64encode(image).decode()
    broken = (
        b'--x\r\ncontent-disposition: form-data; name="image"; filename="a"\r\n\r\n' + image[:99]
    )
    bad_task = {"taskType": "imageInference", "taskUUID": "x"}
    return [
        (edits, {"content": broken, "headers": {"content-type": form}}, 400, "missing_required_parameter"),
        (edits, {"content": b"--y\r\n\r\n", "headers": {"content-type": form}}, 400, "invalid_body"),
        (edits, {"content": b'{"prompt": ', "headers": json_type}, 400, "invalid_body"),
        (edits, {"content": b"[" * 200_000, "headers": json_type}, 400, "invalid_body"),
        (edits, {"content": image, "headers": {"content-type": "image/png"}}, 400, "invalid_body"),
        (edits, {"content": bytes(MAX_BODY + 1), "headers": json_type}, 413, "payload_too_large"),
        (edits, {"json": prompt | {"image": text, "size": "130x130"}}, 400, "invalid_value"),
        (edits, {"json": prompt | {"image": text, "n": 11}}, 400, "invalid_value"),
        (edits, {"json": prompt | {"image": text, "promt": "a"}}, 400, "unknown_parameter"),
        (edits, {"json": {"image": text}}, 400, "missing_required_parameter"),
        (edits, {"json": prompt}, 400, "missing_required_parameter"),
        (edits, {"json": prompt | {"references": "0" * 64}}, 404, "reference_not_found"),
        (edits, {"json": prompt | {"image": "https://127.0.0.1/a.png"}}, 400, "url_refused"),
        (edits, {"json": prompt | {"image": text, "timeout": 1e-6}}, 504, "deadline"),
        (edits, {"json": prompt | {"image": text}, "headers": {"authorization": "Bearer no"}}, 401,
         "invalid_api_key"),
        (edits, {"data": prompt, "files": {"image": bomb}}, 400, "invalid_image"),
        (edits, {"data": prompt, "files": {"image": image[:400]}}, 400, "invalid_image"),
        (edits, {"data": prompt, "files": [("image", image)] * 5}, 400, "invalid_value"),
        (made, {"json": {"prompt": MARK * 7000}}, 400, "invalid_value"),
        (made, {"json": prompt | {"model": "other"}}, 404, "model_not_found"),
        ("/nothing", {"json": prompt}, 404, "not_found"),
        ("/v1/models", {"json": prompt}, 405, "method_not_allowed"),
        ("/runware/v1", {"json": [bad_task]}, 400, "invalidParameter"),
        ("/runware/v1", {"json": bad_task}, 400, "invalidRequest"),
    ]  # fmt: skip


def report(document: dict[str, Any]) -> None:
    """The figures that matter, in a few lines."""
    turns, added = document["overhead"]["milliseconds"], document["overhead"]["added"]
    print(f"bare pipeline: {turns['bare']['p50']:.1f} ms")
    for kind, more in added.items():
        print(f"service, {kind}: +{more['median']:.1f} ms, {more['ratio']:.3f} times as long")
    times, memory = document["visit_seconds"], document["memory"]
    for kind, x in times.items():
        print(f"{kind:12} p50 {1e3 * x['p50']:6.0f} ms, p99 {1e3 * x['p99']:6.0f} ms")
    print(
        f"{document['visits_per_second']:.1f} visits/s; memory {memory['growth']:.3f} of the second"
    )
    print(f"quarter's; files and threads when idle: {document['idle']}")
    print("\n".join(document["failures"]) or "no failures")


if __name__ == "__main__":
    main()
