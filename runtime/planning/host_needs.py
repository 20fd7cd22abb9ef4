"""Memory and disk that export, build and run take on the host.

Disk is counted from the files; memory is what was measured of klein 9B, since none of it grows with
the weights but a build that embeds them.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from klein_kv.artifacts.engine_set import EngineFolder
from klein_kv.artifacts.manifest import MANIFEST, Manifest, graph_weights
from klein_kv.artifacts.numbers import PRECISION_FORMATS
from klein_kv.engines.build_needs import (
    ENGINE_BYTES,
    SHARED_BUILD_MEMORY,
    embedded_build_memory,
)
from klein_kv.flops import block_weights, text_block_weights
from klein_kv.runtime.backends.trt.memory import STAGING_BYTES
from klein_kv.runtime.planning.memory_plan import PRECISIONS, Footprint, MemoryPlan

__all__ = ["EXPORT_MEMORY", "HostNeed", "host_needs"]

EXPORT_MEMORY = 630_000_000
"""Peak memory of an export of the 9B shapes, most of it libraries. Measured: 0.6 GB where weights
are linked, 0.63 GB where they are converted (docs/checkpoints.md)."""


@dataclass(frozen=True, slots=True)
class HostNeed:
    """What one thing takes on the host.

    Attributes:
        what: the thing.
        memory: bytes at the peak; None where it is not known.
        disk: bytes written; None where nothing is.
        source: how that is known.
    """

    what: str
    memory: int | None
    disk: int | None
    source: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def host_needs(
    artifacts: Path,
    manifest: Manifest,
    engines: Sequence[EngineFolder],
    plans: Sequence[MemoryPlan],
) -> list[HostNeed]:
    """What the host needs for these artifacts.

    Args:
        artifacts: the folder.
        manifest: its manifest.
        engines: those that would run, if any are built.
        plans: of requests: what they load again comes from the host.
    """
    made_later = manifest.quantized_files
    files = [artifacts / name for name in (*manifest.files, MANIFEST) if name not in made_later]
    linked = sum(path.stat().st_size for path in files if path.stat().st_nlink > 1)
    own = sum(path.stat().st_size for path in files) - linked
    weights = {
        graph: sum(ref.nbytes for ref in graph_weights(artifacts, file).values())
        for graph, file in manifest.graphs.files.items()
    }
    code = len(weights) * ENGINE_BYTES
    needs = [
        HostNeed(
            "export",
            EXPORT_MEMORY,
            own,
            f"measured at 9B; {linked / 1e9:.1f} GB more are links to the checkpoint",
        )
    ]
    if not engines:
        needs.append(
            HostNeed("build, shared weights", SHARED_BUILD_MEMORY, code, "measured at 9B; at most")
        )
    for built in engines:
        memory = max(record.peak_rss for record in built.manifest.engines.values())
        disk = sum(path.stat().st_size for path in built.path.iterdir())
        what = f"build, {built.manifest.weights} weights"
        needs.append(HostNeed(what, memory, disk, built.path.name))
    if all(built.manifest.weights != "embedded" for built in engines):
        needs.append(
            HostNeed(
                "build, embedded weights",
                embedded_build_memory(max(weights.values())),
                sum(weights.values()) + code,
                "3.1 times the largest graph's weights (measured), 1 GiB",
            )
        )
    for name, footprint in {plan.footprint.precision: plan.footprint for plan in plans}.items():
        if name in manifest.precisions:
            made = manifest.precision_files(name)
            disk = sum((artifacts / file).stat().st_size for file in made)
            needs.append(HostNeed(f"{name} weights and graphs", None, disk, "exact"))
        elif name in PRECISION_FORMATS:
            disk = _quantized_bytes(footprint)
            needs.append(HostNeed(f"{name} weights, not made yet", None, disk, "from their shapes"))
    needs.append(HostNeed("run: pinned buffers for uploads", STAGING_BYTES, None, "exact"))
    again = max((sum(plan.loads.values()) for plan in plans if plan.fits), default=0)
    if again:
        needs.append(
            HostNeed(
                "run: file cache for weights that come again",
                again,
                None,
                "exact; without it they are read from disk",
            )
        )
    return needs


def _quantized_bytes(footprint: Footprint) -> int:
    config = footprint.config
    found = block_weights(config.transformer) * PRECISIONS[footprint.precision]
    if footprint.text_precision in PRECISION_FORMATS:
        found += text_block_weights(config.text_encoder) * PRECISIONS[footprint.text_precision]
    return int(found)
