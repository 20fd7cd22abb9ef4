"""Adapters on engines, over the stand-ins: the same addresses, and only what changes is moved."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from klein_kv.artifacts.manifest import Manifest
from klein_kv.runtime.backends.trt.backend import TrtBackend
from klein_kv.runtime.pipeline import KleinKVPipeline
from tests.conftest import load_ours
from tests.runtime.backends.fake_cuda import FakeCuda
from tests.runtime.backends.fake_engines import make_engines
from tests.runtime.backends.fake_trt import FakeTrt
from tests.runtime.lora.test_lora_pipeline import REQUEST, make_adapter


@pytest.fixture
def pipe(tiny_artifacts: Path, tmp_path: Path) -> KleinKVPipeline:
    cuda, manifest = FakeCuda(), Manifest.load(tiny_artifacts)
    engines = make_engines(tiny_artifacts, tmp_path)
    trt = FakeTrt(tiny_artifacts, cuda)
    backend = TrtBackend(tiny_artifacts, manifest, engines=engines, cuda=cuda.cuda, trt=trt)
    pipeline = KleinKVPipeline(tiny_artifacts, manifest, backend)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def edit(pipe: KleinKVPipeline) -> Any:
    noise = np.random.default_rng(3).standard_normal((1, 128, 4, 5)).astype(np.float32)
    result: Any = pipe("a kite", latents=noise, **REQUEST)
    return result.images


def test_a_switch_moves_the_touched_tensors_and_nothing_else(
    pipe: KleinKVPipeline, tiny_artifacts: Path
) -> None:
    trt = pipe.backend._trt
    base = edit(pipe)
    edit(pipe)
    engines, captures = dict(trt.engines), trt.captures.copy()
    adapter = make_adapter(pipe, 1)
    downs = {key: down for key, down in adapter.items() if "lora_A" in key}
    touched = sum(
        adapter[key.replace("lora_A", "lora_B")].shape[0] * down.shape[1] * 4
        for key, down in downs.items()
    )
    copies = len(trt.cuda.copies)
    edit(pipe)
    inputs = sum(nbytes for kind, nbytes in trt.cuda.copies[copies:] if kind == 1)

    pipe.load_lora_weights(adapter)
    copies = len(trt.cuda.copies)
    changed = edit(pipe)
    moved = sum(nbytes for kind, nbytes in trt.cuda.copies[copies:] if kind == 1)
    assert moved == touched + inputs
    expected = load_ours(tiny_artifacts)
    expected.load_lora_weights(adapter)
    np.testing.assert_allclose(changed, edit(expected), atol=1e-5)

    pipe.unload_lora_weights()
    np.testing.assert_array_equal(edit(pipe), base)
    assert trt.engines == engines, "no engine was loaded anew"
    assert trt.captures == captures, "no graph was captured anew"
