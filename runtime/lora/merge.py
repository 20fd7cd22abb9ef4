"""Weights with adapters merged in, a tensor at a time, in the type that the graphs read.

A merge starts from the artifacts' own weights, which stay as they are, and is computed in float32.
Quantized weights are rounded anew from there, under the tensor scale that graphs have as a
constant. What they stand for is no place to start: it lies on a grid, and rounding would take a
small change back.

What adds products of factors to a tensor is merged on a GPU, by a graph of its own, where the
backend has that: the weight comes from its file, once, through pinned memory; the sum stays on the
device, where it is made a few million numbers at a time. All else is merged by numpy.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.numbers import (
    BLOCK,
    FP4_MAX,
    FP8_MAX,
    QuantizedLinear,
    quantize_fp8,
    quantize_nvfp4,
)
from klein_kv.artifacts.quantized_weights import BLOCK_SCALES, load_quantized
from klein_kv.artifacts.signature import GraphSet
from klein_kv.artifacts.weights import NUMPY_DTYPES, graph_weights, map_weight, whole_weights
from klein_kv.errors import ArtifactError, BackendError, CapacityError, RequestError
from klein_kv.networks.merge import RANKS, rows_at_once
from klein_kv.runtime.backends.backend import Backend, Buffer, DeviceContent, WeightMaker
from klein_kv.runtime.lora.changes import WeightedChanges, apply_changes, as_product
from klein_kv.runtime.lora.lora_file import WeightedAdapter, changes_by_tensor

__all__ = ["WeightMerger"]

_log = logging.getLogger(__name__)

_ROUNDING = 1e-6  # of a scale
_ROWS = 64  # that tell whether a weight is a dequantized one
_READ_BYTES = 64 << 20  # of a weight that lie on the device at once


class WeightMerger:
    """Makes the weights of a folder's graphs with adapters in them."""

    def __init__(
        self,
        artifacts: Path,
        manifest: Manifest,
        graphs: GraphSet,
        backend: Backend | None = None,
    ) -> None:
        self._backend = backend
        self._device_graphs = _device_graphs(backend)
        step = "first_step" if manifest.variant == "kv" else "plain_step"
        self._own = whole_weights(graph_weights(artifacts, manifest.graphs.files[step]))
        self._dtype = NUMPY_DTYPES[graphs.dtype]
        self._quantized: dict[str, QuantizedLinear] = {}
        if graphs.precision is not None:
            self._quantized = load_quantized(artifacts, "transformer", graphs.precision).linears
        self._saturated: dict[str, float] = {}  # share of numbers by tensor
        self._checked_source = False

    def contents(self, adapters: Sequence[WeightedAdapter]) -> dict[str, Callable[[], Any]]:
        """What gives each tensor that the adapters change, one adapter after the other.

        Names and types are those of weight tables (`WeightChanges`). What is returned raises
        RequestError where a weight stops being finite in its type.
        """
        changes = changes_by_tensor(adapters)
        memory = threading.local()  # a thread asks for the parts of one tensor in turn

        def content(tensor: str, name: str) -> NDArray[Any]:
            if getattr(memory, "tensor", None) != tensor:
                memory.parts = self._merged(tensor, changes[tensor])
                memory.tensor = tensor
            part: NDArray[Any] = memory.parts[name]
            return part

        contents: dict[str, Callable[[], Any]] = {}
        for tensor, its in changes.items():
            layer = self._quantized.get(tensor)
            if self._device_merges(layer, its):
                contents[tensor] = DeviceContent(partial(self._merged_on_device, tensor, its))
                continue
            contents[tensor] = partial(content, tensor, tensor)
            if layer is not None and layer.block_scales is not None:
                contents[tensor + BLOCK_SCALES] = partial(content, tensor, tensor + BLOCK_SCALES)
        return contents

    def nbytes(self, names: Iterable[str]) -> int:
        """Bytes of these tensors in the artifacts' own type, an upper limit of what graphs read."""
        return sum(self._own[name].nbytes for name in names if name in self._own)

    def warn(self) -> None:
        """Logs once what did not fit under the scales of quantized weights."""
        if self._saturated:
            worst = max(self._saturated, key=lambda name: self._saturated[name])
            _log.warning(
                "adapters: in %d quantized tensors some numbers are larger than the constant "
                "scale allows and were cut, at most %.2g %% (%s); use a smaller weight, or a "
                "precision that is not quantized",
                len(self._saturated),
                100 * self._saturated[worst],
                worst,
            )
            self._saturated = {}

    def _device_merges(self, layer: QuantizedLinear | None, changes: WeightedChanges) -> bool:
        if layer is not None and layer.block_scales is not None:
            return False
        ranks = [change.rank for change, _ in changes]
        return (
            _merge_graph(None if layer is None else layer.weight_scale) in self._device_graphs
            and None not in ranks
            and sum(rank or 0 for rank in ranks) <= RANKS[-1]
        )

    def _merged_on_device(
        self, tensor: str, changes: WeightedChanges
    ) -> Iterator[tuple[slice, Any]]:
        """A tensor in pieces; whole, by numpy, where it does not fit there, or into its type."""
        layer = self._quantized.get(tensor)
        scale = None if layer is None else layer.weight_scale
        factors = as_product(changes, self._own[tensor].shape[0], RANKS)
        if factors is not None and self._device_graphs:
            try:
                largest = yield from self._pieces(tensor, *factors, scale)
            except CapacityError as error:
                _log.info("%s is merged on the host: %s", tensor, error)
            except BackendError as error:
                _log.warning("adapters are merged on the host from now on: %s", error)
                self._device_graphs = set()
            else:
                if self._fits(largest, scale):
                    if layer is not None:
                        self._check_source(tensor, layer, self._base(tensor))
                    return
        yield slice(None), self._merged(tensor, changes)[tensor]  # tells what does not fit

    def _pieces(
        self, tensor: str, up: NDArray[np.float32], down: NDArray[np.float32], scale: float | None
    ) -> Generator[tuple[slice, Buffer], None, float]:
        """Rows of a weight with [rows, rank] @ [rank, columns] added, as `DeviceContent` has them.

        `scale` is that of the result in float8, None for the model's type. Returns the largest
        magnitude in float32. A CapacityError tells that the device has no memory for it.
        """
        backend: Any = self._backend  # a `WeightMaker`: others have none of these graphs
        ref = self._own[tensor]
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
            outputs = backend.run(_merge_graph(scale), inputs | fixed)
            largest = outputs["largest"]
            yield slice(start, start + count), outputs["merged"]
        return float(backend.download(largest)[0])

    def _fits(self, largest: float, scale: float | None) -> bool:
        if scale is not None:
            return largest <= FP8_MAX * scale * (1 + _ROUNDING)
        with np.errstate(over="ignore"):
            return bool(np.isfinite(np.float32(largest).astype(self._dtype)))

    def _base(self, tensor: str) -> NDArray[Any]:
        """What adapters are merged into."""
        return map_weight(self._own[tensor])

    def _merged(self, tensor: str, changes: WeightedChanges) -> dict[str, NDArray[Any]]:
        """A tensor, and its block scales if it has some, by their names in weight tables."""
        own = self._base(tensor)
        weight = apply_changes(own.astype(np.float32), changes)
        layer = self._quantized.get(tensor)
        with np.errstate(over="ignore"):
            stored = weight if layer is not None else weight.astype(self._dtype)
            largest = np.maximum(weight.max(initial=0), -weight.min(initial=0))
            finite = np.isfinite(largest.astype(stored.dtype))
        if not finite:
            raise RequestError(
                f"the adapters make {tensor} larger than {self._dtype.name} can hold; use "
                "smaller weights"
            )
        if layer is None:
            return {tensor: stored}
        self._check_source(tensor, layer, own)
        return self._rounded(tensor, layer, weight)

    def _rounded(
        self, tensor: str, layer: QuantizedLinear, weight: NDArray[np.float32]
    ) -> dict[str, NDArray[Any]]:
        if layer.block_scales is None:
            limit = FP8_MAX * layer.weight_scale
            self._count(tensor, np.abs(weight) > limit * (1 + _ROUNDING))
            return {tensor: quantize_fp8(weight, layer.weight_scale)}
        limit = FP8_MAX * FP4_MAX * layer.weight_scale
        largest = np.abs(weight).reshape(len(weight), -1, BLOCK).max(axis=-1)
        self._count(tensor, largest > limit * (1 + _ROUNDING))
        numbers, block_scales = quantize_nvfp4(weight, layer.weight_scale)
        return {tensor: numbers, tensor + BLOCK_SCALES: block_scales}

    def _count(self, tensor: str, saturated: NDArray[np.bool_]) -> None:
        if saturated.any():
            self._saturated[tensor] = float(saturated.mean())

    def _check_source(self, tensor: str, layer: QuantizedLinear, own: NDArray[Any]) -> None:
        """Warns once where the artifacts' own weights were made of quantized ones."""
        if self._checked_source:
            return
        self._checked_source = True
        some = own[:_ROWS]
        if np.array_equal(layer.rows(0, len(some)).dequantize().astype(own.dtype), some):
            _log.warning(
                "the artifacts' own weights are dequantized ones (%s): of an adapter's change "
                "rounding takes a part back; export an unquantized checkpoint to keep all of it",
                tensor,
            )


def _device_graphs(backend: Backend | None) -> set[str]:
    """Graphs that merge on a backend's device: folders, or engines, of before may lack them."""
    graphs: set[str] = set()
    if backend is None or not isinstance(backend, WeightMaker):
        return graphs
    for graph in ("merge_lora", "merge_lora_fp8"):
        with contextlib.suppress(ArtifactError):
            backend.graph_memory(graph)
            graphs.add(graph)
    return graphs


def _merge_graph(scale: float | None) -> str:
    """Which of them makes numbers of the model's type, or float8 ones with a scale."""
    return "merge_lora" if scale is None else "merge_lora_fp8"
