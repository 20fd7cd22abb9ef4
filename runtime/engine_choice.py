"""The built engines that a planned request would run on, and what they say of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from klein_kv.engines.kernel_plan import KernelPlan
from klein_kv.engines.manifest import EngineManifest, EngineRecord, find_engines
from klein_kv.engines.plan_cost import price_plan
from klein_kv.engines.targets import Gpu
from klein_kv.errors import ArtifactError, BuildError
from klein_kv.manifest import Manifest

__all__ = ["BuiltEngines", "choose_engines", "load_engines"]

Sizes = Mapping[str, Mapping[str, int]]
"""Sizes of the symbols by graph."""


@dataclass(frozen=True, slots=True)
class BuiltEngines:
    """Engines of one folder that were built from the artifacts at hand.

    Attributes:
        folder: where they lie.
        manifest: what `engine.json` says.
        records: those that are of this export, by graph.
    """

    folder: Path
    manifest: EngineManifest
    records: dict[str, EngineRecord]

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.folder.name

    def holds(self, graph: str, sizes: Mapping[str, int]) -> bool:
        """Whether an engine serves these sizes."""
        record = self.records.get(graph)
        return record is not None and any(
            all(low <= sizes[symbol] <= high for symbol, (low, _, high) in profile.symbols.items())
            for profile in record.profiles
        )

    def only(self, graph: str, sizes: Mapping[str, int]) -> bool:
        """Whether an engine serves these sizes and no others."""
        return self.holds(graph, sizes) and all(
            low == high
            for profile in self.records[graph].profiles
            for low, _, high in profile.symbols.values()
        )

    def scratch(self, sizes: Sizes) -> dict[str, tuple[int, str]]:
        """Reported scratch of the engines that serve these sizes, and this folder's name."""
        return {
            graph: (self.records[graph].scratch_bytes, self.name)
            for graph in sizes
            if self.holds(graph, sizes[graph])
        }

    def seconds(self, graph: str, sizes: Mapping[str, int], gpu: Gpu) -> float | None:
        """Price of the kernel plan; None where it is not of exactly these sizes."""
        if not self.only(graph, sizes):
            return None
        try:
            plan = KernelPlan.load(self.folder / self.records[graph].layers)
            return price_plan(plan, gpu).seconds
        except (ArtifactError, BuildError):
            return None


def load_engines(
    artifacts: Path, manifest: Manifest, sm: int, folder: Path | None = None
) -> list[BuiltEngines]:
    """All engines of an artifact folder for one compute capability.

    Args:
        artifacts: the folder.
        manifest: its manifest.
        sm: compute capability without the dot.
        folder: these engines alone, whatever they are for; they must be there.

    Raises:
        ArtifactError: `folder` holds no engines.
    """
    found = []
    for path in find_engines(artifacts) if folder is None else [folder]:
        try:
            engines = EngineManifest.load(path)
        except ArtifactError:
            if folder is not None:
                raise
            continue
        records = {
            graph: record
            for graph, record in engines.engines.items()
            if record.onnx_digest in {file.digest for file in manifest.files.values()}
        }
        if folder is not None or engines.sm == sm:
            found.append(BuiltEngines(path, engines, records))
    return found


def choose_engines(
    engines: list[BuiltEngines], precision: str, kv_dtype: str, sizes: Sizes
) -> BuiltEngines | None:
    """The engines that serve most of a request: of its very sizes, if there are such.

    Args:
        engines: to choose from.
        precision: of the transformer.
        kv_dtype: type of keys and values.
        sizes: sizes of the symbols by graph of the request.
    """

    def score(built: BuiltEngines) -> tuple[int, int]:
        return (
            sum(built.holds(graph, sizes[graph]) for graph in sizes),
            sum(built.only(graph, sizes[graph]) for graph in sizes),
        )

    fitting = [
        built
        for built in engines
        if built.manifest.precision == precision and _kv_dtype(built) in (None, kv_dtype)
    ]
    best = max(fitting, key=score, default=None)
    return best if best is not None and score(best) > (0, 0) else None


def _kv_dtype(built: BuiltEngines) -> str | None:
    """Type of keys and values that the engines hand on; None where no engine does."""
    for record in built.records.values():
        for tensor in (*record.inputs, *record.outputs):
            if tensor.name == "k_ref.0":
                return tensor.dtype
    return None
