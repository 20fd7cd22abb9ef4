"""What does the service add to an edit, and does it stay flat under load?

    python benchmarks/serving.py [--requests 2000] [--clients 16] [--rounds 100]

`klein-kv serve` runs pocket in float32 on ONNX Runtime, on one thread, as a process of its own.
First the bare pipeline and the service take turns at one edit of known references. Then clients
visit the service at the same time, as `MIX` has it; a tenth of them vanish or send rubbish. Every
answer is checked against what was sent: status and code of a refusal; format and size of an image,
and that the same question always has the same bytes. Memory, files and threads of the process are
read after every visit. What is not as it should be is a failure, and the exit code is 1. The last
line on stdout is one JSON document.
"""

import argparse
import asyncio
import base64
import contextlib
import http.client
import io
import itertools
import json
import operator
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

MIX = {
    "edit": 0.58,  # known references by their id, 128x128, 1 step
    "four_steps": 0.08,  # an image in a form, 192x192
    "stream": 0.06,  # the same as events, with 3 previews
    "generation": 0.06,  # no reference, 128x128, 1 step
    "references": 0.04,  # new ones: uploaded, looked at, deleted, asked for in vain
    "runware": 0.04,  # by Runware's route: an image in JSON, 128x128, 1 step
    "look": 0.04,  # models, metrics, readiness, the page
    "rubbish": 0.05,
    "vanish": 0.05,  # half a request sent, or all of it, or a stream begun: then the socket closes
}
KEY = "the key of a benchmark on loopback"
MARK = "xyzzy"  # in every prompt: the log must not hold it
PROMPTS = [f"the same scene, {MARK} {i}" for i in range(16)]  # kept up to 256 MiB, by intent
PATHS = ("/v1/models", "/metrics", "/health/ready", "/", "/page/page.js")
EDITS, MADE = "/v1/images/edits", "/v1/images/generations"
MAX_BODY = 1 << 20
MOST_GROWTH = 0.03
BEARER, JSON = {"authorization": f"Bearer {KEY}"}, {"content-type": "application/json"}


class Server:
    """The process, seen from outside: resident bytes, open files, threads."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.pid, end = process.pid, time.monotonic() + 120
        while b"\nready" not in log.read_bytes():
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the server did not start: {log.read_bytes()[-2000:]!r}")
            time.sleep(0.05)
        line = log.read_bytes().partition(b"listening on http://127.0.0.1:")[2]
        self.port = int(line.partition(b",")[0])

    def facts(self) -> tuple[int, int, int]:
        pages = int(Path(f"/proc/{self.pid}/statm").read_bytes().split()[1])
        files, threads = (
            len(list(Path(f"/proc/{self.pid}/{x}").iterdir())) for x in ("fd", "task")
        )
        return pages * os.sysconf("SC_PAGE_SIZE"), files, threads


@contextlib.contextmanager
def served(artifacts: Path, log: Path, failures: list[str]) -> Iterator[Server]:
    """Serves until the end, and ends it as an operator does."""
    options = {"port": 0, "device": "cpu", "backend": "onnxruntime", "threads": 1}
    options |= {"references": 0.012, "max-body": MAX_BODY / 2**20, "warm-up": "192x192:1"}
    command = [sys.executable, "-m", "klein_kv.cli", "serve", str(artifacts)]
    command += [f"--{name}={value}" for name, value in options.items()]
    keys = log.with_name("keys")
    keys.write_text(KEY, "utf-8")
    with log.open("wb") as file:
        process = subprocess.Popen([*command, f"--api-key-file={keys}"], stderr=file)
    try:
        yield Server(process, log)
        process.send_signal(signal.SIGTERM)
        if code := process.wait(30):
            failures.append(f"the server ended with {code}")
        text = log.read_text("utf-8")
        failures += [f"the log holds {x!r}" for x in (MARK, KEY, "Traceback") if x in text]
    finally:
        process.kill()
        process.wait()


def overhead(port: int, artifacts: Path, rounds: int) -> dict[str, Any]:
    """Milliseconds of one edit, 4 steps at 192x192 with one known reference, in turn."""
    (picture,) = pictures(1, 192)
    connection = http.client.HTTPConnection("127.0.0.1", port)

    def ask(path: str, fields: dict[str, Any]) -> bytes:
        connection.request("POST", path, json.dumps(fields), BEARER | JSON)
        return connection.getresponse().read()

    uploaded = ask("/v1/references", {"image": base64.b64encode(file_of(picture)).decode()})
    fields = {"prompt": PROMPTS[0], "references": json.loads(uploaded)["id"], "seed": 0}
    times: dict[str, list[float]] = {"bare": [], "png": [], "jpeg": []}
    with KleinKVPipeline.from_pretrained(
        artifacts, backend="onnxruntime", device="cpu", threads=1
    ) as pipe:
        pipe.set_progress_bar_config(disable=True)
        known = pipe.encode_references([picture])
        for _ in range(rounds + 3):
            for kind, values in times.items():
                start = time.perf_counter()
                if kind == "bare":
                    pipe(PROMPTS[0], references=known, seed=0)
                else:
                    ask(EDITS, fields | {"output_format": kind})
                values.append(1e3 * (time.perf_counter() - start))
    connection.close()
    times = {name: values[3:] for name, values in times.items()}
    bare = times.pop("bare")
    added = {
        kind: {
            "milliseconds": spread(values),
            "difference": statistics.median(values) - statistics.median(bare),
            "difference_by_round": statistics.median(map(operator.sub, values, bare)),
            "ratio": statistics.median(values) / statistics.median(bare),
        }
        for kind, values in times.items()
    }
    return {"bare": {"milliseconds": spread(bare)}} | added


class Load:
    """Clients that visit at the same time."""

    def __init__(self, server: Server, visits: int, clients: int, failures: list[str]) -> None:
        self.server, self.clients, self.failures = server, clients, failures
        self.draw = random.Random(0)  # noqa: S311
        kinds = [kind for kind, share in MIX.items() for _ in range(round(share * visits))]
        self.draw.shuffle(kinds)
        self.kinds = iter(enumerate(kinds))
        self.images = [file_of(x) for x in pictures(4, 192)]
        self.known: list[str] = []
        self.rubbish = itertools.cycle(rubbish(self.images[0]))
        self.first: dict[str, str] = {}  # the image that a question had
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.codes: Counter[str] = Counter()
        self.samples: list[tuple[int, int, int]] = []

    async def run(self) -> dict[str, Any]:
        async with self._client() as client:
            for image in self.images[:3]:
                answer = await self._ask(client, "/v1/references", 201, files={"image": image})
                self.known.append(answer["id"])
            for kind in MIX:  # all threads are started, all shapes seen
                await self._visit(client, kind, 0)
        before, start = await self._nobody_there(), time.perf_counter()
        async with self._client() as client:
            await asyncio.gather(*(self._visitor(client) for _ in range(self.clients)))
        wall = time.perf_counter() - start
        return self._summary(wall, before, await self._nobody_there())

    def _client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None)
        url = f"http://127.0.0.1:{self.server.port}"
        return httpx.AsyncClient(base_url=url, headers=BEARER, limits=limits, timeout=120)

    async def _nobody_there(self) -> tuple[int, int, int]:
        """The process when all are gone; what they asked for is given up by then."""
        await asyncio.sleep(2)
        async with self._client() as client:
            text = (await client.get("/metrics")).text
        for gauge in ("queue_depth", "in_flight"):
            expect(f"klein_kv_engine_{gauge} 0.0" in text, True)
        await asyncio.sleep(0.5)
        return self.server.facts()

    async def _visitor(self, client: httpx.AsyncClient) -> None:
        for number, kind in self.kinds:
            start = time.perf_counter()
            try:
                await self._visit(client, kind, number)
            except Exception as error:  # noqa: BLE001 - told in the result
                self.failures.append(f"{number}, {kind}: {type(error).__name__}: {error}")
            self.seconds[kind].append(time.perf_counter() - start)
            self.samples.append(self.server.facts())

    async def _visit(self, client: httpx.AsyncClient, kind: str, number: int) -> None:
        image, output = self.draw.choice(self.images), self.draw.choice(("png", "jpeg", "webp"))
        base = {"prompt": self.draw.choice(PROMPTS), "seed": self.draw.randrange(4)}
        fields: dict[str, Any] = base | {"output_format": output}
        small = fields | {"size": "128x128", "num_inference_steps": 1}
        text = base64.b64encode(image).decode()
        stream = fields | {"image": text, "stream": True, "partial_images": 3}
        if kind in ("edit", "generation"):
            references = {"references": self.draw.choice(self.known)} if kind == "edit" else {}
            answer = await self._ask(client, EDITS if references else MADE, json=small | references)
            self._check(answer["data"][0]["b64_json"], small | references, 128, output)
        elif kind == "four_steps":
            answer = await self._ask(client, EDITS, data=fields, files={"image[]": image})
            self._check(answer["data"][0]["b64_json"], fields | {"image": text}, 192, output)
        elif kind == "stream":
            async with client.stream("POST", EDITS, json=stream) as response:
                lines = [line async for line in response.aiter_lines() if line[:5] == "data:"]
            events = [json.loads(line[5:]) for line in lines]
            kinds = [event.get("type") for event in events]
            expect(kinds, [*["image_edit.partial_image"] * 3, "image_edit.completed"])
            self._check(events[-1]["b64_json"], fields | {"image": text}, 192, output)
        elif kind == "references":
            new = Image.new("RGB", (64, 64), (number % 256, number // 256, 99))
            files = {"image": file_of(new)}
            answer = await self._ask(client, "/v1/references", 201, files=files)
            path = f"/v1/references/{answer['id']}"
            expect((await self._ask(client, path, method="GET"))["id"], answer["id"])
            expect((await self._ask(client, path, method="DELETE"))["deleted"], True)
            await self._ask(client, path, 404, "reference_not_found", method="GET")
        elif kind == "runware":
            task = {"taskType": "imageInference", "model": "runware:400@6", "seed": base["seed"]}
            task |= {"positivePrompt": base["prompt"], "width": 128, "height": 128, "steps": 1}
            task |= {"outputType": "base64Data", "inputs": {"referenceImages": [text]}}
            sent = [task | {"taskUUID": str(uuid.uuid4())}]
            answer = await self._ask(client, "/runware/v1", json=sent)
            self._check(answer["data"][0]["imageBase64Data"], task, 128, "jpeg")
        elif kind == "look":
            expect((await client.get(self.draw.choice(PATHS))).status_code, 200)
        elif kind == "rubbish":
            path, arguments, status, code = next(self.rubbish)
            await self._ask(client, path, status, code, **arguments)
        else:
            await self._vanish(json.dumps(stream).encode())

    async def _ask(
        self,
        client: httpx.AsyncClient,
        path: str,
        status: int = 200,
        code: str | None = None,
        *,
        method: str = "POST",
        **arguments: Any,
    ) -> Any:
        """An answer's document, which is as it should be."""
        answer = await client.request(method, path, **arguments)
        document = answer.json()
        error = document.get("error") or document.get("errors", [{}])[0]
        self.codes[f"{answer.status_code} {error.get('code', '')}".strip()] += 1
        expect((answer.status_code, error.get("code")), (status, code))
        expect(answer.headers.get("x-request-id", "")[:4], "req_")
        return document

    def _check(self, text: str, question: dict[str, Any], side: int, kind: str) -> None:
        """An image has its size and format, and the bytes that it had the first time."""
        with Image.open(io.BytesIO(base64.b64decode(text))) as image:
            expect((image.size, image.format), ((side, side), kind.upper()))
        first = self.first.setdefault(json.dumps(question, sort_keys=True), text)
        expect("the same image" if text == first else "another image", "the same image")

    async def _vanish(self, body: bytes) -> None:
        head = f"POST {EDITS} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        head += f"authorization: Bearer {KEY}\r\ncontent-length: {len(body)}\r\n\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        sent = self.draw.choice(("half", "all", "all and a stream begun"))
        writer.write(head.encode() + (body[: len(body) // 2] if sent == "half" else body))
        await writer.drain()
        if "stream" in sent:
            expect((await reader.readuntil(b"event: "))[:12], b"HTTP/1.1 200")
        await asyncio.sleep(self.draw.uniform(0, 0.2))
        if self.draw.random() < 0.5:
            writer.transport.abort()
        writer.close()

    def _summary(
        self, wall: float, before: tuple[int, int, int], after: tuple[int, int, int]
    ) -> dict[str, Any]:
        quarter = len(self.samples) // 4
        second, last = (
            [statistics.median(x) for x in zip(*self.samples[i * quarter :][:quarter], strict=True)]
            for i in (1, 3)
        )
        growth = last[0] / second[0] - 1
        if abs(growth) > MOST_GROWTH:
            self.failures.append(f"memory grew by {growth:.1%} from the second quarter to the last")
        if before[1:] != after[1:]:
            self.failures.append(
                f"files and threads are {after[1:]} at last, {before[1:]} at first"
            )
        everything = [x for values in self.seconds.values() for x in values]
        return {
            "seconds": wall,
            "visits_per_second": len(everything) / wall,
            "visit_seconds": {"all": spread(everything)}
            | {kind: spread(values) for kind, values in self.seconds.items()},
            "answers": dict(self.codes),
            "questions": len(self.first),
            "growth": growth,
            "quarters": {"second": second, "last": last},
            "nobody_there": {"first": before, "last": after},
        }


def expect(got: object, expected: object) -> None:
    if got != expected:
        raise ValueError(f"got {got!r:.300}, expected {expected!r}")


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    p99 = ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))]
    return {"count": len(values), "p50": statistics.median(ordered), "p99": p99, "max": ordered[-1]}


def file_of(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def rubbish(image: bytes) -> list[tuple[str, dict[str, Any], int, str]]:
    """What nobody should send: path, httpx' arguments, and the status and code that it deserves."""
    bomb, text = file_of(Image.new("1", (15_000, 15_000))), base64.b64encode(image).decode()
    form, part = "multipart/form-data; boundary=x", b"--x\r\ncontent-disposition: form-data; name="
    edit, data = {"prompt": MARK, "image": text}, {"prompt": MARK}
    task = {"taskType": "imageInference", "taskUUID": "x"}

    def raw(content: bytes, kind: str = "application/json") -> dict[str, Any]:
        return {"content": content, "headers": {"content-type": kind}}

    # fmt: off
    return [
        (EDITS, raw(part + b'"prompt"\r\n\r\nx', form), 400, "missing_required_parameter"),
        (EDITS, raw(b"--y\r\n\r\n", form), 400, "invalid_body"),
        (EDITS, raw(part + b'"image"\r\n\r\nx', form + "; charset=punycode"), 400, "invalid_body"),
        (EDITS, raw(b'{"prompt": '), 400, "invalid_body"),
        (EDITS, raw(b"[" * 200_000), 400, "invalid_body"),
        (EDITS, raw(b'{"prompt": [' + b"{}," * 200_000 + b"0]}"), 400, "invalid_body"),
        (EDITS, raw(image, "image/png"), 400, "invalid_body"),
        (EDITS, raw(bytes(MAX_BODY + 1)), 413, "payload_too_large"),
        (EDITS, {"json": edit | {"size": "130x130"}}, 400, "invalid_value"),
        (EDITS, {"json": edit | {"n": 11}}, 400, "invalid_value"),
        (EDITS, {"json": edit | {"promt": "a"}}, 400, "unknown_parameter"),
        (EDITS, {"json": {"image": text}}, 400, "missing_required_parameter"),
        (EDITS, {"json": edit | {"lora": "/etc/passwd"}}, 400, "invalid_value"),
        (EDITS, {"json": edit | {"image": "https://127.0.0.1/a.png"}}, 400, "url_refused"),
        (EDITS, {"json": edit | {"timeout": 1e-6}}, 504, "deadline"),
        (EDITS, {"json": data | {"references": "0" * 64}}, 404, "reference_not_found"),
        (EDITS, {"json": edit, "headers": {"authorization": "no"}}, 401, "invalid_api_key"),
        (EDITS, {"data": data, "files": {"image": bomb}}, 400, "invalid_image"),
        (EDITS, {"data": data, "files": {"image": image[:400]}}, 400, "invalid_image"),
        (EDITS, {"data": data, "files": [("image", image)] * 5}, 400, "invalid_value"),
        (MADE, {"json": {"prompt": MARK * 7000}}, 400, "invalid_value"),
        (MADE, {"json": data | {"model": "other"}}, 404, "model_not_found"),
        ("/nothing", {"json": data}, 404, "not_found"),
        ("/v1/models", {"json": data}, 405, "method_not_allowed"),
        ("/runware/v1", {"json": [task]}, 400, "invalidParameter"),
        ("/runware/v1", {"json": task}, 400, "invalidRequest"),
    ]
    # fmt: on


def report(document: dict[str, Any]) -> None:
    added = document["overhead"]
    print(f"bare pipeline  p50 {added['bare']['milliseconds']['p50']:.1f} ms")
    for kind in ("png", "jpeg"):
        x = added[kind]
        print(f"service, {kind:5} +{x['difference']:.1f} ms, {x['ratio']:.3f} times as long")
    for kind, x in document["visit_seconds"].items():
        shown = f"p50 {1e3 * x['p50']:6.0f} ms, p99 {1e3 * x['p99']:6.0f} ms"
        print(f"{kind:12} {x['count']:5} visits, {shown}")
    print(
        f"memory {document['growth']:+.2%}; {document['visits_per_second']:.1f} visits per second"
    )
    print("\n".join(document["failures"][:20]) or "no failures")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--requests", type=int, default=2000, help="visits; those for references take four")
    add("--clients", type=int, default=16)
    add("--rounds", type=int, default=100, help="of the bare pipeline and the service in turn")
    add("--work", type=Path, help="keep pocket's artifacts and the server's log here")
    args = parser.parse_args()
    args.device = "cpu"
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        artifacts = work / "pocket-fp32"
        if not artifacts.exists():
            make_fixture(work / "pocket-checkpoint", "pocket", 0)
            export_checkpoint(work / "pocket-checkpoint", artifacts, dtype="float32")
        document = describe(args) | {"benchmark": "serving", "mix": MIX}
        with served(artifacts, work / "server.log", failures) as server:
            document["overhead"] = overhead(server.port, artifacts, args.rounds)
            document |= asyncio.run(Load(server, args.requests, args.clients, failures).run())
    document["load_at_the_end"] = os.getloadavg()[0]
    document["failures"] = failures
    report(document)
    print(json.dumps(document))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
