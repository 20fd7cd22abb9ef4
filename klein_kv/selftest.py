"""`klein-kv selftest`: the artifacts on this machine, and a tiny model made and built on it.

The tiny model shows what is wrong with the machine whatever the real model is: its float32 graphs
on a CPU tell what every engine should compute.
"""

import functools
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from klein_kv.engines.manifest import EngineManifest
from klein_kv.errors import RequestError
from klein_kv.inspection import examine_machine
from klein_kv.manifest import Manifest
from klein_kv.runtime.backend import BACKENDS, Backend
from klein_kv.runtime.selftest import (
    Subject,
    check_engines,
    check_manifest,
    check_subject,
    only_engines,
    open_tested_backend,
)
from klein_kv.runtime.selftest_report import Report

__all__ = ["run_selftest"]

_EXPORT_NEEDS = ("torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxscript")

Opener = Callable[..., Backend]


def run_selftest(
    artifacts: Path,
    *,
    backend: str = "auto",
    device: str | None = None,
    engines: Path | None = None,
    reference_artifacts: Path | None = None,
    threads: int | None = None,
    tiny: bool = True,
    out: Path | None = None,
    open_backend: Opener = open_tested_backend,
) -> Report:
    """Checks everything that can be checked here, and goes on when something fails.

    Args:
        artifacts: what `klein-kv export` wrote.
        backend: one of `BACKENDS`.
        device: "cpu", "cuda" or "cuda:N".
        engines: folder of engines; None takes the only one of the artifacts, if there is one.
        reference_artifacts: the same model in float32, for a CPU to compare with.
        threads: CPU threads of the tested backend.
        tiny: test a tiny model as well.
        out: file of the report, kept up to date from check to check.
        open_backend: opens the backend that is tested; see `open_tested_backend`.

    Raises:
        RequestError: an unknown backend, or the report cannot be written.
    """
    if backend not in BACKENDS:
        raise RequestError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    # Absolute, so that messages hold what the report can replace.
    artifacts = artifacts.resolve()
    report = Report(out)
    report.hide(artifacts, "ARTIFACTS")
    report.facts["machine"] = examine_machine()[0]
    report.save()
    manifest = check_manifest(report, artifacts)
    folder = engines.resolve() if engines else None
    if folder is None and backend in ("auto", "tensorrt") and device != "cpu":
        folder = only_engines(artifacts)
    built = None
    if folder is not None:
        report.hide(folder, "ENGINES")
        built = check_engines(report, folder)
        backend = "tensorrt"
    if reference_artifacts is not None:
        reference_artifacts = reference_artifacts.resolve()
        report.hide(reference_artifacts, "REFERENCE")
    opener = functools.partial(open_backend, name=backend, device=device, threads=threads)
    if tiny:
        with tempfile.TemporaryDirectory(prefix="klein-kv-selftest-") as scratch:
            report.hide(Path(scratch).resolve(), "TMP")
            dtype = "float32" if manifest is None else manifest.dtype
            _check_tiny(report, Path(scratch).resolve(), dtype, built, opener)
    if manifest is None or (backend == "tensorrt" and built is None):
        report.skip("model", "the artifacts or their engines cannot be used")
        return report
    check_subject(
        report,
        Subject(
            case="model",
            artifacts=artifacts,
            manifest=manifest,
            open=functools.partial(opener, artifacts, manifest, engines=folder),
            engines=built,
            reference=reference_artifacts,
        ),
    )
    return report


def _check_tiny(
    report: Report,
    scratch: Path,
    dtype: str,
    engines: EngineManifest | None,
    opener: Opener,
) -> None:
    """Makes a random tiny model like the real one, and tests it in the same way."""
    missing = [name for name in _EXPORT_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        report.skip("tiny", f"{missing[0]} is not installed; pip install 'klein-kv[export]'")
        return
    made: dict[str, Path] = {}
    if not report.run("tiny: export", lambda: _export_tiny(scratch, dtype, made)):
        return
    artifacts, reference = made[dtype], made["float32"]
    built: list[EngineManifest] = []
    folder: list[Path] = []
    if engines is not None and not report.run(
        "tiny: build", lambda: _build_tiny(artifacts, engines, folder, built)
    ):
        return
    manifest = Manifest.load(artifacts)
    check_subject(
        report,
        Subject(
            case="tiny",
            artifacts=artifacts,
            manifest=manifest,
            open=functools.partial(
                opener, artifacts, manifest, engines=folder[0] if folder else None
            ),
            engines=built[0] if built else None,
            reference=None if reference == artifacts else reference,
        ),
    )


def _export_tiny(scratch: Path, dtype: str, made: dict[str, Path]) -> dict[str, Any]:
    from klein_kv.export.exporter import export_checkpoint
    from klein_kv.export.fixture import make_fixture

    checkpoint = scratch / "checkpoint"
    make_fixture(checkpoint, "tiny", seed=0)
    for name in dict.fromkeys(("float32", dtype)):
        made[name] = export_checkpoint(checkpoint, scratch / name, dtype=name).artifacts
    return {"dtypes": list(made)}


def _build_tiny(
    artifacts: Path, like: EngineManifest, folder: list[Path], built: list[EngineManifest]
) -> dict[str, Any]:
    """Engines of the tiny model for the same GPU, by the same TensorRT."""
    from klein_kv.engines.build import build_artifacts

    build_artifacts(artifacts, target=f"sm{like.sm}", module=like.module, progress=False)
    found = only_engines(artifacts)
    assert found is not None  # noqa: S101 - just built
    folder.append(found)
    built.append(EngineManifest.load(found))
    return {"graphs": list(built[0].engines)}
