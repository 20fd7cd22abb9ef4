"""Adapters on the command line: merged for one image, or into artifacts for good."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from klein_kv import KleinKVPipeline
from klein_kv.artifacts.manifest import Manifest
from tests.klein_kv.test_cli import run
from tests.runtime.lora.test_lora_pipeline import make_adapter

SIZE = {"height": 64, "width": 80}


@pytest.fixture
def lora(tiny_ours: KleinKVPipeline, tmp_path: Path) -> Path:
    path = tmp_path / "style.safetensors"
    save_file(make_adapter(tiny_ours, 1), path)
    return path


def picture(pipe: KleinKVPipeline, lora: Path | None = None, weight: float = 1.0) -> Any:
    if lora is not None:
        pipe.load_lora_weights(lora)
        pipe.set_adapters(pipe.get_active_adapters(), weight)
    image = pipe("x", seed=1, num_inference_steps=1, **SIZE).images[0]
    pipe.unload_lora_weights()
    return np.asarray(image)


def generate(capsys: Any, artifacts: Path, out: Path, *more: object) -> Any:
    size = ("--height", 64, "--width", 80, "--steps", 1, "--seed", 1)
    code, _, errors = run(capsys, "generate", artifacts, "-p", "x", "-o", out, *size, *more)
    assert code == 0, errors
    with Image.open(out) as image:
        return np.asarray(image), json.loads(image.text["klein_kv"])


def test_generate_merges_adapters(
    capsys: Any, tiny_artifacts: Path, tiny_ours: KleinKVPipeline, lora: Path, tmp_path: Path
) -> None:
    expected = picture(tiny_ours, lora, 0.25)
    options = ("--lora", f"{lora}:0.5", "--lora", f"{lora}:-.25")
    pixels, facts = generate(capsys, tiny_artifacts, tmp_path / "a.png", *options)
    assert np.abs(pixels.astype(int) - expected).max() <= 1
    assert not np.array_equal(pixels, picture(tiny_ours))
    assert facts["model"] == "tiny + style.safetensors:0.5 + style.safetensors:-0.25"


def test_export_merges_adapters_for_good(
    capsys: Any, tiny_checkpoint: Path, tiny_ours: KleinKVPipeline, lora: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "artifacts"
    code, _, errors = run(capsys, "export", tiny_checkpoint, folder, "--lora", f"{lora}:2")
    assert code == 0, errors
    with KleinKVPipeline.from_pretrained(folder, backend="onnxruntime", threads=1) as pipe:
        np.testing.assert_array_equal(picture(pipe), picture(tiny_ours, lora, 2.0))
    assert Manifest.load(folder).model_id == "tiny + style.safetensors:2"


@pytest.mark.parametrize("weight", ["5", "x"])
def test_bad_weights(capsys: Any, tiny_artifacts: Path, weight: str) -> None:
    with pytest.raises(SystemExit):
        run(capsys, "generate", tiny_artifacts, "-p", "x", "--lora", f"a.safetensors:{weight}")
    assert "expected a number of -4 to 4" in capsys.readouterr().err
