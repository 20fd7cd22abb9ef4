"""The memory check: it adds up, it refuses before any work is done, and it says what would help."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from klein_kv import KleinKVPipeline
from klein_kv.errors import CapacityError
from klein_kv.runtime import memory
from klein_kv.runtime.memory import available_memory, check_request_memory, request_bytes
from tests.klein_configs import KLEIN_9B


@pytest.fixture
def no_graph_runs(tiny_ours: KleinKVPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(graph: str, _inputs: Any) -> None:
        pytest.fail(f"{graph} ran before the request was refused")

    monkeypatch.setattr(tiny_ours.backend, "run", run)


def test_four_references_of_klein_9b() -> None:
    parts = request_bytes(
        KLEIN_9B, "bfloat16", batch=1, image_tokens=4096, ref_tokens=4 * 4096, text_tokens=512
    )
    assert parts["reference K/V"] == 8 << 30  # half a mebibyte per token
    assert 0.5e9 < parts["activations"] < 5e9


def test_enough_memory_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 100)
    check_request_memory({"reference K/V": 60, "activations": 40}, 1)


@pytest.mark.parametrize(("tokens", "mend"), [(0, "a smaller output"), (1, "fewer or smaller ref")])
def test_message(tokens: int, mend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: int(2e9))
    with pytest.raises(CapacityError) as caught:
        check_request_memory({"reference K/V": int(8e9), "activations": int(1e9)}, tokens)
    message = str(caught.value)
    for part in ("9.0 GB", "K/V 8.0 GB", "activations 1.0 GB", "2.0 GB of memory are free", mend):
        assert part in message


@pytest.mark.usefixtures("no_graph_runs")
def test_request_is_refused_first(
    tiny_ours: KleinKVPipeline,
    picture: Callable[..., Image.Image],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    monkeypatch.setattr(tiny_ours, "_activations_held", 0)
    with pytest.raises(CapacityError, match="the request needs at least"):
        tiny_ours("a red kite", image=[picture(128, 128)] * 4)
    with pytest.raises(CapacityError, match="a smaller output"):
        tiny_ours("a red kite")


@pytest.mark.usefixtures("no_graph_runs")
def test_references_alone_are_refused_first(
    tiny_ours: KleinKVPipeline,
    picture: Callable[..., Image.Image],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    with pytest.raises(CapacityError, match="reference K/V"):
        tiny_ours.encode_references(picture(512, 512))


def test_control_group_limits_what_is_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    free = available_memory()
    assert free > 1 << 20
    (tmp_path / "memory.current").write_text("1000\n")
    # Pages of mapped weights can be dropped: they are not what fills the group.
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 300\nactive_file 200\n")
    for limit, expected in (("5000\n", 4500), ("400\n", 0)):
        (tmp_path / "memory.max").write_text(limit)
        assert available_memory() == expected
    for limit in ("max\n", "rubbish"):
        (tmp_path / "memory.max").write_text(limit)
        assert available_memory() > 1 << 20


def test_a_request_like_an_earlier_one_is_not_refused(
    tiny_ours: KleinKVPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: what the backend kept of the first request counted as taken for the second."""
    request = {"height": 256, "width": 256, "seed": 0, "num_inference_steps": 1}
    tiny_ours("a red kite", **request)
    monkeypatch.setattr(memory, "available_memory", lambda: 0)
    tiny_ours("another kite", **request)
    with pytest.raises(CapacityError):
        tiny_ours("a larger kite", **(request | {"height": 2048, "width": 2048}))
