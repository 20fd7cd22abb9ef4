"""What a build has to do: which graphs, from which inputs, under which key."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from klein_kv.artifacts.config import dtype_name
from klein_kv.artifacts.engines.engine_manifest import EngineManifest
from klein_kv.artifacts.engines.engine_record import ProfileRecord
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.numbers import PRECISION_FORMATS
from klein_kv.artifacts.signature import GraphSet
from klein_kv.engines.rewrite.graph_rewrite import Graph, read_graph
from klein_kv.engines.sizes.profiles import engine_profiles
from klein_kv.engines.sizes.recipe import Recipe
from klein_kv.errors import ArtifactError, BuildError, RequestError

__all__ = ["BuildTask", "artifact_precision", "chosen_graphs", "make_task"]

_ALWAYS_EMBEDDED = ("vae_encoder", "vae_decoder")
_NEEDS_REFERENCES = ("vae_encoder", "encode_references", "first_step")

_BUILDER_VERSION = 2
"""Raise it when the same inputs are to be built differently: engines are then built again."""


@dataclass(frozen=True, slots=True)
class BuildTask:
    """One graph to build, everything about it decided."""

    graph: str
    source: Graph
    profiles: list[ProfileRecord]
    onnx_digest: str
    key: str


def artifact_precision(manifest: Manifest, recipe: Recipe) -> str:
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
    return [graph for graph in available if references or graph not in _NEEDS_REFERENCES]


def make_task(
    artifacts: Path,
    manifest: Manifest,
    graphs: GraphSet,
    graph: str,
    recipe: Recipe,
    engines: EngineManifest,
) -> BuildTask:
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
    return BuildTask(graph, source, profiles, manifest.files[file].digest, key)


def _weight_digests(artifacts: Path, manifest: Manifest, graph: Graph) -> list[str]:
    files = {ref.path.relative_to(artifacts).as_posix() for ref in graph.weights.values()}
    missing = sorted(files - set(manifest.files))
    if missing:
        raise ArtifactError(f"{artifacts}: klein.json lists no {missing[0]}; export again")
    return [f"{name} {manifest.files[name].digest}" for name in sorted(files)]
