"""An artifact folder's graphs to engines: `klein-kv build`.

Engines go to `ARTIFACTS/engines/TARGET-PRECISION/` (with `-RECIPE` behind it for recipes other
than the default, `-fp8kv` where they hand on keys and values in float8, `-fp8attention` where
attention is computed in it). Each is written aside and renamed, and `engine.json` names it only
afterwards: a build that is interrupted leaves whole engines, and the next one goes on from there.
"""

import hashlib
import json
import logging
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from klein_kv.artifacts.config import dtype_name
from klein_kv.artifacts.digest import write_atomic
from klein_kv.artifacts.engines.engine_manifest import (
    ENGINE_MANIFEST,
    PACKED_SUFFIX,
    EngineManifest,
)
from klein_kv.artifacts.engines.engine_record import EngineRecord, ProfileRecord
from klein_kv.artifacts.engines.targets import (
    Target,
    check_precision,
    compute_capability,
    find_target,
)
from klein_kv.artifacts.engines.trt_module import load_module, module_version
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.numbers import PRECISION_FORMATS
from klein_kv.artifacts.signature import GraphSet
from klein_kv.engines.builder import BuiltEngine, build_engine
from klein_kv.engines.plan.applied import check_applied
from klein_kv.engines.plan.kernel_plan import KernelPlan
from klein_kv.engines.rewrite.graph_rewrite import Graph, read_graph
from klein_kv.engines.sizes.profiles import NEED_REFERENCES, engine_profiles
from klein_kv.engines.sizes.recipe import WEIGHTS_MODES, Recipe
from klein_kv.errors import ArtifactError, BuildError, CapacityError, RequestError
from klein_kv.machine import peak_memory
from klein_kv.unfinished import remove_leftovers

__all__ = ["build_artifacts", "engine_folder"]

_log = logging.getLogger(__name__)

_ENGINE_BYTES = 128 << 20
"""Disk set aside for the code of one engine; the largest measured has 80 MB."""

_ALWAYS_EMBEDDED = ("vae_encoder", "vae_decoder")

_BUILDER_VERSION = 2
"""Raise it when the same inputs are to be built differently: engines are then built again."""


@dataclass(frozen=True, slots=True)
class _Task:
    """One graph to build, everything about it decided."""

    graph: str
    source: Graph
    profiles: list[ProfileRecord]
    onnx_digest: str
    key: str


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
    if weights not in (None, *WEIGHTS_MODES):
        raise RequestError(f"weights is {weights!r}, expected {' or '.join(WEIGHTS_MODES)}")
    recipe = replace(
        recipe,
        weights=weights or recipe.weights,
        precision=precision or recipe.precision,
        attention=attention or recipe.attention,
    )
    precision = _artifact_precision(manifest, recipe)
    goal = find_target(target or recipe.target)
    check_precision(precision, goal)
    trt = load_module(module)
    compute_capability(trt, goal)  # refuses an unknown target before any work
    quantized = precision if precision in PRECISION_FORMATS else None
    chosen = manifest.choose_graphs(kv_dtype, quantized, recipe.attention)
    folder = engine_folder(
        artifacts, goal.name, precision, recipe.name, chosen.kv_dtype, chosen.attention
    )
    engines = EngineManifest(
        module=trt.__name__,
        version=module_version(trt),
        target=goal.name,
        sm=goal.sm,
        precision=precision,
        weights=recipe.weights,
        recipe=recipe.name,
        engines={},
        kv_dtype=chosen.kv_dtype,
        attention=chosen.attention,
    )
    tasks = [
        _make_task(artifacts, manifest, chosen, graph, recipe, engines)
        for graph in chosen_graphs(graphs, recipe, list(manifest.held_graphs(chosen)))
    ]
    remove_leftovers(folder)
    engines = replace(engines, engines=_reusable(folder, engines, tasks, force))
    pending = [task for task in tasks if task.graph not in engines.engines]
    _check_disk(folder, pending)
    for task in tasks:
        if task not in pending:
            _log.info("%s: unchanged", task.graph)
    for task in pending:
        engines = _build_one(trt, artifacts, folder, engines, task, goal, progress)
    return [engines.engines[task.graph] for task in tasks]


def _artifact_precision(manifest: Manifest, recipe: Recipe) -> str:
    """The precision to build: the recipe's quantized one, or the artifacts' own, "bf16" or "fp16".

    A `BuildError` if these are fp32 or not the recipe's, or to have attention in fp8.
    """
    held = dtype_name(manifest.dtype)
    if held == "fp32":
        raise BuildError(
            "the artifacts are fp32, expected bf16 or fp16: TensorRT has no fused attention in "
            "fp32, and fp32 graphs use an operator of ONNX Runtime; export with --dtype bf16"
        )
    if recipe.precision in PRECISION_FORMATS:
        return recipe.precision
    if recipe.attention is not None:
        raise BuildError(
            f"recipe {recipe.name}: attention is {recipe.attention!r} and precision is "
            f"{recipe.precision or held}; attention in fp8 needs calibrated scales, which belong "
            "to a quantized precision: name one (--precision fp8 or nvfp4)"
        )
    if recipe.precision not in (None, held):
        raise BuildError(
            f"recipe {recipe.name} is for {recipe.precision}, the artifacts are {held}; export "
            f"with --dtype {recipe.precision}, or choose another recipe"
        )
    return held


def chosen_graphs(
    graphs: Sequence[str] | None, recipe: Recipe, available: Sequence[str]
) -> list[str]:
    """The graphs to build, in the order of `available`; None are all that the recipe can use."""
    unknown = [graph for graph in graphs or () if graph not in available]
    if unknown:
        raise RequestError(f"unknown graph {unknown[0]!r}, expected some of {', '.join(available)}")
    if graphs is not None:
        return [graph for graph in available if graph in graphs]
    references = any(profile.references.max for profile in recipe.profiles)
    return [graph for graph in available if references or graph not in NEED_REFERENCES]


def _make_task(
    artifacts: Path,
    manifest: Manifest,
    graphs: GraphSet,
    graph: str,
    recipe: Recipe,
    engines: EngineManifest,
) -> _Task:
    """Reads and checks one graph and settles how it is built.

    An `ArtifactError` if the graph is not the exported one, or its weights are not whole; a
    `BuildError` if the recipe has no sizes for it.
    """
    file = graphs.file(graph)
    manifest.check_file(artifacts, file)
    shared = engines.weights == "shared" and graph not in _ALWAYS_EMBEDDED
    signature = graphs.signature(graph, manifest.config)
    source = read_graph(artifacts / file, signature, shared)
    profiles = engine_profiles(signature, recipe, manifest.config)
    parts = {  # everything that an engine depends on: equal keys need no new build
        "builder": _BUILDER_VERSION,
        "onnx": manifest.files[file].digest,
        "module": engines.module,
        "version": engines.version,
        "sm": engines.sm,
        "shared": shared,
        "profiles": [{"name": x.name, "symbols": x.symbols, "shapes": x.shapes} for x in profiles],
        # Weights of inputs may change without a new engine; embedded ones are part of it.
        "weights": [] if shared else _weight_digests(artifacts, manifest, source),
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return _Task(graph, source, profiles, manifest.files[file].digest, key)


def _weight_digests(artifacts: Path, manifest: Manifest, graph: Graph) -> list[str]:
    files = {ref.path.relative_to(artifacts).as_posix() for ref in graph.weights.values()}
    missing = sorted(files - set(manifest.files))
    if missing:
        raise ArtifactError(f"{artifacts}: klein.json lists no {missing[0]}; export again")
    return [f"{name} {manifest.files[name].digest}" for name in sorted(files)]


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
    folder: Path, engines: EngineManifest, tasks: Sequence[_Task], force: bool
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
    keys = {task.graph: task.key for task in tasks}
    whole = {}
    for graph, record in old.engines.items():
        if keys.get(graph, record.key) != record.key or not (folder / record.layers).exists():
            continue
        try:
            old.read_engine(folder, graph)
        except ArtifactError as error:
            _log.warning("%s is built again: %s", graph, error)
            continue
        whole[graph] = record
    return whole


def _check_disk(folder: Path, tasks: Sequence[_Task]) -> None:
    needed = sum(
        _ENGINE_BYTES + (0 if task.source.shared else task.source.weight_bytes) for task in tasks
    )
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(parent).free
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
    task: _Task,
    target: Target,
    progress: bool | None,
) -> EngineManifest:
    """Builds one engine, checks its kernel plans, and writes it and the manifest that names it."""
    graph = task.graph
    built = build_engine(trt, graph, task.source, task.profiles, target, progress)
    record, data = _record(artifacts, task, built)
    plans = [
        KernelPlan.from_lines(graph, engines.title, x, record.scratch_bytes, tuple(record.weights))
        for x in built.layers or [[]]
    ]
    for plan in plans:
        check_applied(task.source.quantized, plan)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A reader must never find an engine beside the digest of another one.
        others = {name: r for name, r in engines.engines.items() if name != graph}
        replace(engines, engines=others).save(folder)
        write_atomic(folder / record.layers, plans[0].to_json().encode())
        write_atomic(folder / record.file, data)
        done = replace(engines, engines={**others, graph: record})
        done.save(folder)
    except OSError as error:
        raise CapacityError(
            f"cannot write {folder}: {error.strerror or error}; make room or choose a writable "
            "artifact folder"
        ) from error
    _log.info(
        "%s: %.1f s, %.1f MB, scratch %.2f GB, peak memory of the build %.2f GB",
        graph,
        record.seconds,
        record.bytes / 1e6,
        record.scratch_bytes / 1e9,
        record.peak_rss / 1e9,
    )
    return done


def _record(
    artifacts: Path, task: _Task, built: BuiltEngine
) -> tuple[EngineRecord, bytes | memoryview]:
    """The record of an engine, and the content of its file.

    An engine without weights is code alone, and TensorRT stores the source of a kernel once per
    use: the 80 MB of the 9B `first_step` for dynamic shapes pack to 10. Unpacking takes 0.1 s.
    """
    data: bytes | memoryview = memoryview(built.plan)
    weights, suffix = {}, ""
    if task.source.shared:
        data, suffix = zlib.compress(data, 1), PACKED_SUFFIX
        weights = {name: ref.place(artifacts) for name, ref in task.source.weights.items()}
    pairs = zip(task.profiles, built.scratch_bytes, strict=True)
    record = EngineRecord(
        graph=task.graph,
        file=f"{task.graph}.engine{suffix}",
        layers=f"{task.graph}.layers.json",
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        key=task.key,
        onnx_digest=task.onnx_digest,
        inputs=built.inputs,
        outputs=built.outputs,
        weights=weights,
        profiles=tuple(replace(profile, scratch_bytes=scratch) for profile, scratch in pairs),
        scratch_bytes=max(built.scratch_bytes),
        seconds=built.seconds,
        peak_rss=peak_memory(),
    )
    return record, data
