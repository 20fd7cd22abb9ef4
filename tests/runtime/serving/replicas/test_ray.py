"""Two replicas of pocket on this machine's CPU, by Ray itself, behind HTTP."""

import asyncio
import importlib.util
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from tests.runtime.serving.conftest import pixels, png, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
]

REPLICAS = 2
QUEUE = 2
LONG_S = 1.0
WARM_UP = [1, 6]


@dataclass
class Service:
    """A front, the process that was started; Ray and the replicas are below it.

    Attributes:
        long: fields of a request that takes about `LONG_S` here.
    """

    url: str
    process: psutil.Process
    log: Path
    long: dict[str, str] = field(default_factory=dict)

    def gauge(self, name: str) -> float:
        """Of all replicas together."""
        text = httpx.get(f"{self.url}/metrics").text
        lines = [x for x in text.splitlines() if x.startswith(f"klein_kv_engine_{name}{{")]
        return sum(float(line.split()[-1]) for line in lines)

    def replicas(self) -> list[psutil.Process]:
        children = self.process.children(recursive=True)
        return [x for x in children if "ray::Replica" in "".join(x.cmdline())]


@pytest.fixture(scope="module")
def service(pocket_artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    log = tmp_path_factory.mktemp("ray") / "log"
    command = [sys.executable, "-m", "klein_kv.cli", "serve", pocket_artifacts, "--ray", "local"]
    command += ["--replicas", REPLICAS, "--queue", QUEUE, "--device", "cpu", "--threads", 1]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*map(str, command), "--port", "0"], stdout=file, stderr=file, start_new_session=True
        )
    below = psutil.Process(process.pid)
    try:
        until(lambda: "http://" in log.read_text() or process.poll() is not None, 60)
        url = next(x for x in log.read_text().split() if x.startswith("http://")).strip(",")
        service = Service(url, below, log)
        until(lambda: httpx.get(f"{url}/health/ready").status_code == 200, 60)
        taken = [a.headers["server-timing"] for a in asyncio.run(edits(service, WARM_UP))]
        step_s = min(float(x.split("gpu;dur=")[1]) for x in taken) / 4e3
        service.long["num_inference_steps"] = str(min(50, max(4, round(LONG_S / step_s))))
        yield service
    finally:
        if process.poll() is None:
            everything = [*below.children(recursive=True), below]
            process.terminate()
            psutil.wait_procs(everything, 20)
            for left in everything:
                if left.is_running():
                    left.kill()
            process.wait()
        sys.stdout.write(log.read_text())


Answers = list[httpx.Response]


async def edits(service: Service, numbers: list[int], **fields: str) -> Answers:
    """All of them at once."""
    data = {"prompt": "make it night", "seed": "7", **fields}
    async with httpx.AsyncClient(timeout=60) as client:
        posts = [
            client.post(
                f"{service.url}/v1/images/edits", data=data, files={"image": png(128, 128, number)}
            )
            for number in numbers
        ]
        return await asyncio.gather(*posts)


def image(answer: httpx.Response) -> Any:
    return pixels(answer.json()["data"][0]["b64_json"])


def test_every_set_stays_on_one_replica(service: Service) -> None:
    sets = [2, 7, 3, 9]  # the homes of two of them are elsewhere
    seen: Counter[str] = Counter()
    for pair in (sets[:2], sets[2:]) * 3:  # never so many that a queue is full
        for answer in asyncio.run(edits(service, pair)):
            seen[answer.headers["x-references"]] += 1
    assert seen == {"new": 4, "known": 8}
    until(lambda: service.gauge("reference_store_misses") == len(sets) + len(WARM_UP))
    text = httpx.get(f"{service.url}/metrics").text
    jobs = [x for x in text.splitlines() if x.startswith("klein_kv_engine_jobs_total{")]
    assert len(jobs) == REPLICAS
    assert not any(line.endswith(" 0.0") for line in jobs)


def test_previews_come_from_the_replica(service: Service) -> None:
    files, data = {"image": png(128, 128, 4)}, {"prompt": "make it night", "stream": "true"}
    answer = httpx.post(
        f"{service.url}/v1/images/edits", data={**data, "partial_images": "2"}, files=files
    )
    events = [x for x in answer.text.splitlines() if x.startswith("event: ")]
    partial, completed = "event: image_edit.partial_image", "event: image_edit.completed"
    assert events == [partial, partial, completed]


def test_a_burst_is_refused_at_the_bound_and_a_killed_replica_loses_nothing(
    service: Service,
) -> None:
    whole = image(asyncio.run(edits(service, [6], **service.long))[0])
    depths: list[float] = []

    async def burst() -> Answers:
        sending = asyncio.ensure_future(edits(service, [6] * 24, **service.long))
        while not sending.done():
            depths.append(await asyncio.to_thread(service.gauge, "queue_depth"))
            if depths[-1] == REPLICAS * QUEUE and service.gauge("replica_lost_total") == 0:
                for replica in service.replicas()[:1]:
                    replica.kill()
            await asyncio.sleep(0.2)
        return await sending

    answers = asyncio.run(burst())
    codes = Counter(answer.status_code for answer in answers)
    assert set(codes) == {200, 429}
    assert codes[200] >= REPLICAS * (1 + QUEUE)
    for answer in answers:
        if answer.status_code == 200:
            assert np.array_equal(image(answer), whole)  # whoever made it
        else:
            assert answer.json()["error"]["code"] == "queue_full"
            assert float(answer.headers["retry-after"]) > 0
    assert max(depths) == REPLICAS * QUEUE
    assert service.gauge("replica_lost_total") == 1
    until(lambda: service.gauge("replica_up") == REPLICAS)
    assert len(service.replicas()) == REPLICAS


def test_a_client_that_goes_takes_its_job_along(service: Service) -> None:
    def jobs() -> float:
        return service.gauge("in_flight") + service.gauge("queue_depth")

    until(lambda: jobs() == 0)

    async def leave() -> None:
        sending = asyncio.ensure_future(edits(service, [7] * 3, n="10", **service.long))
        await asyncio.to_thread(until, lambda: jobs() == 3)
        sending.cancel()

    asyncio.run(leave())
    until(lambda: jobs() == 0, 5)
    until(lambda: service.gauge("cancelled_total") == 3)


def test_ray_is_closed_to_others(service: Service) -> None:
    listening = [
        connection.laddr
        for process in [service.process, *service.process.children(recursive=True)]
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 5  # Ray's own among them
    assert {ip.removeprefix("::ffff:") for ip, _ in listening} == {"127.0.0.1"}
    raylet = next(x for x in service.process.children(recursive=True) if x.name() == "raylet")
    sockets = [x.partition("=")[2] for x in raylet.cmdline() if "_socket_name=" in x]
    assert len(sockets) == 2
    for socket in sockets:
        assert Path(socket).parents[3].stat().st_mode & 0o077 == 0


def test_a_stop_waits_for_what_was_begun_and_leaves_no_process(service: Service) -> None:
    everything = service.process.children(recursive=True)

    async def stop() -> Answers:
        sending = asyncio.ensure_future(edits(service, [8, 9], **service.long))
        await asyncio.to_thread(until, lambda: service.gauge("in_flight") > 0)
        service.process.terminate()
        return await sending

    assert [answer.status_code for answer in asyncio.run(stop())] == [200, 200]
    assert service.process.wait(20) == 0
    assert not psutil.wait_procs(everything, 10)[1]
