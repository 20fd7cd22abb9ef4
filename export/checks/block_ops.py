"""What each block, and each quantized layer, adds to the error of a network.

A block is given the inputs that it has in float32, so that its own error shows, not that of the
blocks before it. `model.py` does not know of this: a layer norm reads the residual stream, so the
stream can be recorded, and replaced, where the norms at the beginning of the blocks read it.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F

from klein_kv.artifacts.attention_scales import AttentionScales
from klein_kv.artifacts.numbers import QuantizedLinear
from klein_kv.export.checks.compare import Difference
from klein_kv.networks.quantized_torch_ops import QuantizedOps
from klein_kv.networks.torch_ops import TorchOps

__all__ = ["BlockTrace", "ComparingOps", "ForcedOps", "TracingOps"]

_STARTS = (".to_k.weight", ".add_k_proj.weight", ".to_qkv_mlp_proj.weight", "proj_out.weight")
"""Ends of the names of the layers that first read the norm at the beginning of a block."""


@dataclass(slots=True)
class BlockTrace:
    """The residual stream as the layer norms read it, in order.

    Attributes:
        streams: rows [tokens, D].
        readers: weight that first reads each norm's result.
    """

    streams: list[torch.Tensor]
    readers: list[str]

    def starts(self) -> list[tuple[int, str]]:
        """Norms that read what a block gave out, with that block's name; the first read none."""
        found = []
        before = {"image": "", "text": ""}
        entered = dict(before)
        for i, reader in enumerate(self.readers):
            if not reader.endswith(_STARTS):
                continue
            stream = "text" if ".add_k_proj." in reader else "image"
            block = ".".join(reader.split(".")[:2])
            if block != entered[stream]:  # the last block has two norms: of text, and of the image
                before[stream], entered[stream] = entered[stream], block
            found.append((i, before[stream]))
        return found


class _Wrapped:
    """Passes everything on to another `Ops`."""

    def __init__(self, ops: TorchOps) -> None:
        self._ops = ops

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    # What calls other operations calls those of the wrapper.

    def block(self, function: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Any:
        return function(self, name, *args, **kwargs)

    def projection(
        self, rows: torch.Tensor, weight: str, features: tuple[int, int]
    ) -> Callable[[int, int], torch.Tensor]:
        return TorchOps.projection(cast("TorchOps", self), rows, weight, features)


class TracingOps(_Wrapped):
    """Records the residual stream.

    Args:
        ops: what computes.
    """

    def __init__(self, ops: TorchOps) -> None:
        super().__init__(ops)
        self.trace = BlockTrace([], [])
        self._norms: deque[tuple[torch.Tensor, int]] = deque(maxlen=2)  # image and text

    def layer_norm(
        self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> torch.Tensor:
        out = self._ops.layer_norm(rows, weight, bias, eps)
        self._norms.append((out, len(self.trace.streams)))
        self.trace.streams.append(rows)
        self.trace.readers.append("")
        return out

    def linear(
        self, rows: torch.Tensor, weight: str, part: tuple[int, int] | None = None
    ) -> torch.Tensor:
        for out, i in self._norms:
            if out is rows and not self.trace.readers[i]:
                self.trace.readers[i] = weight
        return self._ops.linear(rows, weight, part)


class ForcedOps(_Wrapped):
    """Gives every block the input of a recorded run, and keeps what the block before gave out.

    Args:
        ops: what computes.
        trace: the recorded run of the same network on the same inputs.
    """

    def __init__(self, ops: TorchOps, trace: BlockTrace) -> None:
        super().__init__(ops)
        self.outputs: dict[int, torch.Tensor] = {}
        self._streams = trace.streams
        self._starts = {i for i, _ in trace.starts()}
        self._at = 0
        self._forced: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=2)

    def layer_norm(
        self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> torch.Tensor:
        if self._at in self._starts:
            self.outputs[self._at] = rows
            recorded = self._streams[self._at].to(rows.device, rows.dtype)
            self._forced.append((rows, recorded))
            rows = recorded
        self._at += 1
        return self._ops.layer_norm(rows, weight, bias, eps)

    def add(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        for computed, recorded in self._forced:
            if a is computed:
                a = recorded
        return self._ops.add(a, b)


class ComparingOps(QuantizedOps):
    """Computes quantized layers, and beside each the layer that it stands for, on the same input.

    Args:
        weights: the artifacts' own tensors.
        dtype: type of the activations.
        quantized: the quantized layers.
        errors: where the error of each layer's output is added up, by weight name.
        attention: see `QuantizedOps`.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
        quantized: Mapping[str, QuantizedLinear],
        errors: dict[str, Difference],
        attention: Mapping[str, AttentionScales] | None = None,
    ) -> None:
        super().__init__(weights, dtype, quantized, attention)
        self._errors = errors

    def linear(
        self, rows: torch.Tensor, weight: str, part: tuple[int, int] | None = None
    ) -> torch.Tensor:
        out = super().linear(rows, weight, part)
        if weight in self.quantized:
            w = self.weights[weight]
            w = (w if part is None else w[part[0] : part[1]]).float()
            self._errors.setdefault(weight, Difference()).add(out, F.linear(rows.float(), w))
        return out
