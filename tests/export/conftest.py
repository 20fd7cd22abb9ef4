"""What tests of exports share."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.bfl_files import bfl_state


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to change."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "tiny"))


@pytest.fixture(scope="session")
def bfl_tensors(tiny_checkpoint: Path) -> dict[str, Tensor]:
    """The tiny transformer under the names, and in the layout, of Black Forest Labs; float32."""
    file = tiny_checkpoint / "transformer/diffusion_pytorch_model.safetensors"
    return bfl_state(load_file(file))
