"""Which engine runs a graph at a shape. `klein-kv plan` and the runtime ask this one place.

An artifact folder may hold any number of engines: for ranges of sizes, and of one single shape each
(`klein-kv build --size`), which are faster, and with attention in float8 the only ones. All that
were built from one set of graphs hand keys and values on in the same form and bind the same
weights, so any of them can run any step of a request.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from klein_kv.artifacts.config import DTYPES
from klein_kv.artifacts.engines.engine_manifest import ENGINE_MANIFEST, EngineManifest, find_engines
from klein_kv.artifacts.engines.engine_record import EngineRecord
from klein_kv.artifacts.engines.engine_sizes import shapes_text, sizes_text
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.signature import GraphSet
from klein_kv.errors import ArtifactError, BuildError, RequestError

__all__ = ["EngineFolder", "EngineSet", "open_engines"]

_MOST = 5  # folders that a message tells of


@dataclass(frozen=True, slots=True)
class EngineFolder:
    """Engines of one folder, and what its `engine.json` says."""

    path: Path
    manifest: EngineManifest

    def mark_used(self) -> None:
        """Has `klein-kv build --size` keep this folder longer than those used less recently."""
        os.utime(self.path / ENGINE_MANIFEST)


@dataclass(frozen=True, slots=True)
class EngineSet:
    """Engines that serve one set of graphs; there is at least one folder.

    Those that have the graphs' `attention` come before those that do not. `unit` is the pixels of a
    token's side.
    """

    folders: tuple[EngineFolder, ...]
    attention: str | None = None
    unit: int = 16

    @property
    def module(self) -> str:
        """Name of the TensorRT that built them; of the first, where they differ."""
        return self.folders[0].manifest.module

    def choose(self, graph: str, shapes: Mapping[str, tuple[int, ...]]) -> EngineFolder:
        """The engine for these shapes of inputs: for them alone, else the one with least scratch.

        An `ArtifactError` if there is none of that graph, a `RequestError` if none takes these
        shapes.
        """
        fitting: list[tuple[tuple[bool, bool, int, str], EngineFolder]] = []
        refused: RequestError | None = None
        for folder in self.folders:
            record = folder.manifest.engines.get(graph)
            if record is None:
                continue
            try:
                profile = record.profiles[record.profile_for(shapes)]
            except RequestError as error:
                if refused is None or not record.fixed:  # tell the widest limits
                    refused = error
                continue
            other = folder.manifest.attention != self.attention
            fitting.append(
                ((other, not record.fixed, profile.scratch_bytes, folder.path.name), folder)
            )
        if fitting:
            return min(fitting, key=lambda item: item[0])[1]
        if refused is None:
            raise _missing(self, graph)
        raise RequestError(
            f"no engine of {graph} takes {shapes_text(shapes, self.unit)}; {self.sizes()}; build "
            "engines of this size (`klein-kv build ARTIFACTS --size WxH --refs N`), or with a "
            f"recipe that covers it ({refused})"
        )

    def sizes(self) -> str:
        """What the engines of each folder take, in pixels; those for ranges of sizes come first."""
        texts = {x.path.name: sizes_text(x.manifest, self.unit) for x in self.folders}
        texts = dict(sorted(texts.items(), key=lambda text: " to " not in text[1]))
        lines = [f"{name} takes {text}" for name, text in texts.items()]
        rest = [f"{len(lines) - _MOST} more folders"] if len(lines) > _MOST else []
        return "; ".join(lines[:_MOST] + rest)

    def records(self, graph: str) -> list[EngineRecord]:
        """Records of every engine of a graph; an `ArtifactError` if there is none."""
        records = [x.manifest.engines[graph] for x in self.folders if graph in x.manifest.engines]
        if not records:
            raise _missing(self, graph)
        return records

    def for_module(self, module: str, version: str) -> "EngineSet":
        """Those that this TensorRT loads, or a `BuildError`."""
        own = tuple(
            folder
            for folder in self.folders
            if (folder.manifest.module, folder.manifest.version) == (module, version)
        )
        if not own:
            other = self.folders[0].manifest
            raise BuildError(
                f"the engines were built with {other.module} {other.version}, this is {module} "
                f"{version}, which cannot load them; build them again with `klein-kv build`"
            )
        return replace(self, folders=own)

    def for_sm(self, sm: int) -> "EngineSet":
        """Those for one compute capability, or a `BuildError`."""
        own = tuple(folder for folder in self.folders if folder.manifest.sm == sm)
        if not own:
            other = self.folders[0].manifest
            raise BuildError(
                f"the engines were built for compute capability {other.sm / 10:.1f} "
                f"({other.target}), this GPU has {sm / 10:.1f}; build them with "
                f"`klein-kv build --target sm{sm}`"
            )
        return replace(self, folders=own)


def open_engines(
    artifacts: Path, manifest: Manifest, graphs: GraphSet, folder: Path | None = None
) -> EngineSet:
    """Finds the engines that were built from a set of graphs, for whatever GPU, or in one `folder`.

    Where attention is in float8, engines with attention in the type of activations serve the shapes
    that have none. An `ArtifactError` if there are none, or only engines of another export.
    """
    general = replace(graphs, attention=None)
    paths = find_engines(artifacts) if folder is None else [folder]
    every = [EngineFolder(path, EngineManifest.load(path)) for path in paths]
    folders = [x for x in every if _is_of(x.manifest, graphs) or _is_of(x.manifest, general)]
    if folder is None and not any(_is_of(x.manifest, graphs) for x in folders):
        raise _none(artifacts, graphs)
    if not folders:
        engines, own = every[0].manifest, manifest.dtype
        raise ArtifactError(
            f"{folder}: these are engines of {engines.title}, keys and values in "
            f"{engines.kv_dtype or own}; expected precision {graphs.precision or own}, keys "
            f"and values in {graphs.kv_dtype or own}, attention in {graphs.attention or own}; "
            "choose other engines, or another precision, kv_dtype or attention"
        )
    for one in folders:
        there = graphs if one.manifest.attention == graphs.attention else general
        files = manifest.held_graphs(there)
        for graph, record in one.manifest.engines.items():
            if graph not in files or record.onnx_digest != manifest.files[files[graph]].digest:
                raise ArtifactError(
                    f"{one.path}: the engine of {graph} was built from another export; build it "
                    "again with `klein-kv build`"
                )
    return EngineSet(tuple(folders), graphs.attention, manifest.config.vae.multiple_of)


def _none(artifacts: Path, graphs: GraphSet) -> ArtifactError:
    option = "" if graphs.precision is None else f" --precision {graphs.precision}"
    kind = "" if graphs.precision is None else f" of precision {graphs.precision}"
    if graphs.attention is not None:
        option, kind = f"{option} --attention fp8", f"{kind} with float8 attention"
    elif graphs.kv_dtype is not None:
        option, kind = f"{option} --kv-dtype fp8", f"{kind} with float8 K/V"
    return ArtifactError(
        f"there are no engines{kind} in {artifacts / 'engines'}; build them with "
        f"`klein-kv build{option}`"
    )


def _missing(engines: EngineSet, graph: str) -> ArtifactError:
    names = sorted({name for folder in engines.folders for name in folder.manifest.engines})
    return ArtifactError(
        f"there is no engine of {graph}, only of {', '.join(names) or 'nothing'}; build it with "
        "`klein-kv build`"
    )


def _is_of(engines: EngineManifest, graphs: GraphSet) -> bool:
    """Whether engines were built from this set of graphs."""
    precision = None if engines.precision in DTYPES else engines.precision
    return (precision, engines.kv_dtype, engines.attention) == (
        graphs.precision,
        graphs.kv_dtype,
        graphs.attention,
    )
