"""Warming up: loads what a call needs, and leaves no trace in caches, timings or results."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from klein_kv import KleinKVPipeline
from klein_kv.artifacts.manifest import Manifest
from klein_kv.errors import CapacityError, RequestError
from klein_kv.runtime.backends.backend import Buffer
from klein_kv.runtime.timings import Timings
from tests.runtime.conftest import Run


def fresh(artifacts: Path) -> KleinKVPipeline:
    pipe = KleinKVPipeline.from_pretrained(artifacts, threads=1, reference_cache_bytes=1 << 26)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def shape_of(buffer: Buffer) -> tuple[int, ...]:
    """Of an `OrtValue`, or a view of one, whose shape is no call."""
    return tuple(buffer.shape() if callable(buffer.shape) else buffer.shape)


def shapes(runs: list[Run]) -> list[tuple[str, dict[str, tuple[int, ...]]]]:
    return [(x.graph, {name: shape_of(buffer) for name, buffer in x.inputs.items()}) for x in runs]


@pytest.mark.parametrize("references", [[], [(128, 96)], [(64, 128), (96, 96)]])
@pytest.mark.parametrize("batch", [1, 2])
def test_runs_the_very_shapes_of_a_call(references, batch, tiny_artifacts, watch, picture):
    pipe = fresh(tiny_artifacts)
    runs = watch(pipe)
    timings = pipe.warm_up(
        128, 160, references, num_images_per_prompt=batch, max_sequence_length=32
    )
    assert len(timings.steps) == 4
    assert timings.text > 0
    during = shapes(runs)
    runs.clear()
    images = [picture(width, height) for height, width in references]
    request = {"height": 128, "width": 160, "seed": 0, "max_sequence_length": 32}
    pipe("a kite", image=images or None, num_images_per_prompt=batch, **request)
    extra = [step for step in during if step[0] == "encode_references"]
    assert [step for step in during if step not in extra] == shapes(runs)
    assert len(extra) == bool(references)


def test_plain_weights(plain_artifacts, watch, picture):
    pipe = fresh(plain_artifacts)
    runs = watch(pipe)
    counts = {"num_inference_steps": 2, "max_sequence_length": 16}
    pipe.warm_up(128, 128, [(64, 64)], **counts)
    during = shapes(runs)
    runs.clear()
    pipe("a kite", image=picture(64, 64), height=128, width=128, seed=0, **counts)
    assert during == shapes(runs)


def test_leaves_no_trace(tiny_artifacts, picture):
    request: dict[str, Any] = {
        "prompt": "a kite",
        "image": picture(96, 96),
        "height": 128,
        "width": 128,
        "seed": 0,
        "num_inference_steps": 2,
        "output_type": "np",
    }
    cold, pipe = fresh(tiny_artifacts), fresh(tiny_artifacts)
    pipe.warm_up(128, 128, [(96, 96)])
    assert pipe.timings == Timings()
    assert pipe.num_timesteps == 0
    assert len(pipe.prompt_cache) == pipe.prompt_cache.misses == 0
    assert pipe.reference_store.stats.entries == pipe.reference_store.stats.misses == 0
    sessions = dict(pipe.backend._sessions)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(pipe(**request).images, cold(**request).images)
    before, kept = pipe.timings, pipe.reference_store.stats
    pipe.warm_up(128, 128, [(96, 96)])
    assert pipe.timings is before
    assert pipe.reference_store.stats == kept
    assert pipe.backend._sessions == sessions, "the call had nothing left to load"  # type: ignore[attr-defined]


def test_size_defaults_to_the_first_reference(tiny_artifacts, watch):
    pipe = fresh(tiny_artifacts)
    runs = watch(pipe)
    pipe.warm_up(references=[(130, 170)], num_inference_steps=1, max_sequence_length=8)
    (decoded,) = (run.inputs["latents"] for run in runs if run.graph == "vae_decoder")
    assert shape_of(decoded)[1:3] == (8, 10)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"height": 100}, "height is 100"),
        ({"references": [(32, 32)]}, "32x32"),
        ({"references": [128, 128]}, r"expected \(height, width\)"),
        ({"references": [(1 << 20, 1 << 20)]}, "at most 16384"),
        ({"references": [(128.0, 128.0)]}, r"expected \(height, width\)"),
        ({"prompts": 0}, "prompts is 0"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"max_sequence_length": 0}, "max_length is 0"),
    ],
)
def test_bad_sizes(request_, message, tiny_ours):
    with pytest.raises(RequestError, match=message):
        tiny_ours.warm_up(**request_)


def test_too_large_for_memory_gives_nothing_up(tiny_artifacts, set_free, picture):
    """A call would let kept references go for its sake; warming up is not worth them."""
    pipe = fresh(tiny_artifacts)
    pipe.encode_references(picture(128, 128))
    set_free(1000)
    with pytest.raises(CapacityError):
        pipe.warm_up(128, 128)
    assert pipe.reference_store.stats.entries == 1


def test_engines_are_loaded_before_the_call(tiny_artifacts, monkeypatch):
    """On every backend: whatever the warm-up loaded is what the call finds."""
    pipe = fresh(tiny_artifacts)
    loaded: list[str] = []
    load = pipe.backend._load  # type: ignore[attr-defined]
    monkeypatch.setattr(pipe.backend, "_load", lambda graph: loaded.append(graph) or load(graph))
    pipe.warm_up(128, 128, [(64, 64)], num_inference_steps=2)
    assert sorted(loaded) == sorted(Manifest.load(tiny_artifacts).graphs.files)
    loaded.clear()
    pipe("a kite", height=128, width=128, seed=1, num_inference_steps=2)
    assert not loaded
