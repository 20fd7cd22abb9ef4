"""CPU backends of the self-test's references, opened once: loading their graphs takes longest."""

from pathlib import Path

import pytest

from klein_kv.manifest import Manifest
from klein_kv.runtime import selftest_reference
from klein_kv.runtime.ort_backend import OrtBackend
from klein_kv.signature import GraphSet

__all__ = ["Kept", "keep_references"]

Kept = dict[tuple[Path, GraphSet], OrtBackend]


class _KeptBackend(OrtBackend):
    def release(self, graph: str) -> None:
        pass


def keep_references(monkeypatch: pytest.MonkeyPatch, kept: Kept) -> None:
    """Has the self-test take its references from `kept`, which tests of a file share."""

    def open_kept(artifacts: Path, manifest: Manifest, graphs: GraphSet) -> OrtBackend:
        key = artifacts, graphs
        if key not in kept:
            kept[key] = _KeptBackend(artifacts, manifest, threads=1, graphs=graphs)
        return kept[key]

    monkeypatch.setattr(selftest_reference, "OrtBackend", open_kept)
