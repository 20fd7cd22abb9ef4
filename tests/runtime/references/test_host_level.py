"""The pipeline on a stand-in GPU with reference sets in pinned host memory below its store.

The stand-in's streams lag behind each other (`fake_cuda`), so a copy that is not put in order with
the engines' work gives wrong images.
"""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from klein_kv import KleinKVPipeline
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.signature import KVFormat
from klein_kv.runtime.backends.trt import pinned
from klein_kv.runtime.backends.trt.backend import TrtBackend
from klein_kv.runtime.backends.trt.pinned import PinnedStore
from tests.runtime.backends.fake_cuda import FakeCuda
from tests.runtime.backends.fake_engines import make_engines
from tests.runtime.backends.fake_trt import FakeTrt
from tests.runtime.conftest import Open, Picture, Pictures

LAGS = [(), (0,), (1,), (0, 1)]
PAGE = 4096
REQUEST: dict[str, Any] = {
    "prompt": "a kite",
    "height": 128,
    "width": 128,
    "seed": 3,
    "num_inference_steps": 2,
    "max_sequence_length": 64,
    "output_type": "latent",
}


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PinnedStore.__init__, "__defaults__", (PAGE,))


@pytest.fixture(scope="module", params=[None, KVFormat.FP8_PER_HEAD], ids=["exact", "float8"])
def engines(
    request: pytest.FixtureRequest, tiny_artifacts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    manifest = Manifest.load(tiny_artifacts)
    graphs = manifest.choose_graphs(request.param or manifest.dtype)
    return make_engines(tiny_artifacts, tmp_path_factory.mktemp("engines"), graphs)


@pytest.fixture
def machine(tiny_artifacts: Path, engines: Path) -> Open:
    """Pipelines on a GPU of their own."""
    manifest = Manifest.load(tiny_artifacts)
    kv_dtype = _kv_dtype(engines)
    graphs = manifest.choose_graphs(kv_dtype or manifest.dtype)

    def make(
        lagging: tuple[int, ...] = (), capacity: int = 1 << 34, **options: Any
    ) -> KleinKVPipeline:
        cuda = FakeCuda(capacity, lagging)
        trt = FakeTrt(tiny_artifacts, cuda, graphs=graphs)
        backend = TrtBackend(
            tiny_artifacts, manifest, engines=engines, cuda=cuda.cuda, trt=trt, graphs=graphs
        )
        name = None if kv_dtype is None else "fp8"
        pipe = KleinKVPipeline(tiny_artifacts, manifest, backend, kv_dtype=name, **options)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def _kv_dtype(engines: Path) -> str | None:
    from klein_kv.artifacts.engines.engine_manifest import EngineManifest

    return EngineManifest.load(engines).kv_dtype


@pytest.fixture(scope="module")
def sets(picture: Picture) -> list[Pictures]:
    sizes = [[(64, 64)], [(80, 64), (64, 64)], [(64, 64)], [(96, 64)]]
    return [
        [picture(*size, seed=10 * i + j) for j, size in enumerate(row)]
        for i, row in enumerate(sizes)
    ]


def cuda_of(pipe: KleinKVPipeline) -> FakeCuda:
    cuda: FakeCuda = pipe.backend._trt.cuda  # type: ignore[attr-defined]
    return cuda


def set_bytes(pipe: KleinKVPipeline, images: Pictures) -> int:
    return pipe.encoder.set_of(pipe.encoder.prepare(images), {}).nbytes


@pytest.mark.parametrize("lagging", LAGS)
def test_images_do_not_depend_on_where_the_references_were(
    lagging: tuple[int, ...], machine: Open, sets: list[Pictures]
) -> None:
    plain = machine(reference_cache_bytes=0)
    expected = [plain(image=images, **REQUEST).images for images in sets]
    one = max(set_bytes(plain, images) for images in sets)
    host = 20 * PAGE if plain.graphs.kv_dtype else 40 * PAGE
    pipe = machine(lagging, reference_cache_bytes=one, host_cache_bytes=host)
    cuda = cuda_of(pipe)
    for i in (0, 1, 2, 3, 1, 0, 0, 2, 3, 1, 2, 0):
        latents = pipe(image=sets[i], **REQUEST).images
        np.testing.assert_array_equal(latents, expected[i])
        assert pipe.reference_store.stats.bytes <= one
        assert pipe.reference_store.stats.host_bytes <= host
    stats = pipe.reference_store.stats
    assert (stats.misses, stats.misses + stats.restored + stats.hits) == (4, 12)
    assert stats.restored >= 6
    pipe.reference_store.clear()
    pipe.backend.close()  # type: ignore[attr-defined]
    gc.collect()
    assert not cuda.pinned
    assert not cuda.used


def test_references_come_back_while_the_text_is_encoded(
    machine: Open, sets: list[Pictures], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = machine((0, 1), reference_cache_bytes=1, host_cache_bytes=1 << 20)
    pipe(image=sets[0], **REQUEST)  # too large for the store: handed down at once
    log: list[str] = []
    run, restore = pipe.backend.run, pinned.PinnedStore.restore
    monkeypatch.setattr(pipe.backend, "run", lambda g, x: log.append(g) or run(g, x))
    monkeypatch.setattr(
        PinnedStore, "restore", lambda self, copy: log.append("restore") or restore(self, copy)
    )
    pipe(image=sets[0], **(REQUEST | {"prompt": "another"}))
    assert log == ["restore", "text_encoder", "cached_step", "cached_step"]


def test_a_copy_that_is_there_is_not_made_again(machine: Open, sets: list[Pictures]) -> None:
    pipe = machine(reference_cache_bytes=1, host_cache_bytes=1 << 20)
    cuda = cuda_of(pipe)
    pipe(image=sets[0], **REQUEST)
    downloads = sum(kind == 2 for kind, _ in cuda.copies)
    for _ in range(3):
        pipe(image=sets[0], **REQUEST)
    # The latents, once per request; no keys and values.
    assert sum(kind == 2 for kind, _ in cuda.copies) == downloads + 3


@pytest.mark.parametrize("lagging", LAGS)
def test_memory_that_is_still_copied_is_not_written(
    lagging: tuple[int, ...], machine: Open, tmp_path: Path
) -> None:
    """Regression: a set from a file went over one that was on its way to the host."""
    rng = np.random.default_rng(0)
    first, second = (
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(2)
    )
    pipe = machine(lagging, reference_cache_bytes=1, host_cache_bytes=1 << 20)
    expected = [pipe(image=image, **REQUEST).images for image in (first, second)]
    pipe.encode_references(second).save(tmp_path / "second.safetensors")
    other = machine(lagging, reference_cache_bytes=1, host_cache_bytes=1 << 20)
    other.encode_references(first)  # given up at once
    loaded = other.load_references(tmp_path / "second.safetensors")
    np.testing.assert_array_equal(other(references=loaded, **REQUEST).images, expected[1])
    del loaded
    np.testing.assert_array_equal(other(image=first, **REQUEST).images, expected[0])
