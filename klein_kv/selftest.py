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

from klein_kv.engines.manifest import EngineManifest, find_engines
from klein_kv.errors import KleinKVError, RequestError
from klein_kv.inspection import examine_machine
from klein_kv.manifest import Manifest
from klein_kv.runtime.backend import BACKENDS, Backend
from klein_kv.runtime.selftest import (
    Subject,
    check_engines,
    check_manifest,
    check_subject,
    engine_graphs,
    open_tested_backend,
)
from klein_kv.runtime.selftest_report import CheckError, Report

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
        engines: folder of engines; None takes all of the artifacts, one after the other.
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
    folders = [engines.resolve()] if engines else []
    if not folders and backend in ("auto", "tensorrt") and device != "cpu":
        folders = find_engines(artifacts)
    built = _check_folders(report, folders)
    if folders:
        backend = "tensorrt"
    if reference_artifacts is not None:
        reference_artifacts = reference_artifacts.resolve()
        report.hide(reference_artifacts, "REFERENCE")
    opener = functools.partial(open_backend, name=backend, device=device, threads=threads)
    if tiny:
        with tempfile.TemporaryDirectory(prefix="klein-kv-selftest-") as scratch:
            report.hide(Path(scratch).resolve(), "TMP")
            dtype = "float32" if manifest is None else manifest.dtype
            like = built[0][2] if built else None
            _check_tiny(report, Path(scratch).resolve(), dtype, like, opener)
    if manifest is None or (backend == "tensorrt" and not built):
        report.skip("model", "the artifacts or their engines cannot be used")
        return report
    subject = functools.partial(
        Subject, artifacts=artifacts, manifest=manifest, reference=reference_artifacts
    )
    if not built:
        graphs = manifest.graphs
        opened = functools.partial(opener, artifacts, manifest, engines=None, graphs=graphs)
        check_subject(report, subject(case="model", graphs=graphs, open=opened))
    opened_any = not built
    for name, folder, these in built:
        case = f"model{name}"
        try:
            graphs = engine_graphs(manifest, these)
        except KleinKVError as error:
            report.skip(case, str(error))
            continue
        opened = functools.partial(opener, artifacts, manifest, engines=folder, graphs=graphs)
        tested = subject(
            case=case, graphs=graphs, open=opened, engines=these, optional=len(built) > 1
        )
        opened_any = check_subject(report, tested) or opened_any
    if not opened_any and not report.failed:
        report.run("model", _no_engines)
    return report


def _no_engines() -> None:
    raise CheckError("no engines here run on this machine; build some with `klein-kv build`")


def _check_folders(report: Report, folders: list[Path]) -> list[tuple[str, Path, EngineManifest]]:
    """Checks all engines before any of them is opened.

    Returns:
        What names a folder in the checks' names (nothing if there is one), the folder and its
        manifest, of those that can be read.
    """
    found = []
    for folder in folders:
        report.hide(folder, "ENGINES")
        name = f" {folder.name}" if len(folders) > 1 else ""
        engines = check_engines(report, folder, f"engines{name}")
        if engines is not None:
            found.append((name, folder, engines))
    return found


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
            graphs=manifest.graphs,
            open=functools.partial(
                opener,
                artifacts,
                manifest,
                engines=folder[0] if folder else None,
                graphs=manifest.graphs,
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
    folder += find_engines(artifacts)
    built.append(EngineManifest.load(folder[0]))
    return {"graphs": list(built[0].engines)}
