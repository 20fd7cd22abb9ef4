"""What tests of adapters share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def artifacts(quantized_artifacts: Path) -> Path:
    """The tiny artifacts in float32, and numbers in fp8 and nvfp4."""
    return quantized_artifacts
