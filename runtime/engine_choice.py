"""The built engines that a planned request would run on, and what they say of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from klein_kv.engines.kernel_plan import KernelPlan
from klein_kv.engines.manifest import EngineManifest, EngineRecord, find_engines
from klein_kv.engines.plan_cost import price_plan
from klein_kv.engines.targets import Gpu
from klein_kv.errors import ArtifactError, BuildError

__all__ = ["BuiltEngine", "choose_engine", "load_engines"]


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """One engine.

    Attributes:
        folder: where it lies.
        manifest: what `engine.json` says of the folder.
        record: what it says of the engine.
    """

    folder: Path
    manifest: EngineManifest
    record: EngineRecord

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.folder.name

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Whether the engine serves these sizes of its symbols."""
        return any(
            all(low <= sizes[symbol] <= high for symbol, (low, _, high) in profile.symbols.items())
            for profile in self.record.profiles
        )

    @property
    def one_shape(self) -> bool:
        """Whether it serves one shape alone."""
        return all(
            low == high
            for profile in self.record.profiles
            for low, _, high in profile.symbols.values()
        )

    def seconds(self, gpu: Gpu) -> float | None:
        """Price of the kernel plan; None where it has none, as for a range of sizes."""
        if not self.one_shape:
            return None
        try:
            return price_plan(KernelPlan.load(self.folder / self.record.layers), gpu).seconds
        except (ArtifactError, BuildError):
            return None


def load_engines(artifacts: Path, sm: int, folder: Path | None = None) -> list[BuiltEngine]:
    """All engines of an artifact folder for one compute capability.

    Args:
        artifacts: the folder.
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
        if folder is not None or engines.sm == sm:
            found += [BuiltEngine(path, engines, record) for record in engines.engines.values()]
    return found


def choose_engine(
    engines: Sequence[BuiltEngine], graph: str, digests: Sequence[str], sizes: Mapping[str, int]
) -> BuiltEngine | None:
    """The engine that would run a graph, as `engine_set` chooses: of one shape first.

    Args:
        engines: to choose from.
        graph: its name.
        digests: of the files that it may have been built from, the best first.
        sizes: of its symbols.
    """
    fitting = [
        built
        for built in engines
        if built.record.graph == graph
        and built.record.onnx_digest in digests
        and built.holds(sizes)
    ]
    return min(
        fitting,
        key=lambda built: (
            digests.index(built.record.onnx_digest),
            not built.one_shape,
            built.record.scratch_bytes,
        ),
        default=None,
    )
