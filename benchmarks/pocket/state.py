"""Training state in one safetensors file, written aside and renamed: a killed run goes on."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

__all__ = ["load_averaged", "load_state", "save_state"]


def _optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    return {
        f"optimizer.{number}.{parameter}.{name}": torch.as_tensor(value)
        for number, optimizer in enumerate(optimizers)
        for parameter, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def save_state(
    path: Path,
    module: nn.Module,
    averaged: Mapping[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    spent: float,
    step: int,
) -> None:
    """Writes weights, their average, the optimizers' state, seconds spent and steps done."""
    tensors = {f"module.{name}": value for name, value in module.state_dict().items()}
    tensors |= {f"averaged.{name}": value for name, value in averaged.items()}
    tensors |= _optimizer_tensors(optimizers)
    partial = path.with_suffix(".partial")
    save_file(
        {name: value.contiguous().clone() for name, value in tensors.items()},
        partial,
        metadata={"spent": str(spent), "step": str(step)},
    )
    partial.replace(path)


def load_state(
    path: Path,
    module: nn.Module,
    averaged: Mapping[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
) -> tuple[float, int]:
    """Reads what `save_state` wrote; returns seconds spent and steps done, 0 without a file."""
    if not path.is_file():
        return 0.0, 0
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    weights: dict[str, Tensor] = {}
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a mapping
            kind, name = key.split(".", 1)
            if kind == "module":
                weights[name] = file.get_tensor(key)
            elif kind == "averaged":
                averaged[name].copy_(file.get_tensor(key))
            else:
                number, parameter, name = name.split(".", 2)
                state = states[int(number)].setdefault(int(parameter), {})
                state[name] = file.get_tensor(key)
        numbers = file.metadata()
    module.load_state_dict(weights)
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return float(numbers["spent"]), int(numbers["step"])


def load_averaged(path: Path) -> dict[str, Tensor]:
    """The averaged weights alone."""
    with safe_open(path, "pt") as file:
        return {
            key.removeprefix("averaged."): file.get_tensor(key)
            for key in file.keys()  # noqa: SIM118 - not a mapping
            if key.startswith("averaged.")
        }
