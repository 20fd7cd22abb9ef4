"""An artifact folder's graphs to engines: `klein-kv build`.

Engines go to `ARTIFACTS/engines/TARGET-PRECISION/` (with `-RECIPE` behind it for recipes other
than the default, `-fp8kv` where they hand on keys and values in float8, `-fp8attention` where
attention is computed in it). Each is written aside and renamed, and `engine.json` names it only
afterwards: a build that is interrupted leaves whole engines, and the next one goes on from there.
"""

import hashlib
import logging
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from klein_kv.artifacts.engines.engine_manifest import (
    ENGINE_MANIFEST,
    PACKED_SUFFIX,
    EngineManifest,
    EngineRecord,
    ProfileRecord,
    WeightInput,
    write_atomic,
)
from klein_kv.artifacts.engines.targets import Target, compute_capability, find_target
from klein_kv.artifacts.engines.trt_module import load_module, module_version
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.numbers import PRECISION_FORMATS
from klein_kv.engines.build_needs import ENGINE_BYTES
from klein_kv.engines.build_task import (
    BuildTask,
    artifact_precision,
    chosen_graphs,
    make_task,
)
from klein_kv.engines.builder import BuiltEngine, build_engine
from klein_kv.engines.plan.applied import check_applied
from klein_kv.engines.plan.kernel_plan import KernelPlan
from klein_kv.engines.sizes.recipe import WEIGHTS_MODES, Recipe
from klein_kv.errors import ArtifactError, CapacityError, RequestError

__all__ = ["build_artifacts", "engine_folder"]

_log = logging.getLogger(__name__)


def build_artifacts(
    artifacts: Path,
    target: str | None = None,
    recipe: str | Path | Recipe | None = None,
    weights: str | None = None,
    graphs: Sequence[str] | None = None,
    module: str = "auto",
    force: bool = False,
    progress: bool | None = None,
    kv_dtype: str | None = None,
    precision: str | None = None,
    attention: str | None = None,
) -> list[EngineRecord]:
    """Builds the engines of an artifact folder; what has not changed is kept.

    Args:
        artifacts: what `klein-kv export` wrote, in bf16 or fp16.
        target: a name or `smNN`; None takes the recipe's.
        recipe: a recipe, its name or its path; None takes "default".
        weights: "shared" or "embedded"; None takes the recipe's. The VAE always embeds.
        graphs: names of graphs; None builds all that the recipe can use.
        module: "tensorrt_rtx", "tensorrt", or "auto".
        force: build even what has not changed.
        progress: show bars; None shows them on a terminal.
        kv_dtype: type that the engines are to hand keys and values on in, the artifacts' own or
            `KVFormat.FP8_PER_HEAD`; None for the artifacts'. In a quantized precision, float8 means
            constant scales.
        precision: see `Recipe.precision`; None takes the recipe's.
        attention: see `Recipe.attention`; None takes the recipe's.

    Returns:
        A record per graph, those that were kept included.

    Raises:
        ArtifactError: the folder is not whole, or a graph is not ours.
        BackendError: TensorRT is not installed.
        BuildError: target, recipe or precision do not fit, or TensorRT refuses a graph.
        CapacityError: not enough disk or memory.
        RequestError: an unknown graph, module or weights mode.
    """
    manifest = Manifest.load(artifacts, check_files=False)
    if not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe or "default")
    if weights is not None:
        if weights not in WEIGHTS_MODES:
            raise RequestError(f"weights is {weights!r}, expected {' or '.join(WEIGHTS_MODES)}")
        recipe = replace(recipe, weights=weights)
    recipe = replace(
        recipe,
        precision=precision or recipe.precision,
        attention=attention or recipe.attention,
    )
    precision = artifact_precision(manifest, recipe)
    goal = find_target(target or recipe.target)
    trt = load_module(module)
    compute_capability(trt, goal)  # refuses an unknown target before any work
    quantized = precision if precision in PRECISION_FORMATS else None
    there = manifest.choose_graphs(kv_dtype, quantized, recipe.attention)
    folder = engine_folder(
        artifacts, goal.name, precision, recipe.name, there.kv_dtype, there.attention
    )
    kept = EngineManifest(
        module=trt.__name__,
        version=module_version(trt),
        target=goal.name,
        sm=goal.sm,
        precision=precision,
        weights=recipe.weights,
        recipe=recipe.name,
        engines={},
        kv_dtype=there.kv_dtype,
        attention=there.attention,
    )
    tasks = [
        make_task(artifacts, manifest, there, graph, recipe, kept)
        for graph in chosen_graphs(graphs, recipe, there)
    ]
    kept = replace(kept, engines=_reusable(folder, kept, tasks, force))
    pending = [task for task in tasks if task.graph not in kept.engines]
    _check_disk(folder, pending)
    for task in tasks:
        if task not in pending:
            _log.info("%s: unchanged", task.graph)
    for task in pending:
        kept = _build_one(trt, artifacts, folder, kept, task, goal, progress)
    return [kept.engines[task.graph] for task in tasks]


def engine_folder(
    artifacts: Path,
    target: str,
    precision: str,
    recipe: str,
    kv_dtype: str | None = None,
    attention: str | None = None,
) -> Path:
    """Where the engines of one build lie."""
    name = f"{target}-{precision}" + ("" if recipe == "default" else f"-{recipe}")
    if attention is not None:
        name += "-fp8attention"
    elif kv_dtype is not None:
        name += "-fp8kv"
    return artifacts / "engines" / name


def _reusable(
    folder: Path, engines: EngineManifest, tasks: Sequence[BuildTask], force: bool
) -> dict[str, EngineRecord]:
    """Records of engines that are there, whole, and built from the same inputs."""
    if force or not (folder / ENGINE_MANIFEST).exists():
        return {}
    try:
        old = EngineManifest.load(folder)
    except ArtifactError as error:
        _log.warning("all engines are built again: %s", error)
        return {}
    if replace(old, engines={}) != engines:
        return {}
    wanted = {task.graph: task.key for task in tasks}
    kept = {}
    for graph, record in old.engines.items():
        if wanted.get(graph, record.key) != record.key or not (folder / record.layers).exists():
            continue
        try:
            old.read_engine(folder, graph)
        except ArtifactError as error:
            _log.warning("%s is built again: %s", graph, error)
            continue
        kept[graph] = record
    return kept


def _check_disk(folder: Path, tasks: Sequence[BuildTask]) -> None:
    needed = sum(
        ENGINE_BYTES + (0 if task.source.shared else task.source.weight_bytes) for task in tasks
    )
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise CapacityError(
            f"{folder}: building {len(tasks)} engines needs up to {needed / 1e9:.1f} GB of disk, "
            f"{free / 1e9:.1f} GB are free; make room, or build fewer graphs at a time"
        )


def _build_one(
    trt: Any,
    artifacts: Path,
    folder: Path,
    engines: EngineManifest,
    task: BuildTask,
    target: Target,
    progress: bool | None,
) -> EngineManifest:
    built = build_engine(trt, task.graph, task.source, task.profiles, target, progress)
    plans = _kernel_plans(engines, task, built)
    for plan in plans:
        check_applied(task.graph, engines.title, task.source.quantized, plan)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A reader must never find an engine beside the digest of another one.
        others = {name: r for name, r in engines.engines.items() if name != task.graph}
        replace(engines, engines=others).save(folder)
        record = _write(artifacts, folder, task, built, plans[0])
        done = replace(engines, engines={**others, task.graph: record})
        done.save(folder)
    except OSError as error:
        raise CapacityError(
            f"cannot write {folder}: {error.strerror or error}; make room or choose a writable "
            "artifact folder"
        ) from error
    _log.info(
        "%s: %.1f s, %.1f MB, scratch %.2f GB, peak memory of the build %.2f GB",
        task.graph,
        built.seconds,
        record.bytes / 1e6,
        max(built.scratch_bytes) / 1e9,
        built.peak_rss / 1e9,
    )
    return done


def _engine_file(task: BuildTask, plan: memoryview) -> tuple[str, bytes | memoryview]:
    """Name and content of an engine's file.

    An engine without weights is code alone, and TensorRT stores the source of a kernel once per
    use: the 80 MB of the 9B `first_step` for dynamic shapes pack to 10. Unpacking takes 0.1 s.
    """
    if task.source.shared:
        return f"{task.graph}.engine{PACKED_SUFFIX}", zlib.compress(plan, 1)
    return f"{task.graph}.engine", plan


def _kernel_plans(engines: EngineManifest, task: BuildTask, built: BuiltEngine) -> list[KernelPlan]:
    """One per optimization profile, at least one."""
    weights = tuple(task.source.weights if task.source.shared else {})
    return [
        KernelPlan.from_lines(task.graph, engines.title, lines, max(built.scratch_bytes), weights)
        for lines in built.layers or [[]]
    ]


def _write(
    artifacts: Path, folder: Path, task: BuildTask, built: BuiltEngine, plan: KernelPlan
) -> EngineRecord:
    layers = f"{task.graph}.layers.json"
    file, data = _engine_file(task, memoryview(built.plan))
    weights = task.source.weights if task.source.shared else {}
    write_atomic(folder / layers, plan.to_json().encode())
    write_atomic(folder / file, data)
    return EngineRecord(
        graph=task.graph,
        file=file,
        layers=layers,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        key=task.key,
        onnx_digest=task.onnx_digest,
        inputs=built.inputs,
        outputs=built.outputs,
        weights={
            name: WeightInput(
                ref.path.relative_to(artifacts).as_posix(),
                ref.offset,
                ref.nbytes,
                ref.dtype,
                ref.shape,
            )
            for name, ref in weights.items()
        },
        profiles=tuple(
            ProfileRecord(
                profile.name,
                {
                    symbol: (low, typical, high)
                    for symbol, (low, typical, high) in profile.symbols.items()
                },
                profile.shapes,
                scratch,
            )
            for profile, scratch in zip(task.profiles, built.scratch_bytes, strict=True)
        ),
        scratch_bytes=max(built.scratch_bytes),
        seconds=built.seconds,
        peak_rss=built.peak_rss,
    )
