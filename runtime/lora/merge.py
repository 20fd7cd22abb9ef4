"""Weights with adapters merged in, a tensor at a time, in the type that the graphs read.

What adds products to a tensor is merged on the backend's device, where that can; all else by numpy.

A merge starts from the artifacts' own weights, which stay as they are, and is computed in float32.
Quantized weights are rounded anew from there, under the tensor scale that graphs have as a
constant. What they stand for is no place to start: it lies on a grid, and rounding would take a
small change back.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from klein_kv.errors import BackendError, CapacityError, RequestError
from klein_kv.networks.merge import RANKS
from klein_kv.runtime.backends.backend import Backend, DeviceContent
from klein_kv.runtime.lora.changes import WeightedChanges, apply_changes, as_product
from klein_kv.runtime.lora.device_merge import DeviceMerger
from klein_kv.runtime.lora.lora_file import WeightedAdapter, changes_by_tensor

__all__ = ["WeightMerger"]

_log = logging.getLogger(__name__)

_ROUNDING = 1e-6  # of a scale
_ROWS = 64  # that tell whether a weight is a dequantized one


class WeightMerger:
    """Makes the weights of a folder's graphs with adapters in them."""

    def __init__(
        self,
        artifacts: Path,
        manifest: Manifest,
        graphs: GraphSet,
        backend: Backend | None = None,
    ) -> None:
        self._device = None if backend is None else DeviceMerger(backend)
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
            if self._device_merges(tensor, its):
                contents[tensor] = DeviceContent(partial(self._merged_on_device, tensor, its))
            else:
                names = self._table_names(tensor)
                contents |= {name: partial(content, tensor, name) for name in names}
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

    def _table_names(self, tensor: str) -> list[str]:
        layer = self._quantized.get(tensor)
        scaled = layer is not None and layer.block_scales is not None
        return [tensor, tensor + BLOCK_SCALES] if scaled else [tensor]

    def _device_merges(self, tensor: str, changes: WeightedChanges) -> bool:
        layer = self._quantized.get(tensor)
        return (
            self._device is not None
            and (layer is None or layer.block_scales is None)
            and self._device.can(None if layer is None else layer.weight_scale)
            and all(change.is_product for change, _ in changes)
            and sum(change.rank or 0 for change, _ in changes) <= RANKS[-1]
        )

    def _merged_on_device(
        self, tensor: str, changes: WeightedChanges
    ) -> Iterator[tuple[slice, Any]]:
        """A tensor in pieces; whole, by numpy, where it does not fit there, or into its type."""
        ref, layer = self._own[tensor], self._quantized.get(tensor)
        scale = None if layer is None else layer.weight_scale
        factors = as_product(changes, ref.shape[0], RANKS)
        if factors is not None and self._device is not None:
            try:
                largest = yield from self._device.merge(ref, factors, scale)
            except CapacityError as error:
                _log.info("%s is merged on the host: %s", tensor, error)
            except BackendError as error:
                _log.warning("adapters are merged on the host from now on: %s", error)
                self._device = None
            else:
                if self._fits(largest, scale):
                    if layer is not None:
                        self._check_source(tensor, layer, self._base(tensor))
                    return
        yield slice(None), self._merged(tensor, changes)[tensor]  # tells what does not fit

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
