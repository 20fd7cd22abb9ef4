"""Products of factors merged into weights where graphs read them: on a GPU, by a graph of its own.

A weight comes from its file, once, through pinned memory; the sum stays on the device, where it is
made a few million numbers at a time.
"""

from collections.abc import Generator

import numpy as np
from numpy.typing import NDArray

from klein_kv.artifacts.weights import WeightRef
from klein_kv.errors import ArtifactError
from klein_kv.networks.merge import rows_at_once
from klein_kv.runtime.backends.backend import Backend, Buffer, WeightMaker

__all__ = ["DeviceMerger"]

_READ_BYTES = 64 << 20  # of a weight that lie on the device at once


class DeviceMerger:
    """Merges on the device of a backend, as far as that can."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._graphs = set()
        if isinstance(backend, WeightMaker):
            self._graphs = {graph for graph in ("merge_lora", "merge_lora_fp8") if self._has(graph)}

    def can(self, scale: float | None) -> bool:
        """Whether it merges into weights in the model's type, or in float8 with a scale."""
        return _graph(scale) in self._graphs

    def merge(
        self,
        ref: WeightRef,
        factors: tuple[NDArray[np.float32], NDArray[np.float32]],
        scale: float | None,
    ) -> Generator[tuple[slice, Buffer], None, float]:
        """Gives rows of a weight [rows, columns] with a product added, as `DeviceContent` does.

        Args:
            ref: where the weight lies, in the model's type.
            factors: [rows, rank] and [rank, columns], with one of the ranks of `networks.merge`.
            scale: of the result in float8; None for the model's type.

        Returns:
            The largest magnitude in float32.

        Raises:
            CapacityError: the device has no memory for it.
        """
        backend, (up, down) = self._backend, factors
        assert isinstance(backend, WeightMaker)  # noqa: S101 - else it `can` nothing
        rows, columns = ref.shape
        rank, step = len(down), rows_at_once(columns)
        read = step * max(1, _READ_BYTES * rows // (ref.nbytes * step))
        ups = backend.upload(up)
        fixed = {"down": backend.upload(down)}
        if scale is not None:
            fixed["scale"] = backend.upload(np.array([scale], np.float32))
        largest = backend.upload(np.zeros(1, np.float32))
        for start in range(0, rows, step):
            if start % read == 0:
                weight = backend.upload_weight(ref.rows(start, min(start + read, rows)))
            count = min(step, rows - start)
            inputs = {
                "weight": backend.view(weight, (count, columns), start % read * columns),
                "up": backend.view(ups, (count, rank), start * rank),
                "largest_before": largest,
            }
            outputs = backend.run(_graph(scale), inputs | fixed)
            largest = outputs["largest"]
            yield slice(start, start + count), outputs["merged"]
        return float(backend.download(largest)[0])

    def _has(self, graph: str) -> bool:
        try:
            self._backend.graph_memory(graph)
        except ArtifactError:  # a folder, or engines, from before there was one
            return False
        return True


def _graph(scale: float | None) -> str:
    return "merge_lora" if scale is None else "merge_lora_fp8"
