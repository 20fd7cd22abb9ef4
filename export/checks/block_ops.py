"""What each block, and each quantized layer, adds to the error of a network.

A block and a layer are given the inputs that they have in float32, so that their own error shows,
not that of those before them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from klein_kv.artifacts.attention_scales import AttentionScales
from klein_kv.artifacts.numbers import QuantizedLinear
from klein_kv.export.checks.compare import Difference
from klein_kv.networks.blocks import Modulation, reference_double_block, reference_single_block
from klein_kv.networks.quantized_torch_ops import QuantizedOps
from klein_kv.networks.torch_ops import TorchOps

__all__ = ["BlockComparingOps", "ComparingOps"]

_REFERENCE_BLOCKS = (reference_double_block, reference_single_block)

Note = Callable[[str, torch.Tensor, list[torch.Tensor]], None]


class BlockComparingOps(TorchOps):
    """Computes blocks, and beside each the same block in `others`, on the same inputs.

    `note` gets each block's name, its output [tokens, D], and what the others gave.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
        others: Sequence[TorchOps],
        note: Note,
    ) -> None:
        super().__init__(weights, dtype)
        self._others = others
        self._note = note

    def block(self, function: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Any:
        outputs = function(self, name, *args, **kwargs)
        reference = function in _REFERENCE_BLOCKS
        if reference and args[-1]:  # of the last one, keys and values are all that is read
            return outputs
        results = [
            function(ops, name, *_converted(args, ops.dtype), **kwargs) for ops in self._others
        ]
        rows, *others = (_rows(x, reference) for x in (outputs, *results))
        self._note(name, rows, others)
        return outputs


def _converted(value: Any, dtype: torch.dtype) -> Any:
    """Arguments of a block in another type; rotations are float32 always."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Modulation):
        return Modulation(*(_converted(x, dtype) for x in (value.shift, value.scale, value.gate)))
    if isinstance(value, list | tuple):
        return type(value)(_converted(item, dtype) for item in value)
    return value


def _rows(outputs: Any, reference: bool) -> torch.Tensor:
    """What a block hands to the next one."""
    rows = outputs[:1] if reference else outputs
    return torch.cat(rows if isinstance(rows, tuple) else (rows,))


class ComparingOps(QuantizedOps):
    """Adds up in `errors` how far each quantized layer is from its own weight, on its input."""

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
