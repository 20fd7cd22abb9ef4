"""`assert_close`: two results under the bound of `klein_kv.export.checks.tolerances`.

`pytest --measured` prints the largest error of a run beside each entry.
"""

from typing import Any

import numpy as np

from klein_kv.export.checks.compare import compare
from klein_kv.export.checks.tolerances import TOLERANCES

__all__ = ["MEASURED", "TOLERANCES", "assert_close"]

MEASURED: dict[tuple[str, str], float] = {}
"""Largest relative error of this process, by entry."""


def assert_close(graph: str, precision: str, ours: Any, theirs: Any, what: str = "") -> None:
    """Compares two arrays or tensors under the table's bound.

    Args:
        graph: first half of a key of `TOLERANCES`.
        precision: second half.
        ours: numpy array, torch tensor, PIL image or list of them.
        theirs: the same, of the same shape.
        what: which output, for the message.
    """
    key, difference = (graph, precision), compare(ours, theirs)
    MEASURED[key] = float(np.maximum(MEASURED.get(key, 0.0), difference.relative))
    tolerance = TOLERANCES[key]
    assert tolerance.allows(difference), (
        f"{graph} ({precision}){', ' * bool(what)}{what}: relative {difference.relative:.3g} "
        f"(allowed {tolerance.bound:g}, was measured {tolerance.measured:g}), max "
        f"{difference.max:.3g}, mean {difference.mean:.3g}, cosine {difference.cosine:.8f}, "
        f"largest expected {difference.peak:.3g}"
    )
