"""Fixtures of the export's tests."""

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from klein_kv.signature import GRAPH_FILES


@pytest.fixture(scope="session")
def tiny_vae_graph(tiny_artifacts: Path) -> Callable[..., ir.Model]:
    """In place of `vae_graph`, which traces for ten seconds: what it made of the tiny checkpoint.

    Right for any export in float32 that links the same VAE file.
    """

    def load(graph: str, *_: object) -> ir.Model:
        return ir.load(tiny_artifacts / GRAPH_FILES[graph])

    return load
