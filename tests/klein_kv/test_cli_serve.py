"""`klein-kv serve` as a process of its own: it starts, serves, drains, and fails in one line."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from klein_kv.cli import main
from klein_kv.runtime.serving.runner import DeviceLostError
from tests.klein_kv.test_cli import run

KEY = "a key of the tests, long enough"
HEADERS = {"authorization": f"Bearer {KEY}"}


@pytest.fixture
def server(tiny_artifacts: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that is ready, and its address."""
    (tmp_path / "keys").write_text(f"{'0' * 32}\n{KEY}\n")
    argv = ["serve", tiny_artifacts, "--port", "0", "--api-key-file", tmp_path / "keys"]
    argv += ["--warm-up", "128x128:1", "--backend", "onnxruntime", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "klein_kv.cli", *map(str, argv)], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    url = ""
    for line in process.stderr:
        if match := re.search(r"http://127\.0\.0\.1:\d+", line):
            url = match[0]
        if line.startswith("ready"):
            break
    reader = threading.Thread(target=process.stderr.read, daemon=True)
    reader.start()
    yield process, url
    process.kill()
    process.wait()
    reader.join()
    process.stderr.close()


def editing(url: str, answers: list[httpx.Response], **fields: Any) -> threading.Thread:
    """A client whose edit is under way; it may get no answer."""

    def edit() -> None:
        ask, path = {"prompt": "a"} | fields, f"{url}/v1/images/generations"
        with contextlib.suppress(httpx.HTTPError):
            answers.append(httpx.post(path, json=ask, headers=HEADERS, timeout=60))

    client = threading.Thread(target=edit)
    client.start()
    while "in_flight 1" not in httpx.get(f"{url}/metrics", headers=HEADERS).text:
        assert client.is_alive()
    return client


def test_it_serves_and_drains(server: tuple[subprocess.Popen[str], str]) -> None:
    process, url = server
    assert httpx.get(f"{url}/health/live").status_code == 200
    assert httpx.get(f"{url}/health/ready").status_code == 401
    assert httpx.get(f"{url}/health/ready", headers=HEADERS).status_code == 200
    with httpx.Client(base_url=url, headers=HEADERS) as client:
        taken = [client.get("/v1/models").elapsed.total_seconds() for _ in range(60)]
    assert min(taken[30:]) < 0.03  # regression: 40 ms each, for an acknowledgement
    answers: list[httpx.Response] = []
    client = editing(url, answers, size="256x256", num_inference_steps=40, seed=1)
    process.send_signal(signal.SIGTERM)
    client.join(60)
    assert answers[0].status_code == 200  # what was taken on is done
    assert process.wait(20) == 0


def test_a_second_signal_does_not_wait(server: tuple[subprocess.Popen[str], str]) -> None:
    process, url = server
    client = editing(url, [], size="1024x1024", num_inference_steps=50, n=10)
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    ready = httpx.get(f"{url}/health/ready", headers=HEADERS)
    assert ready.json()["error"]["code"] == "not_ready"
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    client.join(20)


def test_a_lost_device_ends_the_process(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(*_: Any, **__: Any) -> None:
        raise DeviceLostError("the device is lost")

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr("klein_kv.runtime.serving.server.serve", lose)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit, match="1"):
        main(["serve", "missing"])
    assert capsys.readouterr().err == "klein-kv serve: error: the device is lost\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("missing", "missing"),
        ("missing --host 0.0.0.0", "there is no API key"),
        ("missing --queue 0", "--queue is 0"),
        ("missing --replicas 2", "--replicas is 2"),
        ("missing --allow-url-host https://a", "no host"),
        (f"missing --api-key-file {os.devnull}", "holds no key"),
        ("missing --ray ray://head:10001", "the address of Ray is 'ray://head:10001'"),
        ("missing --ray local --device cuda:1", "device is 'cuda:1', which Ray chooses"),
    ],
)
def test_it_fails_in_one_line(capsys: Any, argv: str, words: str) -> None:
    code, out, errors = run(capsys, "serve", *argv.split(), "--port", "0", "-q")
    assert (code, out) == (1, "")
    assert errors.startswith("klein-kv serve: error: ")
    assert words in errors
    assert errors.count("\n") == 1


def test_what_is_not_there_is_told(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A free port, a key that is long enough, and the extra."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "choose another" in run(capsys, "serve", "missing", "--port", port)[2]
    monkeypatch.setenv("KLEIN_KV_API_KEY", "short")
    assert "shorter than 16" in run(capsys, "serve", "missing", "--host", "0.0.0.0")[2]
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, errors = run(capsys, "serve", "missing")
    assert code == 1
    assert "pip install 'klein-kv[serve]'" in errors


@pytest.mark.parametrize(
    "words", ["--warm-up 1024", "--warm-up 64x64:a", "--lora style", "--lora !=c"]
)
def test_wrong_usage(capsys: Any, words: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["serve", "missing", *words.split()])
    assert "expected for example" in capsys.readouterr().err
