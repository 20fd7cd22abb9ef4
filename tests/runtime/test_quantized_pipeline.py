"""Whole requests on quantized graphs, on the CPU; and which engines a precision takes."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from klein_kv import KleinKVPipeline
from klein_kv.artifacts.engines.engine_manifest import EngineManifest
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.signature import KVFormat
from klein_kv.errors import ArtifactError, RequestError
from klein_kv.runtime.backends.trt.backend import TrtBackend

KINDS: dict[str, dict[str, str]] = {
    "fp8": {"precision": "fp8"},
    "fp8 K/V": {"precision": "fp8", "kv_dtype": "fp8"},
    "fp8 attention": {"precision": "fp8", "attention": "fp8"},
}


@pytest.fixture(scope="module")
def artifacts(quantized_artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny artifacts in float32, and in fp8."""
    folder = tmp_path_factory.mktemp("quantized") / "artifacts"
    return Path(shutil.copytree(quantized_artifacts, folder))


def load(artifacts: Path, **options: Any) -> KleinKVPipeline:
    pipe = KleinKVPipeline.from_pretrained(artifacts, threads=1, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make(pipe: KleinKVPipeline, **options: Any) -> NDArray[Any]:
    out = pipe(
        "a kite",
        height=128,
        width=128,
        seed=3,
        num_inference_steps=2,
        max_sequence_length=64,
        output_type="latent",
        **options,
    )
    assert not isinstance(out, tuple)
    return np.asarray(out.images)


def photos() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)) for _ in range(2)]


@pytest.fixture(scope="module")
def exact(artifacts: Path) -> NDArray[Any]:
    return make(load(artifacts), image=photos())


@pytest.mark.parametrize("kind", KINDS)
def test_requests_in_fp8(artifacts: Path, exact: NDArray[Any], tmp_path: Path, kind: str) -> None:
    pipe = load(artifacts, **KINDS[kind])
    latents = make(pipe, image=photos())
    error = np.linalg.norm(latents - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.1  # it is another model; measured 0.02
    references = pipe.encode_references(photos())
    np.testing.assert_array_equal(make(pipe, references=references), latents)
    bytes_per_number = 4 if kind == "fp8" else 1
    net = pipe.config.transformer
    # 2 images of 16 tokens: keys and values, and nothing beside them.
    assert references.nbytes == 2 * 32 * net.num_blocks * net.inner_dim * bytes_per_number
    references.save(tmp_path / "refs.safetensors")
    again = load(artifacts, **KINDS[kind]).load_references(tmp_path / "refs.safetensors")
    np.testing.assert_array_equal(make(pipe, references=again), latents)
    with pytest.raises(RequestError, match="belong to other weights"):
        load(artifacts).load_references(tmp_path / "refs.safetensors")


def test_a_precision_that_is_not_there(artifacts: Path, tiny_artifacts: Path) -> None:
    with pytest.raises(ArtifactError, match="klein-kv quantize ARTIFACTS --recipe nvfp4"):
        load(tiny_artifacts, precision="nvfp4")
    with pytest.raises(RequestError, match="attention is 'fp8' and no quantized precision"):
        load(artifacts, attention="fp8")


def save_engines(artifacts: Path, name: str, **options: Any) -> None:
    folder = artifacts / "engines" / name
    folder.mkdir(parents=True)
    EngineManifest(
        module="tensorrt_rtx",
        version="0",
        target="rtx5090",
        sm=120,
        weights="shared",
        recipe="default",
        engines={},
        **options,
    ).save(folder)


def test_engines_are_those_of_the_graphs(artifacts: Path) -> None:
    """A folder may hold engines of several precisions; each set of graphs takes its own."""
    manifest = Manifest.load(artifacts, check_files=False)
    fp8 = manifest.choose_graphs(precision="fp8")
    attention = manifest.choose_graphs(precision="fp8", attention="fp8")

    def opened(engines: Path | None = None, graphs: Any = fp8) -> None:
        TrtBackend(artifacts, manifest, engines=engines, graphs=graphs, trt=_WrongModule())

    save_engines(artifacts, "a", precision="bf16")
    with pytest.raises(
        ArtifactError, match=r"no engines of precision fp8 in .*; build .*precision fp8"
    ):
        opened()
    with pytest.raises(ArtifactError, match=r"with float8 attention in .*--attention fp8"):
        opened(graphs=attention)
    with pytest.raises(ArtifactError, match="these are engines of rtx5090 bf16 default"):
        opened(artifacts / "engines" / "a")
    save_engines(artifacts, "b", precision="fp8")
    save_engines(artifacts, "c", precision="fp8", kv_dtype=KVFormat.FP8_CONSTANT, attention="fp8")
    for graphs in (fp8, attention, manifest.graphs):
        # Past the choice of the folder, to the check of the library.
        with pytest.raises(Exception, match="the engines were built with tensorrt_rtx 0"):
            opened(graphs=graphs)


class _WrongModule:
    __name__ = "tensorrt_rtx"
    __version__ = "1"
