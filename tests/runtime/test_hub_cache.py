"""Artifacts in the hub's cache, where every file is a link."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from klein_kv.artifacts.manifest import Manifest
from klein_kv.errors import ArtifactError
from tests.conftest import load_ours


@pytest.fixture
def snapshot(tiny_artifacts: Path, tmp_path: Path) -> Path:
    """As `snapshot_download` lays a repository out."""
    repository = tmp_path / "models--me--klein-artifacts"
    (repository / "blobs").mkdir(parents=True)
    folder = repository / "snapshots" / ("0123456789" * 4)
    for path in tiny_artifacts.rglob("*"):
        if path.is_file():
            blob = repository / "blobs" / hashlib.sha256(str(path).encode()).hexdigest()
            os.link(path, blob)
            link = folder / path.relative_to(tiny_artifacts)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return folder


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_artifacts_in_the_cache_run(snapshot, any_ours, backend):
    """They were refused as links out of their folder."""
    request = {"prompt": "a kite", "height": 64, "width": 64, "seed": 1, "num_inference_steps": 1}
    request["max_sequence_length"] = 64
    with load_ours(snapshot, backend) as pipe:
        got = pipe(output_type="np", **request).images
    np.testing.assert_array_equal(got, any_ours(output_type="np", **request).images)


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_out_of_the_repository_are_refused(snapshot: Path, tmp_path: Path) -> None:
    link = snapshot / "vae/decoder.onnx"
    outside = tmp_path / "models--you--other" / "blobs" / "0"
    outside.parent.mkdir(parents=True)
    os.link(link.resolve(), outside)
    link.unlink()
    link.symlink_to(outside)
    with pytest.raises(ArtifactError, match=r"is a link to .*, outside the folder"):
        Manifest.load(snapshot)
