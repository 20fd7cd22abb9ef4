"""Which engines serve a set of graphs: those of one shape where there are such, else the general.

An artifact folder may hold, beside engines for ranges of sizes, any number of engines of one single
shape each (`klein-kv build --size`): faster, and with attention in float8 the only ones. Which of
them runs is decided graph by graph, by the shapes at hand. All of them hand keys and values on in
the same form and bind the same weights.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from klein_kv.config import DTYPES
from klein_kv.engines.engine_record import EngineRecord
from klein_kv.engines.manifest import ENGINE_MANIFEST, EngineManifest, find_engines
from klein_kv.errors import ArtifactError, RequestError
from klein_kv.manifest import Manifest
from klein_kv.signature import GraphSet

__all__ = ["EngineFolder", "EngineSet", "open_engines"]


@dataclass(frozen=True, slots=True)
class EngineFolder:
    """Engines of one folder.

    Attributes:
        path: where they lie.
        manifest: what `engine.json` says.
    """

    path: Path
    manifest: EngineManifest

    def mark_used(self) -> None:
        """Has `klein-kv build --size` keep this folder longer than those used less recently."""
        os.utime(self.path / ENGINE_MANIFEST)


@dataclass(frozen=True, slots=True)
class EngineSet:
    """Engines that serve one set of graphs, in the order in which they are asked.

    Attributes:
        folders: those of one single shape first; at most one is for ranges of sizes. Never empty.
    """

    folders: tuple[EngineFolder, ...]

    def choose(self, graph: str, shapes: Mapping[str, tuple[int, ...]]) -> EngineFolder:
        """The first engine that takes inputs of these shapes.

        Raises:
            ArtifactError: there is no engine of that graph.
            RequestError: none takes these shapes.
        """
        refused: RequestError | None = None
        for folder in self._with(graph):
            try:
                folder.manifest.record(graph).profile_for(shapes)
            except RequestError as error:
                refused = error  # the last one's limits are the widest
            else:
                return folder
        if refused is None:
            raise ArtifactError(str(_missing(self, graph)))
        raise refused

    def records(self, graph: str) -> list[EngineRecord]:
        """Records of every engine of a graph.

        Raises:
            ArtifactError: there is none.
        """
        found = [folder.manifest.record(graph) for folder in self._with(graph)]
        if not found:
            raise _missing(self, graph)
        return found

    def _with(self, graph: str) -> list[EngineFolder]:
        return [folder for folder in self.folders if graph in folder.manifest.engines]

    def for_device(self, module: str, version: str, sm: int) -> "EngineSet":
        """Without those of one shape that were built for another library or GPU.

        Raises:
            BuildError: so were the others.
        """
        kept = tuple(
            folder
            for folder in self.folders
            if (folder.manifest.module, folder.manifest.version, folder.manifest.sm)
            == (module, version, sm)
            or not _one_shape(folder.manifest)
        )
        checked = EngineSet(kept or self.folders)
        for folder in checked.folders:
            folder.manifest.check_module(module, version)
            folder.manifest.check_device(sm)
        return checked


def open_engines(
    artifacts: Path, manifest: Manifest, graphs: GraphSet, folder: Path | None = None
) -> EngineSet:
    """Finds the engines of a set of graphs.

    Args:
        artifacts: the artifact folder.
        manifest: its manifest.
        graphs: what the engines must have been built from. Where attention is in float8, engines
            with attention in the type of activations serve the shapes that have none.
        folder: these engines alone.

    Raises:
        ArtifactError: there are none, several folders for ranges of sizes, or engines of another
            export.
    """
    general = replace(graphs, attention=None)
    if folder is not None:
        engines = EngineManifest.load(folder)
        if not _is_of(engines, graphs):
            raise ArtifactError(
                f"{folder}: these are engines of {engines.title}, keys and values in "
                f"{engines.kv_dtype or manifest.dtype}; expected precision "
                f"{graphs.precision or manifest.dtype}, keys and values in "
                f"{graphs.kv_dtype or manifest.dtype}, attention in "
                f"{graphs.attention or manifest.dtype}; choose other engines, or another "
                "precision, kv_dtype or attention"
            )
        found = [EngineFolder(folder, engines)]
    else:
        there = [EngineFolder(x, EngineManifest.load(x)) for x in find_engines(artifacts)]
        own = [x for x in there if _is_of(x.manifest, graphs)]
        ranges = [x for x in own if not _one_shape(x.manifest)]
        if graphs.attention is not None:
            ranges += [
                x for x in there if _is_of(x.manifest, general) and not _one_shape(x.manifest)
            ]
        shapes = [x for x in own if _one_shape(x.manifest)]
        if len(ranges) > 1 or not ranges + shapes:
            raise _ambiguous(artifacts, graphs, [x.path.name for x in ranges])
        found = shapes + ranges
    for one in found:
        files = (graphs if one.manifest.attention == graphs.attention else general).files
        for graph, record in one.manifest.engines.items():
            if record.onnx_digest != manifest.files[files[graph]].digest:
                raise ArtifactError(
                    f"{one.path}: the engine of {graph} was built from another export; build it "
                    "again with `klein-kv build`"
                )
    return EngineSet(tuple(found))


def _ambiguous(artifacts: Path, graphs: GraphSet, names: list[str]) -> ArtifactError:
    option = "" if graphs.precision is None else f" --precision {graphs.precision}"
    kind = "" if graphs.precision is None else f" of precision {graphs.precision}"
    if graphs.attention is not None:
        option, kind = f"{option} --attention fp8", f"{kind} with float8 attention"
    elif graphs.kv_dtype is not None:
        option, kind = f"{option} --kv-dtype fp8", f"{kind} with float8 K/V"
    return ArtifactError(
        f"expected one folder of engines{kind} in {artifacts / 'engines'}, found "
        f"{', '.join(names) or 'none'}; name one, or build with `klein-kv build{option}`"
    )


def _missing(engines: EngineSet, graph: str) -> ArtifactError:
    there = sorted({name for folder in engines.folders for name in folder.manifest.engines})
    return ArtifactError(
        f"there is no engine of {graph}, only of {', '.join(there) or 'nothing'}; build it with "
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


def _one_shape(engines: EngineManifest) -> bool:
    """Whether all engines of a folder take one single shape."""
    return bool(engines.engines) and all(
        len(record.profiles) == 1
        and all(low == high for low, _, high in record.profiles[0].shapes.values())
        for record in engines.engines.values()
    )
