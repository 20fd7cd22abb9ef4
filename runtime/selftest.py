"""A folder of artifacts on the machine that it is to run on, checked part by part.

Nothing here needs the exporter or the engine builder; `klein_kv.selftest` adds a tiny model that
does.
"""

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from klein_kv.config import DTYPES
from klein_kv.engines.manifest import EngineManifest
from klein_kv.errors import BuildError
from klein_kv.manifest import Manifest
from klein_kv.runtime.backend import Backend, open_backend
from klein_kv.runtime.pipeline import KleinKVPipeline
from klein_kv.runtime.selftest_graphs import (
    GraphRunner,
    Limits,
    check_graphs,
    check_identities,
)
from klein_kv.runtime.selftest_limits import EXACT, tensor_limit
from klein_kv.runtime.selftest_loop import check_loop
from klein_kv.runtime.selftest_reference import find_reference, static_kv_scales
from klein_kv.runtime.selftest_report import CheckSkipped, Report
from klein_kv.runtime.selftest_sizes import CaseSizes, engine_sizes, small_sizes
from klein_kv.signature import GraphSet

__all__ = [
    "Subject",
    "check_engines",
    "check_manifest",
    "check_subject",
    "engine_graphs",
    "open_tested_backend",
]


@dataclass(frozen=True, slots=True)
class Subject:
    """What is tested.

    Attributes:
        case: begins the names of its checks.
        artifacts: the folder, which exists.
        manifest: its manifest.
        graphs: which of its graphs.
        open: opens the backend that is tested.
        engines: of that backend, if it has some.
        reference: float32 artifacts of the same model for a CPU; None takes what there is.
        optional: whether engines for another GPU or TensorRT are left out instead of failing.
    """

    case: str
    artifacts: Path
    manifest: Manifest
    graphs: GraphSet
    open: Callable[[], Backend]
    engines: EngineManifest | None = None
    reference: Path | None = None
    optional: bool = False


def open_tested_backend(
    artifacts: Path,
    manifest: Manifest,
    *,
    name: str,
    device: str | None,
    engines: Path | None,
    threads: int | None,
    graphs: GraphSet,
) -> Backend:
    """`open_backend`, with the folder of engines named."""
    if engines is None:
        return open_backend(name, artifacts, manifest, device, threads, graphs)
    from klein_kv.runtime.backends.trt.backend import TrtBackend

    ordinal = (device or "").partition(":")[2]
    return TrtBackend(artifacts, manifest, engines=engines, device=int(ordinal or 0), graphs=graphs)


def engine_graphs(manifest: Manifest, engines: EngineManifest) -> GraphSet:
    """The graphs that a folder of engines was built from.

    Raises:
        ArtifactError: the artifacts do not hold them any more.
        RequestError: there are no such graphs.
    """
    if engines.precision in DTYPES:
        return manifest.graphs_with(engines.kv_dtype or manifest.dtype)
    return manifest.quantized_graphs(engines.precision, engines.kv_dtype, engines.attention)


def check_engines(report: Report, folder: Path, case: str = "engines") -> EngineManifest | None:
    """Checks a folder of engines without opening any of them.

    Args:
        report: where the results go.
        folder: the folder.
        case: begins the checks' names.

    Returns:
        Its manifest; None if that cannot be read.
    """
    found: list[EngineManifest] = []
    report.run(f"{case}: manifest", lambda: found.append(EngineManifest.load(folder)))
    if not found:
        return None
    (engines,) = found
    report.facts.setdefault("engines", []).append(_engine_facts(engines))
    for graph in engines.engines:

        def read(graph: str = graph) -> dict[str, Any]:
            return {"bytes": len(engines.read_engine(folder, graph))}

        report.run(f"{case}: {graph} is the file that was built", read)
    return engines


def _engine_facts(engines: EngineManifest) -> dict[str, Any]:
    """What the report says of a folder of engines."""
    left_out = {"weights", "inputs", "outputs", "layers"}
    return {
        "module": engines.module,
        "version": engines.version,
        "target": engines.target,
        "sm": engines.sm,
        "precision": engines.precision,
        "kv_dtype": engines.kv_dtype,
        "attention": engines.attention,
        "weights": engines.weights,
        "recipe": engines.recipe,
        "graphs": {
            graph: {name: value for name, value in asdict(record).items() if name not in left_out}
            for graph, record in engines.engines.items()
        },
    }


def check_subject(report: Report, subject: Subject) -> bool:
    """Runs all checks of one folder on one backend.

    Returns:
        Whether the backend opened.
    """
    opened: list[Backend] = []
    case = subject.case
    if not report.run(f"{case}: backend opens", lambda: _open(subject, opened)):
        return False
    (backend,) = opened
    try:
        # Each check notes what it raises; this notes what breaks between them.
        report.attempt(f"{case}: checks go on", lambda: _check_backend(report, subject, backend))
    finally:
        close = getattr(backend, "close", None)
        if close is not None:
            report.run(f"{case}: backend closes", close)
    return True


def _check_backend(report: Report, subject: Subject, backend: Backend) -> None:
    case, manifest, graphs = subject.case, subject.manifest, subject.graphs
    files = graphs.files
    present = tuple(files) if subject.engines is None else tuple(subject.engines.engines)
    ours = GraphRunner(
        label=backend.name,
        backend=backend,
        graphs=graphs,
        config=manifest.config,
        present=present,
        kv_scales=static_kv_scales(subject.artifacts, manifest, graphs),
    )
    sizes = _sizes(subject, typical=False)
    found: list[GraphRunner | str] = []
    report.attempt(
        f"{case}: a reference is found",
        lambda: found.append(
            find_reference(
                report,
                case,
                backend.name,
                subject.artifacts,
                manifest,
                graphs,
                subject.reference,
                sizes,
            )
        ),
    )
    check_graphs(report, case, ours, found[0] if found else "what should compute it broke", sizes)
    if manifest.variant == "kv":
        check_identities(report, case, ours, sizes, _repeat_limits(subject, backend))
    missing = [graph for graph in files if graph not in present]
    if missing:
        report.skip(f"{case}: loop", f"without {', '.join(missing)}")
        return
    cases = {f"{case}, small": sizes}
    if subject.engines is not None and _sizes(subject, typical=True) != sizes:
        cases[f"{case}, typical"] = _sizes(subject, typical=True)
    for name, at in cases.items():
        for graph in files:  # the text encoder comes first, and alone where memory is short
            report.attempt(
                f"{name}: {graph} is released", functools.partial(backend.release, graph)
            )
        _loop(report, name, subject, backend, at)


def _repeat_limits(subject: Subject, backend: Backend) -> Limits:
    """How near two ways to the same values are on a backend."""
    if backend.name == "onnxruntime":
        return EXACT
    step = "first_step" if subject.manifest.variant == "kv" else "plain_step"
    return functools.partial(tensor_limit, subject.graphs, subject.manifest.config, step)


def _open(subject: Subject, opened: list[Backend]) -> dict[str, Any]:
    try:
        opened.append(subject.open())
    except BuildError as error:
        if subject.optional:
            raise CheckSkipped(str(error)) from error
        raise
    return {"backend": opened[0].name}


def _sizes(subject: Subject, *, typical: bool) -> CaseSizes:
    config = subject.manifest.config
    if subject.engines is None:
        return small_sizes(config.vae.multiple_of)
    return engine_sizes(subject.engines, config, typical=typical)


def _loop(report: Report, name: str, subject: Subject, backend: Backend, sizes: CaseSizes) -> None:
    made: list[KleinKVPipeline] = []
    config = subject.manifest.config
    _, references = sizes.grids(config.vae.multiple_of)
    tokens = sum(height * width for height, width in references)
    room = 2 * config.transformer.kv_bytes(tokens, subject.manifest.dtype) + (1 << 20)

    def make() -> dict[str, Any]:
        pipe = KleinKVPipeline(
            subject.artifacts,
            subject.manifest,
            backend,
            reference_cache_bytes=room,
            prompt_cache_bytes=0,
            kv_dtype=None if subject.graphs.kv_dtype is None else "fp8",
            precision=subject.graphs.precision,
            attention=subject.graphs.attention,
        )
        made.append(pipe)
        return {"sizes": sizes.to_dict()}

    if report.run(f"{name}: pipeline", make):
        check_loop(report, name, made[0], sizes, _repeat_limits(subject, backend))


def check_manifest(report: Report, artifacts: Path) -> Manifest | None:
    """Checks a folder's manifest and the digest of every file in it."""
    found: list[Manifest] = []

    def load() -> dict[str, Any]:
        found.append(Manifest.load(artifacts))
        return {"files": len(found[0].files)}

    report.run("artifacts: manifest and digests", load)
    if not found:
        return None
    (manifest,) = found
    report.facts["artifacts"] = {
        "variant": manifest.variant,
        "dtype": manifest.dtype,
        "model_digest": manifest.model_digest,
        "config": manifest.config.to_dict(),
    }
    return manifest
