"""Export, quantize and build, killed at any moment: the next run succeeds and nothing is left.

`pytest tests/test_killed.py --kills 50` does so more often.
"""

import gc
import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from threading import RLock

import psutil
import pytest
from tqdm import tqdm

from klein_kv.artifacts.engines.engine_manifest import EngineManifest
from klein_kv.artifacts.manifest import Manifest
from klein_kv.cli import main
from klein_kv.engines.build import build_artifacts, engine_folder
from klein_kv.engines.sizes.recipe import Recipe
from klein_kv.export import exporter
from klein_kv.export.exporter import export_checkpoint
from klein_kv.export.quantization.quantization_recipe import QuantizationRecipe
from klein_kv.export.quantization.quantize import quantize_artifacts
from tests.klein_configs import TINY_PROFILE

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

GRAPHS = ["blend", "encode_references"]
Job = Callable[[Path], object]


def start(work: Callable[[], object]) -> int:
    """Runs it in a process that has all libraries loaded already; returns its number."""
    tqdm.set_lock(RLock())  # that of processes together stays locked where one is killed with it
    gc.collect()  # a child that ended a session of ONNX Runtime would wait for threads it has not
    pid = os.fork()
    if pid:
        return pid
    code: object = 99
    try:
        code = work()
    except BaseException:  # noqa: BLE001 - there is no one above to tell
        traceback.print_exc()
    finally:
        os._exit(code if isinstance(code, int) else 0)


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def killed_and_repeated(work: Job, fresh: Callable[[], Path], kills: int) -> None:
    """Whatever moment it is killed at, the second run leaves what an undisturbed one leaves."""
    whole = fresh()
    begin = time.perf_counter()
    assert exit_code(start(lambda: work(whole))) == 0
    seconds, expected = time.perf_counter() - begin, files_below(whole)
    assert not [name for name in expected if "partial-" in name]
    died, generator = 0, random.Random()
    while died < kills:
        place, delay = fresh(), generator.uniform(0, seconds)
        pid = start(lambda place=place: work(place))  # type: ignore[misc]
        begin = time.perf_counter()
        while (ran := time.perf_counter() - begin) < delay:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                seconds = ran  # the first run was slow: kills would come too late
                break
            time.sleep(0.005)
        os.kill(pid, signal.SIGKILL)
        died += exit_code(pid) == -signal.SIGKILL
        assert exit_code(start(lambda place=place: work(place))) == 0, delay  # type: ignore[misc]
        assert files_below(place) == expected, delay
        Manifest.load(place / "artifacts")
        shutil.rmtree(place)
    print(f"killed {died} times within {seconds:.2f} s")  # noqa: T201 - for long runs


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[[Path | None], Callable[[], Path]]:
    """Makes folders, with a copy of artifacts in them or without."""
    count = iter(range(1000))

    def of(artifacts: Path | None) -> Callable[[], Path]:
        def make() -> Path:
            place = tmp_path / f"run-{next(count)}"
            place.mkdir()
            if artifacts is not None:
                shutil.copytree(artifacts, place / "artifacts", copy_function=os.link)
            return place

        return make

    return of


def test_killed_export(tiny_checkpoint, fresh, kills):
    def work(place: Path) -> None:
        if not (place / "artifacts").exists():  # the kill may have come late
            target = place / "artifacts"
            export_checkpoint(tiny_checkpoint, target, dtype="bfloat16", text_layers=(1, 2, 3))

    killed_and_repeated(work, fresh(None), kills)


def test_killed_quantize(short_bf16_artifacts, fresh, kills):
    recipe = QuantizationRecipe.load("fp8-weight-only")

    def work(place: Path) -> None:
        quantize_artifacts(place / "artifacts", recipe, [])

    killed_and_repeated(work, fresh(short_bf16_artifacts), kills)


def test_killed_build(short_bf16_artifacts, fresh, kills):
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install 'klein-kv[rtx]'")
    recipe = Recipe.from_toml(TINY_PROFILE, "tiny")

    def work(place: Path) -> None:
        artifacts = place / "artifacts"
        build_artifacts(artifacts, recipe=recipe, graphs=GRAPHS, progress=False)
        engines = EngineManifest.load(engine_folder(artifacts, "rtx5090", "bf16", "tiny"))
        assert set(engines.engines) == set(GRAPHS)

    killed_and_repeated(work, fresh(short_bf16_artifacts), kills)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_clean_up(number, tiny_checkpoint, tmp_path, monkeypatch, capfd):
    """They left a hidden folder with the converted weights."""
    monkeypatch.setattr(exporter, "_write_graphs", lambda *_: time.sleep(60))
    target = tmp_path / "artifacts"
    argv = ["export", str(tiny_checkpoint), str(target), "--dtype", "bf16"]

    def export() -> int:
        signal.signal(number, signal.SIG_DFL)  # under nohup it is ignored, and stays so
        return main(argv)

    pid = start(export)
    while not list(tmp_path.glob(".artifacts.partial-*/vae/*.safetensors")):
        time.sleep(0.05)
    os.kill(pid, number)
    assert exit_code(pid) == 128 + number
    assert not list(tmp_path.iterdir())
    assert "klein-kv export: interrupted" in capfd.readouterr().err
