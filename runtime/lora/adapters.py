"""Which adapters a pipeline holds, which of them are active, and at what weights.

Names and meanings are those of diffusers' LoRA methods: the adapter that is loaded last is the
active one, `set_adapters` chooses others, fused ones stay until `unfuse` whatever is unloaded.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

from klein_kv.errors import RequestError
from klein_kv.runtime.lora.lora_file import Adapter, WeightedAdapter

__all__ = ["Adapters", "adapters_digest"]


class Adapters:
    """Adapters by name. Computes nothing: `wanted` says what should be merged.

    Attributes:
        enabled: whether active adapters count; fused ones do in any case.
    """

    def __init__(self) -> None:
        self.enabled = True
        self._loaded: dict[str, Adapter] = {}
        self._active: dict[str, float] = {}  # weights by name, in order
        self._fused: dict[str, WeightedAdapter] = {}

    @property
    def names(self) -> list[str]:
        """Names of all that are loaded."""
        return list(self._loaded)

    @property
    def active(self) -> list[str]:
        """Names of those that are active, in the order in which they are merged."""
        return list(self._active)

    @property
    def fused(self) -> set[str]:
        """Names of those that are fused."""
        return set(self._fused)

    def new_name(self, name: str | None, *, replaces: bool = False) -> str:
        """The name that an adapter gets: the given one, else "default_N".

        Raises:
            RequestError: it is in use (or, where it `replaces` one, is not), or is no name.
        """
        if name is None and not replaces:
            numbers = range(len(self._loaded), 2 * len(self._loaded) + 1)
            return next(x for n in numbers if (x := f"default_{n}") not in self._loaded)
        if not isinstance(name, str) or not name:
            raise RequestError(f"adapter_name is {name!r}, expected a text")
        if (name in self._loaded) != replaces:
            held = ", ".join(self._loaded) or "none"
            wanted = "one that is loaded" if replaces else "another one"
            raise RequestError(f"adapter_name is {name!r}, expected {wanted} (loaded: {held})")
        return name

    def add(self, name: str, adapter: Adapter) -> None:
        """Takes an adapter in, or replaces the one of that name; a new one is active alone."""
        if name not in self._loaded:
            self._active = {name: 1.0}
        self._loaded[name] = adapter

    def activate(self, names: Sequence[str], weights: Sequence[float]) -> None:
        """Makes these the active ones.

        Raises:
            RequestError: a name that is not loaded, or weights that are no numbers of -4 to 4.
        """
        self._check_loaded(names)
        if len(names) != len(weights):
            raise RequestError(
                f"{len(weights)} weights for {len(names)} adapters, expected as many"
            )
        for name, weight in zip(names, weights, strict=True):
            if not _is_number(weight) or not -4 <= weight <= 4:
                raise RequestError(
                    f"the weight of adapter {name!r} is {weight!r}, expected a number of -4 to 4"
                )
        self._active = {name: float(weight) for name, weight in zip(names, weights, strict=True)}

    def delete(self, names: Sequence[str]) -> None:
        """Forgets adapters. Where none stays active, the first of the others is, at weight 1.

        Raises:
            RequestError: a name that is not loaded.
        """
        self._check_loaded(names)
        for name in names:
            del self._loaded[name]
            self._active.pop(name, None)
        if not self._active and self._loaded:
            self._active = {next(iter(self._loaded)): 1.0}

    def clear(self) -> None:
        """Forgets all but what is fused."""
        self._loaded, self._active, self.enabled = {}, {}, True

    def fuse(self, names: Sequence[str] | None, scale: float) -> None:
        """Makes adapters, None for the active ones, a part of the weights until `unfuse`.

        Raises:
            RequestError: a name that is not loaded, a scale that is no number, nothing to fuse.
        """
        chosen = list(self._active) if names is None else list(names)
        self._check_loaded(chosen)
        if not chosen:
            raise RequestError("there is no active adapter to fuse; load one first")
        if not _is_number(scale):
            raise RequestError(f"lora_scale is {scale!r}, expected a number")
        for name in chosen:
            strength = self._active.get(name, 1.0) * scale
            self._fused[name] = self._loaded[name], strength

    def unfuse(self) -> None:
        """Takes fused adapters out again."""
        self._fused = {}

    def wanted(self, scale: float = 1.0) -> tuple[WeightedAdapter, ...]:
        """What is to be merged for a call, in order; those at weight 0 do nothing.

        Raises:
            RequestError: `scale` is not a number.
        """
        if not _is_number(scale):
            raise RequestError(f"the scale of adapters is {scale!r}, expected a number")
        active = self._active if self.enabled else {}
        added = [
            (self._loaded[name], weight * scale)
            for name, weight in active.items()
            if self._fused.get(name, (None,))[0] is not self._loaded[name]
        ]
        return tuple(x for x in (*self._fused.values(), *added) if x[1] != 0)

    def _check_loaded(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self._loaded:
                raise RequestError(
                    f"there is no adapter {name!r}, expected some of "
                    f"{', '.join(self._loaded) or 'those that load_lora_weights loads'}"
                )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def adapters_digest(adapters: Sequence[WeightedAdapter]) -> str:
    """Hex digest of adapters and weights in order; "" of none."""
    if not adapters:
        return ""
    lines = "".join(f"{adapter.digest} {weight!r}\n" for adapter, weight in adapters)
    return hashlib.sha256(lines.encode()).hexdigest()
