"""Fixtures that every test may use."""

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    """Keep torch from starting one thread per core: the models are tiny."""
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of size `tiny`, seed 0, float32. Shared: read it only."""
    from klein_kv.export.fixture import make_fixture

    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    make_fixture(folder, "tiny", seed=0)
    return folder
