"""The store inside the pipeline: whatever is asked in whatever order, results are those without it.

The long sequences run on a stand-in for the graphs that is quick and as sensitive to its inputs.
"""

import errno
import gc
import hashlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from klein_kv import KleinKVPipeline
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.signature import kv_names
from klein_kv.errors import CapacityError, RequestError
from klein_kv.runtime.planning import memory
from klein_kv.runtime.references import reference_store
from klein_kv.runtime.references.reference_store import ReferenceFolder
from tests.runtime.stub_backend import TOKEN, DeviceStub, Stub

Picture = Callable[..., Image.Image]
Array = NDArray[Any]

SHARED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
# Indices into PICTURES: 64x64, 80x64, 96x64, 64x80, 64x96 pixels; 16 to 24 tokens each.
PICTURES = [(64, 64), (80, 64), (96, 64), (64, 80), (64, 96)]
SETS = st.lists(st.integers(0, len(PICTURES) - 1), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def manifest(tiny_artifacts: Path) -> Manifest:
    return Manifest.load(tiny_artifacts)


@pytest.fixture
def stub(tiny_artifacts: Path, manifest: Manifest) -> Callable[..., KleinKVPipeline]:
    """Pipelines on a stand-in; options as of `KleinKVPipeline`."""

    def make(kind: type[Stub] = Stub, **options: Any) -> KleinKVPipeline:
        pipeline = KleinKVPipeline(tiny_artifacts, manifest, kind(manifest), **options)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


@pytest.fixture(scope="session")
def pictures(picture: Picture) -> list[Image.Image]:
    return [picture(*size, seed=i) for i, size in enumerate(PICTURES)]


EMBEDS = np.linspace(-1, 1, 2 * 96, dtype=np.float32).reshape(1, 2, 96)


def edit(pipe: KleinKVPipeline, images: list[Image.Image], **request: Any) -> Array:
    request = {"num_inference_steps": 2, "seed": 0, "output_type": "latent"} | request
    result: Array = pipe(
        prompt_embeds=EMBEDS, image=images, height=128, width=128, **request
    ).images
    return result


def graphs_of(pipe: KleinKVPipeline) -> list[str]:
    graphs: list[str] = pipe.backend.graphs  # type: ignore[attr-defined]
    return graphs


# --- sequences of requests ---


@settings(deadline=None, max_examples=60, suppress_health_check=SHARED)
@given(
    budget=st.integers(0, 100 * TOKEN),
    host_budget=st.one_of(st.just(0), st.integers(1, 150 * TOKEN)),
    with_folder=st.booleans(),
    calls=st.lists(
        st.tuples(SETS, st.sampled_from(["edit", "encode", "hold", "pin", "unpin", "drop"])),
        max_size=12,
    ),
)
def test_sequences_equal_those_without_a_store(
    budget: int,
    host_budget: int,
    with_folder: bool,
    calls: list[tuple[list[int], str]],
    stub: Callable[..., KleinKVPipeline],
    pictures: list[Image.Image],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Up to three levels: a device, host memory below it, a folder below that."""
    options: dict[str, Any] = {"reference_cache_bytes": budget, "host_cache_bytes": host_budget}
    folder = tmp_path_factory.mktemp("sets") if with_folder and budget else None
    if folder is not None:
        options |= {"reference_cache_dir": folder, "reference_cache_dir_bytes": 2 * budget}
    if not budget:
        options["host_cache_bytes"] = 0
    pipe, plain = stub(DeviceStub, **options), stub(reference_cache_bytes=0)
    device = pipe.backend
    assert isinstance(device, DeviceStub)
    in_use, expected = [], None
    for chosen, what in calls:
        images = [pictures[i] for i in chosen]
        if what == "drop":
            in_use.clear()
        if what == "edit":
            np.testing.assert_array_equal(edit(pipe, images), edit(plain, images))
        else:
            references = pipe.encode_references(images)
            expected = plain.encode_references(images)
            for name in kv_names(3):
                np.testing.assert_array_equal(references.kv[name], expected.kv[name])
            if what == "hold":
                in_use.append(references)
            elif what == "unpin":
                pipe.reference_store.unpin(references.digest)
            elif what == "pin" and budget:
                room = budget - pipe.reference_store.stats.pinned_bytes
                try:
                    pipe.reference_store.pin(references.digest)
                except CapacityError:
                    assert references.nbytes > room
            del references
        assert pipe.reference_store.stats.bytes <= budget
        if budget:
            contents = device.contents()
            assert len(contents) == len(set(contents)), "two copies on the device"
        if pipe.host_level is not None:
            assert device.host is not None
            assert pipe.host_level.stats.bytes == device.host.bytes <= host_budget
        if folder is not None:
            assert sum(path.stat().st_size for path in folder.iterdir()) <= 2 * budget
            assert not list(folder.glob(".*"))


@settings(deadline=None, max_examples=8, suppress_health_check=SHARED)
@given(
    budget=st.sampled_from([0, 30 * TOKEN, 60 * TOKEN, 1 << 30]),
    calls=st.lists(SETS, min_size=2, max_size=5),
)
def test_sequences_on_the_real_graphs(
    budget: int,
    calls: list[list[int]],
    tiny_ours: KleinKVPipeline,
    tiny_artifacts: Path,
    manifest: Manifest,
    pictures: list[Image.Image],
) -> None:
    pipe = KleinKVPipeline(
        tiny_artifacts, manifest, tiny_ours.backend, reference_cache_bytes=budget
    )
    pipe.set_progress_bar_config(disable=True)
    for chosen in calls:
        images = [pictures[i] for i in chosen]
        np.testing.assert_array_equal(edit(pipe, images), edit(tiny_ours, images))
        assert pipe.reference_store.stats.bytes <= budget


def test_many_requests_leave_nothing_behind(
    stub: Callable[..., KleinKVPipeline], pictures: list[Image.Image]
) -> None:
    """Neither arrays nor entries; and nothing waits for the garbage collector."""
    pipe = stub(reference_cache_bytes=70 * TOKEN)
    rng = np.random.default_rng(0)
    sets = [[pictures[i] for i in rng.integers(0, 5, rng.integers(1, 3))] for _ in range(40)]
    arrays: list[weakref.ref[Array]] = []
    run = pipe.backend.run

    def watch(graph: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        outputs = run(graph, inputs)
        arrays.extend(weakref.ref(array) for array in outputs.values())
        return outputs

    pipe.backend.run = watch  # type: ignore[method-assign]
    gc.disable()
    try:
        for _ in range(300):
            edit(pipe, sets[rng.integers(0, len(sets))], num_inference_steps=1)
            assert pipe.reference_store.stats.bytes <= 70 * TOKEN
        stats = pipe.reference_store.stats
        assert sum(array() is not None for array in arrays) == 6 * stats.entries
        pipe.reference_store.clear()
        assert all(array() is None for array in arrays)
    finally:
        gc.enable()
    assert stats.hits + stats.misses == 300
    assert min(stats.hits, stats.misses, stats.evictions) > 20


def test_dropped_sets_are_freed_at_once(
    stub: Callable[..., KleinKVPipeline], pictures: list[Image.Image]
) -> None:
    pipe = stub()
    gc.disable()
    try:
        edit(pipe, pictures[:1])
        dead = weakref.ref(pipe.encode_references(pictures[:1]))
        pipe.reference_store.clear()
        assert dead() is None
    finally:
        gc.enable()


def test_threads_that_ask_for_the_same_references_encode_once(
    stub: Callable[..., KleinKVPipeline], pictures: list[Image.Image]
) -> None:
    pipe = stub(reference_cache_bytes=1 << 20)
    expected = edit(stub(reference_cache_bytes=0), pictures[:2])
    results, barrier = [], threading.Barrier(6)

    def work() -> None:
        barrier.wait()
        results.append(edit(pipe, pictures[:2]))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(results) == 6
    for result in results:
        np.testing.assert_array_equal(result, expected)
    assert graphs_of(pipe).count("first_step") == 1
    assert graphs_of(pipe).count("vae_encoder") == 2


# --- budgets ---


def test_default_budget_is_a_quarter_of_what_is_free(
    stub: Callable[..., KleinKVPipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 4000)
    pipe = stub()
    assert (pipe.reference_store.budget, pipe.prompt_cache.budget) == (1000, 250)


def test_default_budget_is_all_that_nothing_else_needs() -> None:
    weights = {"text_encoder": 16, "transformer": 18, "vae": 1}
    assert memory.reference_budget(135, weights, besides=10, flagship=8) == 90
    # The flagship edit does not fit beside all: the text encoder goes before the transformer comes.
    assert memory.reference_budget(51, weights, besides=10, flagship=8) == 51 - 10 - 19
    assert memory.reference_budget(18, weights, besides=10, flagship=8) == 0
    assert memory.reference_budget(100, dict.fromkeys(weights, 0), besides=0, flagship=8) == 25


def test_store_gives_way_to_a_request(
    stub: Callable[..., KleinKVPipeline],
    pictures: list[Image.Image],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe = stub(reference_cache_bytes=1 << 20)
    for image in pictures[:4]:
        pipe.encode_references(image)
    held = pipe.reference_store.stats
    assert held.entries == 4
    edit(pipe, pictures[:1])
    needed = pipe.session.plan.peak - pipe.session.plan.kv_bytes  # its own set is held
    monkeypatch.setattr(memory, "available_memory", lambda: needed - held.bytes // 2)
    edit(pipe, pictures[:1])
    assert 1 <= pipe.reference_store.stats.entries < 4
    assert pipe.reference_store.stats.misses == 4  # its own references stayed
    monkeypatch.setattr(memory, "available_memory", lambda: 0)
    with pytest.raises(CapacityError, match="the request needs"):
        edit(pipe, pictures[:1])


def test_bad_budgets(stub: Callable[..., KleinKVPipeline], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="turns reuse off"):
        stub(reference_cache_bytes=0, reference_cache_dir=tmp_path)
    with pytest.raises(RequestError, match="-1 bytes"):
        stub(reference_cache_dir=tmp_path, reference_cache_dir_bytes=-1)
    with pytest.raises(RequestError, match="'1 GB' bytes"):
        stub(reference_cache_bytes="1 GB")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RequestError, match="cannot be made"):
        stub(reference_cache_dir=tmp_path / "file")


# --- host memory below a device ---


def test_evicted_sets_come_back_from_host_memory(
    stub: Callable[..., KleinKVPipeline], pictures: list[Image.Image]
) -> None:
    pipe = stub(DeviceStub, reference_cache_bytes=30 * TOKEN, host_cache_bytes=60 * TOKEN)
    assert pipe.host_level is not None
    expected = [edit(pipe, [image]) for image in pictures[:3]]
    assert pipe.host_level.stats.entries == 2
    for i in (0, 1, 2, 0, 1, 2):
        np.testing.assert_array_equal(edit(pipe, [pictures[i]]), expected[i])
    stats = pipe.reference_store.stats
    assert (stats.misses, stats.restored, stats.hits) == (3, 6, 0)
    # A set of 16 to 24 tokens: the host holds two, and gives up one now and then for good.
    assert graphs_of(pipe).count("first_step") == 3
    assert pipe.host_level.stats.entries == 2


def test_what_host_memory_gives_up_goes_to_the_folder(
    stub: Callable[..., KleinKVPipeline], pictures: list[Image.Image], tmp_path: Path
) -> None:
    options = {"reference_cache_bytes": 30 * TOKEN, "reference_cache_dir": tmp_path}
    pipe = stub(DeviceStub, host_cache_bytes=30 * TOKEN, **options)
    expected = [edit(pipe, [image]) for image in pictures[:4]]
    assert pipe.host_level is not None
    assert pipe.host_level.stats.entries == 1
    assert len(files_of(tmp_path)) == 2
    for image, latents in zip(pictures[:4], expected, strict=True):
        np.testing.assert_array_equal(edit(pipe, [image]), latents)
    assert pipe.reference_store.stats.misses == 4
    # A set that is larger than host memory goes straight to the folder, and comes from there.
    large = edit(pipe, pictures)
    assert len(files_of(tmp_path)) == 5
    np.testing.assert_array_equal(edit(pipe, pictures), large)
    assert pipe.reference_store.stats.restored == 5


def test_host_memory_that_cannot_be_had_is_a_warning(
    stub: Callable[..., KleinKVPipeline],
    pictures: list[Image.Image],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = {"reference_cache_bytes": 30 * TOKEN, "reference_cache_dir": tmp_path}
    pipe = stub(DeviceStub, host_cache_bytes=1 << 20, **options)
    assert isinstance(pipe.backend, DeviceStub)
    assert pipe.backend.host is not None
    pipe.backend.host.budget = 0  # as if the system pinned no more
    with caplog.at_level(logging.WARNING, "klein_kv"):
        expected = [edit(pipe, [image]) for image in pictures[:2]]
    assert "not kept in host memory: no pages are left" in caplog.text
    assert len(files_of(tmp_path)) == 1
    np.testing.assert_array_equal(edit(pipe, pictures[:1]), expected[0])


def test_host_memory_below_host_memory_is_refused(
    stub: Callable[..., KleinKVPipeline],
) -> None:
    with pytest.raises(
        RequestError, match="onnxruntime cannot use: its keys and values are in host"
    ):
        stub(host_cache_bytes=1 << 20)
    with pytest.raises(RequestError, match="host_cache_bytes is -1, expected 0 or more"):
        stub(host_cache_bytes=-1)
    with pytest.raises(RequestError, match="host_cache_bytes is given and reference_cache_bytes"):
        stub(DeviceStub, reference_cache_bytes=0, host_cache_bytes=1 << 20)


# --- the folder ---


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)


def test_evicted_sets_come_back_after_a_restart(
    stub: Callable[..., KleinKVPipeline], pictures: list[Image.Image], tmp_path: Path
) -> None:
    options = {"reference_cache_bytes": 30 * TOKEN, "reference_cache_dir": tmp_path / "a" / "b"}
    pipe = stub(**options)
    expected = [edit(pipe, [image]) for image in pictures[:3]]
    assert len(files_of(tmp_path / "a" / "b")) == 2
    restarted = stub(**options)
    for image, latents in zip(pictures[:2], expected, strict=False):
        np.testing.assert_array_equal(edit(restarted, [image]), latents)
    stats = restarted.reference_store.stats
    assert (stats.restored, stats.misses) == (2, 0)
    assert "first_step" not in graphs_of(restarted)
    assert restarted.reference_store.second.budget > 1 << 20


def test_folder_keeps_to_its_budget_and_drops_the_longest_unused(
    stub: Callable[..., KleinKVPipeline], pictures: list[Image.Image], tmp_path: Path
) -> None:
    # Every set is larger than the memory, so it goes to the folder at once.
    pipe = stub(
        reference_cache_bytes=1, reference_cache_dir=tmp_path, reference_cache_dir_bytes=80_000
    )
    folder = pipe.reference_store.second
    assert isinstance(folder, ReferenceFolder)
    digests = []
    for i, image in enumerate(pictures[:4]):
        references = pipe.encode_references(image)
        digests.append(references.digest)
        os.utime(tmp_path / f"{references.digest}.safetensors", (i, i))
        assert folder.bytes <= 80_000
        del references
    assert {path.stem for path in tmp_path.iterdir()} == set(digests[2:])
    assert folder.load(digests[2]) is not None  # used again
    pipe.encode_references(pictures[4])
    assert digests[2] in {path.stem for path in tmp_path.iterdir()}
    assert digests[3] not in {path.stem for path in tmp_path.iterdir()}
    large = pipe.encode_references(pictures)
    assert f"{large.digest}.safetensors" not in os.listdir(tmp_path)  # noqa: PTH208


@pytest.mark.parametrize("damage", ["cut", "garbage", "other"])
def test_damaged_file_is_dropped_and_computed_again(
    damage: str,
    stub: Callable[..., KleinKVPipeline],
    pictures: list[Image.Image],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = {"reference_cache_bytes": 30 * TOKEN, "reference_cache_dir": tmp_path}
    pipe = stub(**options)
    expected = edit(pipe, pictures[:1])
    edit(pipe, pictures[1:2])
    edit(pipe, pictures[2:3])
    one, two = files_of(tmp_path)
    content = {"cut": one.read_bytes()[:-9], "garbage": b"?" * 500, "other": two.read_bytes()}
    one.write_bytes(content[damage])
    restarted = stub(**options)
    with caplog.at_level(logging.WARNING, "klein_kv"):
        np.testing.assert_array_equal(edit(restarted, pictures[:1]), expected)
    assert "dropping" in caplog.text
    assert not one.exists()
    assert restarted.reference_store.stats.misses == 1
    edit(restarted, pictures[1:2])
    assert one.exists()  # evicted, written anew


def test_full_disk_leaves_the_store_usable(
    stub: Callable[..., KleinKVPipeline],
    pictures: list[Image.Image],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    pipe = stub(reference_cache_bytes=30 * TOKEN, reference_cache_dir=tmp_path)
    plain = stub(reference_cache_bytes=0)
    monkeypatch.setattr("klein_kv.runtime.references.reference_file.os.fsync", full)
    with caplog.at_level(logging.WARNING, "klein_kv"):
        for image in [*pictures, *pictures]:
            np.testing.assert_array_equal(edit(pipe, [image]), edit(plain, [image]))
    assert "No space left" in caplog.text
    assert list(tmp_path.iterdir()) == []
    assert pipe.reference_store.stats.evictions == 9
    monkeypatch.undo()
    edit(pipe, pictures[:1])
    assert len(files_of(tmp_path)) == 1


def test_removed_folder_is_a_warning(
    stub: Callable[..., KleinKVPipeline],
    pictures: list[Image.Image],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "sets"
    pipe = stub(reference_cache_bytes=30 * TOKEN, reference_cache_dir=folder)
    folder.rmdir()
    with caplog.at_level(logging.WARNING, "klein_kv"):
        for image in pictures:
            edit(pipe, [image])
    assert "reference set not kept" in caplog.text


def test_sets_of_other_weights_are_never_returned(
    stub: Callable[..., KleinKVPipeline],
    tiny_artifacts: Path,
    manifest: Manifest,
    pictures: list[Image.Image],
    tmp_path: Path,
) -> None:
    options = {"reference_cache_bytes": 30 * TOKEN, "reference_cache_dir": tmp_path}
    pipe = stub(**options)
    for image in pictures[:2]:
        edit(pipe, [image])
    (path,) = files_of(tmp_path)
    changed = dict(manifest.files)
    name = next(name for name in changed if name.endswith(".safetensors"))
    changed[name] = replace(changed[name], digest=hashlib.sha256(b"other").hexdigest())
    other_manifest = replace(manifest, files=changed)
    other = KleinKVPipeline(tiny_artifacts, other_manifest, Stub(manifest), **options)
    other.set_progress_bar_config(disable=True)
    edit(other, pictures[:1])
    assert other.reference_store.stats.misses == 1
    # Not even under the other's name.
    digest = other._encoder.prepare(pictures[1:2]).digest
    path.rename(tmp_path / f"{digest}.safetensors")
    edit(other, pictures[1:2])
    assert other.reference_store.stats.restored == 0


def test_leftovers_of_killed_processes_are_removed(
    stub: Callable[..., KleinKVPipeline], tmp_path: Path
) -> None:
    old, new, foreign = (tmp_path / name for name in (".a.1.part", ".b.2.part", "notes.txt"))
    for path in (old, new, foreign):
        path.write_bytes(b"x")
    past = time.time() - 2 * reference_store._STALE_SECONDS
    for path in (old, foreign):
        os.utime(path, (past, past))
    pipe = stub(reference_cache_dir=tmp_path)
    assert not old.exists()
    assert new.exists()
    assert foreign.exists()
    assert pipe.reference_store.second.bytes == 0
