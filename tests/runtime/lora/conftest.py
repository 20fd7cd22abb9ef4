"""What tests of adapters share."""

import shutil
from pathlib import Path

import pytest

from klein_kv.export.checks.samples import make_samples
from klein_kv.export.quantization.quantization_recipe import QuantizationRecipe
from klein_kv.export.quantization.quantize import quantize_artifacts
from tests.conftest import MadeOnce


@pytest.fixture(scope="session")
def artifacts(tiny_artifacts: Path, made_once: MadeOnce) -> Path:
    """The tiny artifacts in float32, and numbers in fp8 and nvfp4."""

    def make(folder: Path) -> None:
        shutil.copytree(tiny_artifacts, folder / "artifacts")
        for recipe in ("fp8", "nvfp4"):
            samples = make_samples(1, size=(64, 64))
            recipe = QuantizationRecipe.load(recipe)
            quantize_artifacts(folder / "artifacts", recipe, samples, text_tokens=16)

    return made_once("tiny-quantized", make) / "artifacts"
