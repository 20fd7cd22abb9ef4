"""Plain klein weights: one graph that takes the references at every step, as diffusers does."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import Flux2KleinPipeline
from numpy.typing import NDArray

from klein_kv import KleinKVPipeline
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.signature import PLAIN_GRAPH_FILES, SMALL_GRAPH_FILES, make_signature
from klein_kv.artifacts.weights import graph_weights
from klein_kv.errors import RequestError
from klein_kv.export.exporter import export_checkpoint
from tests.checkpoints import load_plain_diffusers

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def theirs(plain_checkpoint: Path) -> Flux2KleinPipeline:
    return load_plain_diffusers(plain_checkpoint)


def test_folder(plain_artifacts: Path) -> None:
    manifest = Manifest.load(plain_artifacts)
    assert manifest.variant == "plain"
    graphs = {
        path.relative_to(plain_artifacts).as_posix() for path in plain_artifacts.rglob("*.onnx")
    }
    assert graphs == {*PLAIN_GRAPH_FILES.values(), *SMALL_GRAPH_FILES.values()}
    weights = graph_weights(plain_artifacts, PLAIN_GRAPH_FILES["plain_step"])
    assert len(weights) > 40
    signature = make_signature("plain_step", manifest.config, "float32")
    assert [spec.name for spec in signature.outputs] == ["noise_pred", "latents"]
    assert {"ref_hidden_states", "ref_ids"} < {spec.name for spec in signature.inputs}


@pytest.mark.parametrize(("batch", "references"), [(1, 0), (2, 1), (1, 2)])
def test_every_step_of_diffusers_plain_pipeline(
    plain_artifacts: Path,
    theirs: Flux2KleinPipeline,
    monkeypatch: pytest.MonkeyPatch,
    picture: Any,
    batch: int,
    references: int,
) -> None:
    """What diffusers gives its transformer goes to the graph, which gives what diffusers gets."""
    calls: list[tuple[dict[str, Any], NDArray[Any]]] = []
    forward = theirs.transformer.forward

    def record(**inputs: Any) -> tuple[torch.Tensor]:
        out = forward(**inputs)
        calls.append((inputs, out[0].numpy()))
        return out

    monkeypatch.setattr(theirs.transformer, "forward", record)
    final = theirs(
        prompt="a kite",
        image=[picture(128, 96 + 32 * i, i) for i in range(references)] or None,
        height=128,
        width=112,
        num_inference_steps=3,
        num_images_per_prompt=batch,
        max_sequence_length=32,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images
    assert len(calls) == 3
    sigmas = [*theirs.scheduler.sigmas.numpy()]
    session = onnxruntime.InferenceSession(plain_artifacts / PLAIN_GRAPH_FILES["plain_step"])
    tokens = 8 * 7
    for i, (inputs, predicted) in enumerate(calls):
        hidden, ids = inputs["hidden_states"].numpy(), inputs["img_ids"][0].numpy()
        assert (hidden.shape[1] > tokens) == bool(references)
        feeds = {
            "hidden_states": hidden[:, :tokens],
            "ref_hidden_states": hidden[:1, tokens:],
            "encoder_hidden_states": inputs["encoder_hidden_states"].numpy(),
            "timestep": inputs["timestep"][:1].numpy() * np.float32(1000),
            "sigma_step": np.array([sigmas[i + 1] - sigmas[i]], np.float32),
            "img_ids": ids[:tokens].astype(np.int64),
            "ref_ids": ids[tokens:].astype(np.int64),
            "txt_ids": inputs["txt_ids"][0].numpy().astype(np.int64),
        }
        noise, latents = session.run(["noise_pred", "latents"], feeds)
        assert np.abs(noise - predicted[:, :tokens]).max() <= TOLERANCE
        if i + 1 < len(calls):
            expected = calls[i + 1][0]["hidden_states"].numpy()[:, :tokens]
            assert np.abs(latents - expected).max() <= TOLERANCE
    assert final.shape[0] == batch
    assert np.abs(noise).max() > 0.1


def test_base_weights_need_guidance(plain_checkpoint, tmp_path, caplog):
    """Undistilled weights are exported, but not without a word."""
    folder = tmp_path / "base"
    shutil.copytree(plain_checkpoint, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"is_distilled": False}))
    with caplog.at_level(logging.WARNING):
        export_checkpoint(folder, tmp_path / "out")
    assert "is not distilled: it needs classifier-free guidance" in caplog.text
    with pytest.raises(RequestError, match="not distilled: they need classifier-free guidance"):
        KleinKVPipeline.from_pretrained(tmp_path / "out", threads=1)
