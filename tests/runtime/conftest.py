"""What tests of the runtime share."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from klein_kv import KleinKVPipeline
from klein_kv.export.checkpoints.fixture import make_fixture
from klein_kv.export.exporter import export_checkpoint
from klein_kv.runtime.backends.backend import Buffer
from klein_kv.runtime.planning import memory
from tests.conftest import MadeOnce


class Run(NamedTuple):
    """One run of a graph; the buffers are kept alive."""

    graph: str
    inputs: dict[str, Buffer]
    outputs: dict[str, Buffer]


Picture = Callable[..., Image.Image]
Pictures = list[Image.Image]
Open = Callable[..., KleinKVPipeline]
SetFree = Callable[[int], None]
Watch = Callable[[KleinKVPipeline], list[Run]]


@pytest.fixture(scope="session")
def pocket_checkpoint(made_once: MadeOnce) -> Path:
    """The trained checkpoint, with its adapter beside it."""
    return made_once("pocket", lambda folder: make_fixture(folder / "pocket", "pocket")) / "pocket"


@pytest.fixture(scope="session")
def pocket_artifacts(made_once: MadeOnce, pocket_checkpoint: Path) -> Path:
    """The trained checkpoint, exported in float32."""

    def make(folder: Path) -> None:
        export_checkpoint(pocket_checkpoint, folder / "fp32", variant="kv", dtype="float32")

    return made_once("pocket-fp32", make) / "fp32"


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Notes every run of a pipeline's graphs from now on."""

    def start(pipe: KleinKVPipeline) -> list[Run]:
        runs: list[Run] = []
        run = pipe.backend.run

        def note(graph: str, inputs: Mapping[str, Buffer]) -> dict[str, Buffer]:
            outputs = run(graph, inputs)
            runs.append(Run(graph, dict(inputs), dict(outputs)))
            return outputs

        monkeypatch.setattr(pipe.backend, "run", note)
        return runs

    return start


@pytest.fixture
def set_free(monkeypatch: pytest.MonkeyPatch) -> SetFree:
    """Has the host say that so many bytes of memory are free."""
    return lambda nbytes: monkeypatch.setattr(memory, "available_memory", lambda: nbytes)


@pytest.fixture
def no_graph_runs(tiny_ours: KleinKVPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend of `tiny_ours` fails the test if it is asked for anything."""

    def run(graph: str, _inputs: Any) -> None:
        pytest.fail(f"{graph} ran before the request was refused")

    monkeypatch.setattr(tiny_ours.backend, "run", run)
