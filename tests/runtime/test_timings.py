"""Timings of a call: which stage, how long, and that taking them waits for nothing."""

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from klein_kv import KleinKVPipeline
from klein_kv.artifacts.manifest import Manifest
from klein_kv.errors import BackendError, RequestError
from klein_kv.runtime.timings import Span, Timings, timings_from_spans
from tests.conftest import load_ours

SIZE = {"height": 128, "width": 128, "seed": 0}


def minus(start: float, end: float) -> float:
    return end - start


def test_spans_become_stages():
    spans = [
        Span("copies", 0.0, 0.5),
        Span("text_encoder", 1.0, 3.0),
        Span("vae_encoder", 3.0, 4.0),
        Span("vae_encoder", 5.0, 7.0),
        Span("first_step", 7.0, 17.0),
        Span("copies", 17.5, 18.0),
        Span("cached_step", 18.5, 22.5),
        Span("cached_step", 23.0, 28.0),
        Span("vae_decoder", 30.0, 36.0),
    ]
    timings = timings_from_spans(spans, minus, 40.0)
    assert timings == Timings(
        text=2.0,
        vae_encode=3.0,
        first_step=10.0,
        cached_steps=(4.0, 5.0),
        step_gaps=(1.5, 0.5),
        vae_decode=6.0,
        copies=1.0,
        total=40.0,
    )
    assert timings.steps == (10.0, 4.0, 5.0)
    assert timings.stages == 31.0
    value = json.loads(json.dumps(timings.to_dict()))
    assert value["cached_steps"] == [4.0, 5.0]
    assert value["stages"] == 31.0
    assert timings.to_text() == (
        "40.000 s: text 2.000, vae encode 3.000, first step 10.000, vae decode 6.000, "
        "copies 1.000, 2 cached steps, each 4.500"
    )


def test_plain_steps_are_told_apart():
    spans = [Span("plain_step", 0.0, 2.0), Span("plain_step", 2.5, 4.0)]
    timings = timings_from_spans(spans, minus, 5.0)
    assert timings.plain_steps == timings.steps == (2.0, 1.5)
    assert timings.step_gaps == (0.5,)
    assert timings.cached_steps == ()


class SlowBackend:
    """Every graph and copy takes as long as its table says, on a clock of its own."""

    name = "slow"

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.now = 0.0
        self.seconds = {
            "text_encoder": 1.0,
            "vae_encoder": 2.0,
            "encode_references": 4.0,
            "first_step": 8.0,
            "cached_step": 16.0,
            "vae_decoder": 32.0,
        }

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def run(self, graph: str, inputs: Any) -> Any:
        self.now += self.seconds[graph]
        return self.inner.run(graph, inputs)

    def upload(self, array: Any) -> Any:
        self.now += 2**-10
        return self.inner.upload(array)

    def download(self, buffer: Any) -> Any:
        self.now += 2**-10
        return self.inner.download(buffer)

    def mark(self) -> float:
        return self.now

    def elapsed(self, start: float, end: float) -> float:
        return end - start


@pytest.fixture
def slow(tiny_artifacts, tiny_ours):
    backend = SlowBackend(tiny_ours.backend)
    pipe = KleinKVPipeline(
        tiny_artifacts, Manifest.load(tiny_artifacts), backend, reference_cache_bytes=1 << 24
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_timings_of_calls(slow, picture):
    """From the backend's own clock, for a first edit, a repeated one, and text alone."""
    assert slow.timings == Timings()
    images = [picture(128, 128), picture(64, 64)]
    slow("a kite", image=images, num_inference_steps=3, **SIZE)
    first = slow.timings
    assert (first.text, first.vae_encode, first.encode_references) == (1, 4, 0)
    assert (first.first_step, first.cached_steps, first.vae_decode) == (8, (16, 16), 32)
    assert first.step_gaps == (0, 0)
    assert 0.01 < first.copies < 0.1
    assert 0 < first.total < 30, "the host's clock"

    slow("a kite", image=images, num_inference_steps=3, **SIZE)
    again = slow.timings
    assert (again.text, again.vae_encode, again.first_step) == (0, 0, 0)
    assert again.cached_steps == (16, 16, 16)

    references = slow.encode_references(picture(96, 96, 5))
    assert slow.timings is again, "only calls leave timings"
    slow("a kite", references=references, num_inference_steps=2, **SIZE)
    assert slow.timings.steps == (16, 16)

    slow("a kite", output_type="latent", num_inference_steps=1, **SIZE)
    assert (slow.timings.vae_decode, slow.timings.step_gaps) == (0, ())


def test_host_clock_adds_up(tiny_ours, picture):
    tiny_ours("a kite", image=picture(128, 128), num_inference_steps=3, **SIZE)
    timings = tiny_ours.timings
    once = (timings.text, timings.vae_encode, timings.first_step, timings.vae_decode)
    assert all(value > 0 for value in (*once, *timings.cached_steps, timings.copies))
    assert len(timings.steps) == tiny_ours.num_timesteps == 3
    assert len(timings.step_gaps) == 2
    assert timings.stages + sum(timings.step_gaps) <= timings.total


def test_a_failed_call_leaves_the_timings(tiny_ours):
    tiny_ours("a kite", num_inference_steps=1, **SIZE)
    before = tiny_ours.timings
    with pytest.raises(RequestError):
        tiny_ours("a kite", height=100, width=128)
    assert tiny_ours.timings is before


def test_what_callbacks_do_is_a_gap_and_inner_calls_count_for_themselves(tiny_artifacts, tiny_ours):
    inner = load_ours(tiny_artifacts)

    def call_another(*_: Any) -> dict[str, Any]:
        inner("snow", num_inference_steps=1, **SIZE)
        return {}

    tiny_ours("a kite", num_inference_steps=2, callback_on_step_end=call_another, **SIZE)
    assert len(inner.timings.steps) == 1
    assert len(tiny_ours.timings.steps) == 2
    assert tiny_ours.timings.step_gaps[0] >= inner.timings.stages


def test_other_threads_are_not_recorded(slow):
    backend = slow.session
    with backend.record() as timings:
        thread = threading.Thread(target=backend.upload, args=(np.zeros(4, np.float32),))
        thread.start()
        thread.join()
        assert timings().copies == 0
        backend.upload(np.zeros(4, np.float32))
        assert timings().copies == 2**-10


def test_the_command_line_tells_them(tiny_artifacts, tmp_path, capsys, caplog):
    from klein_kv.cli import main

    with caplog.at_level("INFO", logger="klein_kv"):
        size = ["--height", "128", "--width", "128", "--steps", "2", "--threads", "1"]
        out = ["-o", str(tmp_path / "out.png"), "--json"]
        assert main(["generate", str(tiny_artifacts), "-p", "a kite", *size, *out]) == 0
    value = json.loads(capsys.readouterr().out)
    assert len(value["timings"]["cached_steps"]) == 2
    assert value["timings"]["total"] > value["timings"]["text"] > 0
    assert any("2 cached steps, each" in record.message for record in caplog.records)


# --- NVTX ---


@pytest.fixture
def ranges(monkeypatch):
    """An nvtx module that notes which ranges open and close."""
    seen: list[str] = []

    @contextmanager
    def annotate(message: str, domain: str) -> Iterator[None]:
        assert domain == "klein_kv"
        seen.append(f"<{message}")
        yield
        seen.append(f"{message}>")

    monkeypatch.setitem(sys.modules, "nvtx", SimpleNamespace(annotate=annotate))
    return seen


def test_nvtx_ranges_of_a_call(ranges, tiny_artifacts, tiny_ours):
    manifest = Manifest.load(tiny_artifacts)
    pipe = KleinKVPipeline(tiny_artifacts, manifest, tiny_ours.backend, nvtx=True)
    pipe.set_progress_bar_config(disable=True)
    pipe("a kite", num_inference_steps=2, **SIZE)
    graphs = [name for name in ranges if "copies" not in name]
    assert graphs == [
        *("<text_encoder", "text_encoder>"),
        *2 * ("<cached_step", "cached_step>"),
        *("<vae_decoder", "vae_decoder>"),
    ]
    ranges.clear()
    tiny_ours("a kite", num_inference_steps=1, **SIZE)
    assert not ranges, "off unless asked for"


def test_missing_nvtx_names_its_extra(tiny_ours, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.raises(BackendError, match=r"pip install 'klein-kv\[nvtx\]'"):
        KleinKVPipeline(tiny_ours.artifacts, tiny_ours.manifest, tiny_ours.backend, nvtx=True)
