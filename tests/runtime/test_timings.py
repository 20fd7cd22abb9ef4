"""Timings of a call: which stage, how long, and that taking them waits for nothing."""

import json
import sys
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from klein_kv import KleinKVPipeline
from klein_kv.cli import main
from klein_kv.errors import BackendError, RequestError
from klein_kv.runtime.timings import Span, Timings, timings_from_spans
from tests.conftest import load_ours

SIZE = {"height": 128, "width": 128, "seed": 0, "max_sequence_length": 64}


@pytest.mark.parametrize(
    ("spans", "expected", "text"),
    [
        (
            [
                Span("copies", 0.0, 0.5),
                Span("text_encoder", 1.0, 3.0),
                Span("vae_encoder", 3.0, 4.0),
                Span("vae_encoder", 5.0, 7.0),
                Span("first_step", 7.0, 17.0),
                Span("copies", 17.5, 18.0),
                Span("cached_step", 18.5, 22.5),
                Span("cached_step", 23.0, 28.0),
                Span("vae_decoder", 30.0, 36.0),
            ],
            Timings(
                text=2.0,
                vae_encode=3.0,
                first_step=10.0,
                cached_steps=(4.0, 5.0),
                step_gaps=(1.5, 0.5),
                vae_decode=6.0,
                copies=1.0,
                total=40.0,
            ),
            "text 2.000, vae encode 3.000, first step 10.000, vae decode 6.000, copies 1.000, "
            "2 cached steps, each 4.500",
        ),
        (
            [Span("plain_step", 0.0, 2.0), Span("plain_step", 2.5, 4.0)],
            Timings(plain_steps=(2.0, 1.5), step_gaps=(0.5,), total=40.0),
            "2 plain steps, each 1.750",
        ),
    ],
)
def test_spans_become_stages(spans, expected, text):
    timings = timings_from_spans(spans, lambda start, end: end - start, 40.0)
    assert timings == expected
    own = [span.end - span.start for span in spans]
    assert timings.stages == sum(own)
    steps = (s.end - s.start for s in spans if s.stage.endswith("_step"))
    assert timings.steps == tuple(steps)
    value = json.loads(json.dumps(timings.to_dict()))
    assert value["stages"] == timings.stages
    assert tuple(value["cached_steps"]) == timings.cached_steps
    assert timings.to_text() == f"40.000 s: {text}"


class SlowBackend:
    """Every graph and copy takes as long as its table says, on a clock of its own."""

    name = "slow"
    seconds = {  # noqa: RUF012 - read alone
        "text_encoder": 1.0,
        "vae_encoder": 2.0,
        "encode_references": 4.0,
        "first_step": 8.0,
        "cached_step": 16.0,
        "vae_decoder": 32.0,
    }

    def __init__(self, inner):
        self.inner = inner
        self.now = 0.0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def run(self, graph, inputs):
        self.now += self.seconds[graph]
        return self.inner.run(graph, inputs)

    def upload(self, array):
        self.now += 2**-10
        return self.inner.upload(array)

    def download(self, buffer):
        self.now += 2**-10
        return self.inner.download(buffer)

    def mark(self):
        return self.now

    def elapsed(self, start, end):
        return end - start


def pipe_on(ours, backend, **options):
    pipe = KleinKVPipeline(ours.artifacts, ours.manifest, backend, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def slow(tiny_ours):
    return pipe_on(tiny_ours, SlowBackend(tiny_ours.backend), reference_cache_bytes=1 << 24)


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
    with pytest.raises(RequestError):
        slow("a kite", height=100, width=128)
    assert slow.timings is again, "only calls leave timings, and only those that succeed"
    slow("a kite", references=references, num_inference_steps=2, **SIZE)
    assert slow.timings.steps == (16, 16)

    slow("a kite", output_type="latent", num_inference_steps=1, **SIZE)
    assert (slow.timings.vae_decode, slow.timings.step_gaps) == (0, ())


def test_host_clock_adds_up_and_inner_calls_count_for_themselves(
    tiny_artifacts, tiny_ours, picture
):
    """What callbacks do is a gap."""
    inner, others = load_ours(tiny_artifacts), []

    def call_another(*_):
        inner("snow", num_inference_steps=1, **SIZE)
        others.append(inner.timings)
        return {}

    request = SIZE | {"image": picture(128, 128), "callback_on_step_end": call_another}
    tiny_ours("a kite", num_inference_steps=3, **request)
    timings = tiny_ours.timings
    once = (timings.text, timings.vae_encode, timings.first_step, timings.vae_decode)
    assert all(value > 0 for value in (*once, *timings.cached_steps, timings.copies))
    assert len(timings.steps) == tiny_ours.num_timesteps == 3
    assert len(timings.step_gaps) == 2
    assert timings.stages + sum(timings.step_gaps) <= timings.total
    for other, gap in zip(others, timings.step_gaps, strict=False):  # none follows the last step
        assert len(other.steps) == 1
        assert gap >= other.stages


def test_other_threads_are_not_recorded(slow):
    session, array = slow.session, np.zeros(4, np.float32)
    with session.record() as timings:
        thread = threading.Thread(target=session.upload, args=(array,))
        thread.start()
        thread.join()
        assert timings().copies == 0
        session.upload(array)
        assert timings().copies == 2**-10


def test_the_command_line_tells_them(tiny_artifacts, tmp_path, capsys, caplog):
    request = "--prompt kite --height 128 --width 128 --steps 2 --threads 1 --json -o"
    with caplog.at_level("INFO", logger="klein_kv"):
        asked = ["generate", str(tiny_artifacts), *request.split(), str(tmp_path / "out.png")]
        assert main(asked) == 0
    value = json.loads(capsys.readouterr().out)
    assert len(value["timings"]["cached_steps"]) == 2
    assert value["timings"]["total"] > value["timings"]["text"] > 0
    assert any("2 cached steps, each" in record.message for record in caplog.records)


# --- NVTX ---


def test_nvtx_ranges_of_a_call(monkeypatch, tiny_ours):
    seen = []

    @contextmanager
    def annotate(message, domain):
        assert domain == "klein_kv"
        seen.append(f"<{message}")
        yield
        seen.append(f"{message}>")

    monkeypatch.setitem(sys.modules, "nvtx", SimpleNamespace(annotate=annotate))
    pipe_on(tiny_ours, tiny_ours.backend, nvtx=True)("a kite", num_inference_steps=2, **SIZE)
    assert [name for name in seen if "copies" not in name] == [
        *("<text_encoder", "text_encoder>"),
        *2 * ("<cached_step", "cached_step>"),
        *("<vae_decoder", "vae_decoder>"),
    ]
    seen.clear()
    tiny_ours("a kite", num_inference_steps=1, **SIZE)
    assert not seen, "off unless asked for"


def test_missing_nvtx_names_its_extra(tiny_ours, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.raises(BackendError, match=r"pip install 'klein-kv\[nvtx\]'"):
        pipe_on(tiny_ours, tiny_ours.backend, nvtx=True)
