"""What each block, and each quantized layer, adds to the error of a network.

A block and a layer are given the inputs that they have in float32, so that their own error shows,
not that of those before them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from klein_kv.export.checks.compare import Difference
from klein_kv.networks.blocks import Modulation, reference_double_block, reference_single_block
from klein_kv.networks.quantized_torch_ops import QuantizedOps
from klein_kv.networks.torch_ops import TorchOps

__all__ = ["ComparingOps"]

_REFERENCE_BLOCKS = (reference_double_block, reference_single_block)

Note = Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor], None]


class ComparingOps(TorchOps):
    """float32 ops that compute blocks and layers of two other networks beside their own.

    Args:
        weights: of this network, the judge.
        floor: another; its blocks are compared.
        subject: a third, with quantized layers; blocks and layers are compared.
        layers: gets how far each quantized layer is from its own weight.
        note: gets each block's name, and its output [tokens, D] in this network, floor and subject.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        floor: TorchOps,
        subject: QuantizedOps,
        layers: dict[str, Difference],
        note: Note,
    ) -> None:
        super().__init__(weights, torch.float32)
        self._floor = floor
        self._subject = subject
        self._layers = layers
        self._note = note

    def linear(
        self, rows: torch.Tensor, weight: str, part: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """The product in float32."""
        subject = self._subject
        if weight in subject.quantized:
            inputs, own = rows.to(subject.dtype), subject.weights[weight].float()
            own = own if part is None else own[part[0] : part[1]]
            error = self._layers.setdefault(weight, Difference())
            error.add(subject.linear(inputs, weight, part), F.linear(inputs.float(), own))
        return super().linear(rows, weight, part)

    def block(self, function: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Any:
        """A block in float32."""
        outputs = function(self, name, *args, **kwargs)
        reference = function in _REFERENCE_BLOCKS
        if reference and args[-1]:  # of the last one, keys and values are all that is read
            return outputs
        others = (
            function(ops, name, *_converted(args, ops.dtype), **kwargs)
            for ops in (self._floor, self._subject)
        )
        self._note(name, *(_rows(x, reference) for x in (outputs, *others)))
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
