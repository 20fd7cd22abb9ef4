"""Memory and disk that export, build and run take on the host.

Disk is counted from the files; memory is what was measured of klein 9B, since none of it grows with
the weights but a build that embeds them.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from klein_kv.engines.build_needs import (
    ENGINE_BYTES,
    SHARED_BUILD_MEMORY,
    embedded_build_memory,
)
from klein_kv.flops import block_weights, text_block_weights
from klein_kv.manifest import MANIFEST, Manifest, graph_weights
from klein_kv.runtime.cuda_memory import STAGING_BYTES
from klein_kv.runtime.engine_choice import BuiltEngines
from klein_kv.runtime.memory_plan import PRECISIONS, MemoryPlan

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
    artifacts: Path, manifest: Manifest, engines: BuiltEngines | None, plans: Sequence[MemoryPlan]
) -> list[HostNeed]:
    """What the host needs for these artifacts.

    Args:
        artifacts: the folder.
        manifest: its manifest.
        engines: those that would run, if built.
        plans: of requests: what they load again comes from the host.
    """
    files = [artifacts / name for name in (*manifest.files, MANIFEST)]
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
    if engines is None:
        needs.append(
            HostNeed("build, shared weights", SHARED_BUILD_MEMORY, code, "measured at 9B; at most")
        )
    else:
        memory = max(record.peak_rss for record in engines.records.values())
        disk = sum(path.stat().st_size for path in engines.folder.iterdir())
        kind = engines.manifest.weights
        needs.append(HostNeed(f"build, {kind} weights", memory, disk, f"engines {engines.name}"))
    if engines is None or engines.manifest.weights != "embedded":
        needs.append(
            HostNeed(
                "build, embedded weights",
                embedded_build_memory(max(weights.values())),
                sum(weights.values()) + code,
                "3.1 times the largest graph's weights (measured), 1 GiB",
            )
        )
    precisions = {plan.footprint.precision: plan.footprint for plan in plans}
    for precision in [name for name in precisions if name in ("fp8", "nvfp4")]:
        footprint = precisions[precision]
        quantized = int(block_weights(manifest.config.transformer) * PRECISIONS[precision])
        if footprint.text_precision in ("fp8", "nvfp4"):
            text = text_block_weights(manifest.config.text_encoder)
            quantized += int(text * PRECISIONS[footprint.text_precision])
        needs.append(
            HostNeed(
                f"{precision} weights", None, quantized, "from their shapes, beside the others"
            )
        )
    needs.append(HostNeed("run: pinned buffers for uploads", 2 * STAGING_BYTES, None, "exact"))
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
