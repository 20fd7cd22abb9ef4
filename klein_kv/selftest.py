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

from klein_kv.config import DTYPES
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
from klein_kv.signature import KV_FLOAT8

__all__ = ["run_selftest"]

_EXPORT_NEEDS = ("torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxscript")

Opener = Callable[..., Backend]
Built = tuple[str, Path, EngineManifest]
"""What names a folder of engines in the checks' names (nothing if there is one), the folder, and
its manifest."""


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
    report.attempt(
        "the machine is examined", lambda: report.facts.update(machine=examine_machine()[0])
    )
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
        with tempfile.TemporaryDirectory(
            prefix="klein-kv-selftest-", ignore_cleanup_errors=True
        ) as temporary:
            scratch = Path(temporary).resolve()
            report.hide(scratch, "TMP")
            dtype = "float32" if manifest is None else manifest.dtype
            report.attempt(
                "tiny: checks go on", lambda: _check_tiny(report, scratch, dtype, built, opener)
            )
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


def _check_folders(report: Report, folders: list[Path]) -> list[Built]:
    """Checks all engines before any of them is opened; returns those that can be read."""
    found = []
    for folder in folders:
        report.hide(folder, "ENGINES")
        name = f" {folder.name}" if len(folders) > 1 else ""
        engines = check_engines(report, folder, f"engines{name}")
        if engines is not None:
            found.append((name, folder, engines))
    return found


def _check_tiny(
    report: Report, scratch: Path, dtype: str, built: list[Built], opener: Opener
) -> None:
    """Makes a random tiny model like the real one, and tests it in the same way.

    Once for every kind of engines: precision, type of keys and values, attention.
    """
    missing = [name for name in _EXPORT_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        report.skip("tiny", f"{missing[0]} is not installed; pip install 'klein-kv[export]'")
        return
    made: dict[str, Path] = {}
    if not report.run("tiny: export", lambda: _export_tiny(scratch, dtype, made)):
        return
    artifacts, reference = made[dtype], made["float32"]
    kinds: dict[object, tuple[str, EngineManifest]] = {}
    for name, _, engines in built:
        kind = (engines.precision, engines.kv_dtype, engines.attention)
        kinds.setdefault(kind, (name, engines))
    subject = functools.partial(
        Subject, artifacts=artifacts, reference=None if reference == artifacts else reference
    )
    if not kinds:
        manifest = Manifest.load(artifacts)
        graphs = manifest.graphs
        opened = functools.partial(opener, artifacts, manifest, engines=None, graphs=graphs)
        tested = subject(case="tiny", manifest=manifest, graphs=graphs, open=opened)
        check_subject(report, tested)
    for name, like in kinds.values():
        case = f"tiny{name}" if len(kinds) > 1 else "tiny"
        found: list[tuple[Path, EngineManifest]] = []
        quantized = like.precision not in DTYPES
        if quantized and not report.run(
            f"{case}: quantize", functools.partial(_quantize_tiny, artifacts, like.precision)
        ):
            continue
        if not report.run(f"{case}: build", functools.partial(_build_tiny, artifacts, like, found)):
            continue
        folder, engines = found[0]
        manifest = Manifest.load(artifacts)
        graphs = engine_graphs(manifest, engines)
        opened = functools.partial(opener, artifacts, manifest, engines=folder, graphs=graphs)
        tested = subject(
            case=case,
            manifest=manifest,
            graphs=graphs,
            open=opened,
            engines=engines,
            optional=len(built) > 1,
        )
        check_subject(report, tested)


def _export_tiny(scratch: Path, dtype: str, made: dict[str, Path]) -> dict[str, Any]:
    from klein_kv.export.exporter import export_checkpoint
    from klein_kv.export.fixture import make_fixture

    checkpoint = scratch / "checkpoint"
    make_fixture(checkpoint, "tiny", seed=0)
    for name in dict.fromkeys(("float32", dtype)):
        made[name] = export_checkpoint(checkpoint, scratch / name, dtype=name).artifacts
    return {"dtypes": list(made)}


def _quantize_tiny(artifacts: Path, precision: str) -> dict[str, Any]:
    from klein_kv.export.quantization_recipe import QuantizationRecipe
    from klein_kv.export.quantize import quantize_artifacts
    from klein_kv.export.samples import make_samples

    recipe = QuantizationRecipe.load(precision)
    samples = make_samples(2, size=(128, 128))
    done = quantize_artifacts(artifacts, recipe, samples, device="cpu", text_tokens=64)
    return {"layers": {name: part.layers for name, part in done.parts.items()}}


def _build_tiny(
    artifacts: Path, like: EngineManifest, found: list[tuple[Path, EngineManifest]]
) -> dict[str, Any]:
    """Engines of the tiny model of the same kind, for the same GPU, by the same TensorRT."""
    from klein_kv.engines.build import build_artifacts
    from klein_kv.engines.recipe import Size
    from klein_kv.engines.shape_engines import shape_recipe

    # Attention in float8 is for single shapes only.
    one_shape = shape_recipe(Size(256, 192), 2, Size(128, 128), 64)
    before = find_engines(artifacts)
    build_artifacts(
        artifacts,
        target=f"sm{like.sm}",
        recipe=None if like.attention is None else one_shape,
        module=like.module,
        kv_dtype=None if like.kv_dtype is None else KV_FLOAT8,
        precision=None if like.precision in DTYPES else like.precision,
        attention=like.attention,
        progress=False,
    )
    (folder,) = (path for path in find_engines(artifacts) if path not in before)
    found.append((folder, EngineManifest.load(folder)))
    return {"graphs": list(found[0][1].engines)}
