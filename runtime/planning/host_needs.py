"""Memory and disk that export, build and run take on the host.

Disk is counted from the files where they are there; memory is what was measured of klein 9B, since
none of it grows with the weights.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from klein_kv.artifacts.manifest import MANIFEST, Manifest
from klein_kv.artifacts.numbers import PRECISION_FORMATS
from klein_kv.runtime.backends.trt.memory import STAGING_BYTES
from klein_kv.runtime.planning.footprint import (
    PRECISIONS,
    Footprint,
    block_weights,
    text_block_weights,
)
from klein_kv.runtime.planning.memory_plan import MemoryPlan

__all__ = ["HostNeed", "host_needs"]

EXPORT_MEMORY = 630_000_000
"""Peak memory of an export, most of it libraries: 0.6 GB where weights are linked, 0.63 GB where
they are converted (docs/checkpoints.md)."""

BUILD_MEMORY, BUILD_DISK = 1_700_000_000, 74_000_000
"""Peak memory of a build with shared weights, and the engines that it writes: those of recipe
`default` (docs/engines.md). Recipes of one shape take half. Both follow the number of kernels."""


class HostNeed(NamedTuple):
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


def host_needs(
    artifacts: Path, manifest: Manifest, plans: Sequence[MemoryPlan]
) -> tuple[HostNeed, ...]:
    """What the host needs for these artifacts.

    Args:
        artifacts: the folder.
        manifest: its manifest.
        plans: of requests: what they load again comes from the host.
    """
    own = {*manifest.files, MANIFEST} - manifest.quantized_files
    files = [(artifacts / name).stat() for name in own]
    linked = sum(file.st_size for file in files if file.st_nlink > 1)
    disk = sum(file.st_size for file in files) - linked
    links = f"measured at 9B; {linked / 1e9:.1f} GB more are links"
    needs = [
        HostNeed("export", EXPORT_MEMORY, disk, links),
        HostNeed("build, shared weights", BUILD_MEMORY, BUILD_DISK, "measured at 9B; at most"),
    ]
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
        source = "those that come again; else read from disk"
        needs.append(HostNeed("run: file cache for weights", again, None, source))
    return tuple(needs)


def _quantized_bytes(footprint: Footprint) -> int:
    config = footprint.config
    nbytes = block_weights(config.transformer) * PRECISIONS[footprint.precision]
    if footprint.text_precision in PRECISION_FORMATS:
        nbytes += text_block_weights(config.text_encoder) * PRECISIONS[footprint.text_precision]
    return int(nbytes)
