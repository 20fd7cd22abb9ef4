"""Host memory: what is free, and that requests are refused before any work is done."""

import re

import pytest

from klein_kv import KleinKVPipeline
from klein_kv.errors import CapacityError
from klein_kv.runtime.planning import memory
from klein_kv.runtime.planning.memory import available_memory


@pytest.fixture
def fresh(tiny_ours):
    """The tiny pipeline as if its backend had taken no memory yet."""
    return KleinKVPipeline(
        tiny_ours.artifacts,
        tiny_ours.manifest,
        tiny_ours.backend,
        reference_cache_bytes=0,
        prompt_cache_bytes=0,
    )


@pytest.mark.usefixtures("no_graph_runs")
def test_request_is_refused_first(fresh, picture, set_free):
    set_free(1000)
    with pytest.raises(CapacityError, match=r"0\.001 MB of memory can be had; .* nothing that was"):
        fresh("a red kite", image=[picture(128, 128)] * 4)
    with pytest.raises(CapacityError, match="the request needs"):
        fresh("a red kite")
    set_free(22_000_000)
    with pytest.raises(CapacityError, match=r"encode_references \(reference K/V 7\.864 MB"):
        fresh.encode_references([picture(256, 256)] * 20)


def test_refusal_names_what_would_fit(fresh, picture, set_free):
    images = [picture(256, 256)] * 20
    set_free(22_000_000)
    request = {"height": 128, "width": 128, "output_type": "latent", "num_inference_steps": 1}
    with pytest.raises(CapacityError) as caught:
        fresh("a red kite", image=images, **request)
    message = str(caught.value)
    assert "in first_step (reference K/V 7.864 MB, scratch 19.7 MB" in message
    # Weights are mapped files here, and keys and values are computed with as they are.
    found = re.search(r"what would fit: (\d+) references; references up to (\d+)x(\d+)$", message)
    assert found
    fitting, width, height = map(int, found.groups())
    with pytest.raises(CapacityError, match=f"what would fit: {fitting} references"):
        fresh("a red kite", image=images[: fitting + 1], **request)
    fresh("a red kite", image=[picture(width, height)] * 20, **request)
    fresh("a red kite", image=images[:fitting], **request)


def test_control_group_limits_what_is_available(tmp_path, monkeypatch):
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


def test_a_request_like_an_earlier_one_is_not_refused(fresh, set_free):
    """Regression: what the backend kept of the first request counted as taken for the second."""
    request = {"height": 256, "width": 256, "seed": 0, "num_inference_steps": 1}
    fresh("a red kite", **request)
    set_free(0)
    fresh("another kite", **request)
    with pytest.raises(CapacityError):
        fresh("a larger kite", **(request | {"height": 2048, "width": 2048}))
