"""Muon in float32, its matrices shared out among the processes.

`torch.optim.Muon` multiplies in bfloat16, which CPUs are slow at, and does all the work in every
process. Source: Keller Jordan, Muon (2024): momentum, made orthogonal by five Newton-Schulz steps;
the rate scaled as in Moonlight (Liu et al. 2025), so that AdamW's rates hold.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, distributed

__all__ = ["Muon"]

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def _orthogonal(matrices: Tensor) -> Tensor:
    """Singular values of [N, rows <= columns] to about 1."""
    a, b, c = _COEFFICIENTS
    matrices = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = matrices @ matrices.mT
        matrices = a * matrices + torch.baddbmm(b * square, square, square, alpha=c) @ matrices
    return matrices


class Muon(torch.optim.Optimizer):
    """For 2-D weights; gradients have to be the same in every process."""

    def __init__(
        self, weights: Iterable[Tensor], momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(
            list(weights), {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        rank, processes = distributed.get_rank(), distributed.get_world_size()
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                by_shape[weight.shape].append(weight)
            updates, order = [], []
            for shape, weights in by_shape.items():
                mine = torch.stack(
                    [
                        weight.grad.lerp(self.state[weight]["momentum"], group["momentum"])
                        for weight in weights[rank::processes]
                    ]
                    or [torch.zeros(shape)]
                )
                wide = mine if shape[0] <= shape[1] else mine.mT
                update = _orthogonal(wide)
                update = update if shape[0] <= shape[1] else update.mT
                result = torch.zeros(len(weights), *shape)
                if weights[rank::processes]:
                    result[rank::processes] = update * 0.2 * max(shape) ** 0.5
                updates.append(result.flatten())
                order += weights
            flat = torch.cat(updates)
            distributed.all_reduce(flat)
            start = 0
            for weight in order:
                update = flat[start : start + weight.numel()].view_as(weight)
                start += weight.numel()
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
