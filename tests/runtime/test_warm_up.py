"""Warming up: loads what a call needs, and leaves no trace in caches, timings or results."""

import numpy as np
import pytest

from klein_kv import KleinKVPipeline
from klein_kv.artifacts.manifest import Manifest
from klein_kv.errors import CapacityError, RequestError
from klein_kv.runtime.timings import Timings


def fresh(artifacts):
    pipe = KleinKVPipeline.from_pretrained(artifacts, threads=1, reference_cache_bytes=1 << 26)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def shape_of(buffer):
    """Of an `OrtValue`, or a view of one, whose shape is no call."""
    return tuple(buffer.shape() if callable(buffer.shape) else buffer.shape)


def shapes(runs):
    return [(x.graph, {name: shape_of(buffer) for name, buffer in x.inputs.items()}) for x in runs]


@pytest.mark.parametrize(
    ("artifacts", "references", "batch"),
    [
        ("tiny_artifacts", [], 1),
        ("tiny_artifacts", [(128, 96)], 2),
        ("tiny_artifacts", [(64, 128), (96, 96)], 1),
        ("plain_artifacts", [(64, 64)], 1),
    ],
)
def test_runs_the_very_shapes_of_a_call(artifacts, references, batch, request, watch, picture):
    pipe = fresh(request.getfixturevalue(artifacts))
    runs = watch(pipe)
    options = {"height": 128, "width": 160, "num_inference_steps": 2}
    options |= {"num_images_per_prompt": batch, "max_sequence_length": 32}
    timings = pipe.warm_up(references=references, **options)
    assert len(timings.steps) == 2
    assert timings.text > 0
    during = shapes(runs)
    runs.clear()
    images = [picture(width, height) for height, width in references]
    pipe("a kite", image=images or None, seed=0, **options)
    extra = [step for step in during if step[0] == "encode_references"]
    assert [step for step in during if step not in extra] == shapes(runs)
    assert len(extra) == (bool(references) and artifacts == "tiny_artifacts")


def test_leaves_no_trace(tiny_artifacts, picture, monkeypatch):
    """On every backend: whatever the warm-up loaded is what the call finds."""
    options = {"height": 128, "width": 128, "num_inference_steps": 2, "max_sequence_length": 64}
    request = options | {"image": picture(96, 96), "seed": 0, "output_type": "np"}
    cold, pipe, loaded = fresh(tiny_artifacts), fresh(tiny_artifacts), []
    load = pipe.backend._load
    monkeypatch.setattr(pipe.backend, "_load", lambda graph: loaded.append(graph) or load(graph))
    pipe.warm_up(references=[(96, 96)], **options)
    assert sorted(loaded) == sorted(Manifest.load(tiny_artifacts).graphs.files)
    assert pipe.timings == Timings()
    assert pipe.num_timesteps == 0
    assert len(pipe.prompt_cache) == pipe.prompt_cache.misses == 0
    assert pipe.reference_store.stats.entries == pipe.reference_store.stats.misses == 0
    loaded.clear()
    np.testing.assert_array_equal(
        pipe("a kite", **request).images, cold("a kite", **request).images
    )
    before, kept = pipe.timings, pipe.reference_store.stats
    pipe.warm_up(references=[(96, 96)], **options)
    assert pipe.timings is before
    assert pipe.reference_store.stats == kept
    assert not loaded, "the call had nothing left to load"


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
