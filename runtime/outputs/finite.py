"""Whether a result holds numbers, and which graph was the first that gave something else.

A good request pays for one row of pixels, which is downloaded and looked at: the decoder's norms
and its attention spread a NaN over the whole image. Only where that row is not finite is the
request made again, with a look at all that every graph gives.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klein_kv.artifacts.signature import GraphSet
from klein_kv.errors import KleinKVError, NotFiniteError
from klein_kv.runtime.backends.backend import Buffer
from klein_kv.runtime.session import Session

__all__ = ["is_finite", "not_finite_error", "rows_are_finite"]

_STEPS = ("first_step", "cached_step", "plain_step")


def is_finite(array: NDArray[Any]) -> bool:
    """Whether all numbers of any type are finite."""
    return array.dtype.kind in "iu" or bool(np.isfinite(array.astype(np.float32)).all())


def rows_are_finite(session: Session, sample: Buffer, shape: tuple[int, int, int]) -> bool:
    """Whether the first row of every image of `sample` [B, 3, H, W], `shape` B, H, W, is finite."""
    batch, height, width = shape
    rows = (session.view(sample, (width,), 3 * height * width * i) for i in range(batch))
    return all(is_finite(session.download(row)) for row in rows)


class _FoundError(Exception):
    """Ends a search."""


def not_finite_error(
    session: Session, graphs: GraphSet, repeat: Callable[[], object]
) -> NotFiniteError:
    """Makes a request again, `repeat`, and names the first graph whose output is not finite."""
    step = 0

    def watch(graph: str, outputs: Mapping[str, Buffer]) -> None:
        nonlocal step
        step += graph in _STEPS
        for name, buffer in outputs.items():
            if not is_finite(session.download(buffer)):
                at = f" in step {step}" if graph in _STEPS else ""
                raise _FoundError(f"the first is {name} of {graph}{at}")

    session.watch = watch
    try:
        repeat()
        where = "computed again it is finite: a passing fault of the device, or of a callback"
    except _FoundError as found:
        where = str(found)
    except KleinKVError as error:
        where = f"which graph was the first could not be found ({error})"
    finally:
        session.watch = None
    return NotFiniteError(
        f"the result holds values that are not finite (NaN or infinity): {where}. "
        f"{_cause(graphs)}; check_finite=False gives such results out"
    )


def _cause(graphs: GraphSet) -> str:
    if graphs.precision is not None:
        return (
            f"Precision {graphs.precision} overflows where values are larger than in calibration: "
            "quantize again with samples like this request, or run it in the artifacts' own type"
        )
    if graphs.dtype == "float16":
        return (
            "float16 overflows on real klein weights: export with --dtype bf16 (for GPUs) or "
            "--dtype fp32 (for CPUs)"
        )
    return (
        "The usual cause is weights that were broken in training or merging, or a LoRA of far too "
        "large a weight: export the checkpoint again, which names broken weights, or take another"
    )
