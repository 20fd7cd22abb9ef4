"""What would fit in place of a request that does not: found by planning it."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from klein_kv.runtime.planning.memory_plan import (
    PRECISIONS,
    Footprint,
    MemoryPlan,
    Request,
    edit_stages,
)

__all__ = ["Choice", "what_fits"]

_SMALLEST_SIDE = 128
_SMALLEST_REFERENCE = 64
_PRECISIONS = ("fp8", "nvfp4")


@dataclass(frozen=True, slots=True)
class Choice:
    """A change that makes a request fit.

    Attributes:
        text: the change, for people: "2 references".
        plan: of the changed request.
    """

    text: str
    plan: MemoryPlan

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"change": self.text, "peak": self.plan.peak}


def what_fits(
    plan: MemoryPlan, make: Callable[[Footprint, Request], MemoryPlan], *, device: bool = True
) -> list[Choice]:
    """Changes that make a request fit, each by itself; if none does, several together.

    Args:
        plan: of the request, which does not fit.
        make: plans another one for the same device.
        device: whether smaller weights and K/V in eight bits help: not on a host, where weights
            are mapped files and keys and values are computed with as they are.

    Returns:
        The least change of each kind; empty where nothing helps.
    """
    footprint, request = plan.footprint, plan.request
    kinds: list[Iterator[tuple[str, Footprint, Request]]] = [
        ((_count(len(less.references)), footprint, less) for less in _fewer(request)),
        ((text, footprint, less) for text, less in _smaller_references(footprint, request)),
        _smaller(footprint, request),
        ((f"batch {less.batch}", footprint, less) for less in _batches(request)),
    ]
    if device:
        kinds.insert(1, _eight_bits(footprint, request))
        kinds.insert(2, ((text, less, request) for text, less in _quantized(footprint)))
    found = [choice for kind in kinds if (choice := _first(kind, make))]
    if found or not device:
        return found
    together = _first(_together(footprint, request), make)
    return [together] if together else []


def _first(
    kind: Iterator[tuple[str, Footprint, Request]],
    make: Callable[[Footprint, Request], MemoryPlan],
) -> Choice | None:
    for text, footprint, request in kind:
        plan = make(footprint, request)
        if plan.fits:
            return Choice(text, plan)
    return None


def _count(references: int) -> str:
    if not references:
        return "no references"
    return f"{references} reference{'s' if references > 1 else ''}"


def _fewer(request: Request) -> Iterator[Request]:
    if request.kv_held:
        return
    plain = "plain_step" in request.stages
    for count in reversed(range(len(request.references))):
        kept = request.references[:count]
        if count:
            yield replace(request, references=kept)
            continue
        none = edit_stages("plain" if plain else "kv", 0)
        if not set(none).isdisjoint(request.stages):  # an edit, not the encoding of references
            same = tuple(stage for stage in none if stage in (*request.stages, "cached_step"))
            yield replace(request, references=(), stages=same)


def _eight_bits(footprint: Footprint, request: Request) -> Iterator[tuple[str, Footprint, Request]]:
    if footprint.kv_bytes(request) and not footprint.kv_dtype.startswith("float8"):
        yield "fp8 K/V", replace(footprint, kv_dtype="float8_e4m3fn"), request


def _quantized(footprint: Footprint) -> Iterator[tuple[str, Footprint]]:
    own, text = footprint.precision, footprint.text_precision
    for precision in _PRECISIONS:
        if PRECISIONS[precision] < PRECISIONS[own]:
            yield f"{precision} transformer", footprint.quantized(precision, text)
    if PRECISIONS["fp8"] < PRECISIONS[text]:
        yield "fp8 text encoder", footprint.quantized(own, "fp8")


def _smaller_references(footprint: Footprint, request: Request) -> Iterator[tuple[str, Request]]:
    """All references by eighths of their sides."""
    unit = footprint.config.vae.multiple_of
    if request.kv_held or not request.references:
        return
    for eighths in reversed(range(1, 8)):
        sizes = tuple(
            (_part(height, eighths, unit), _part(width, eighths, unit))
            for height, width in request.references
        )
        height, width = max(sizes, key=math.prod)
        yield f"references up to {width}x{height}", replace(request, references=sizes)


def _part(side: int, eighths: int, unit: int) -> int:
    return max(_SMALLEST_REFERENCE, side * eighths // 8 // unit * unit)


def _smaller(footprint: Footprint, request: Request) -> Iterator[tuple[str, Footprint, Request]]:
    unit = footprint.config.vae.multiple_of
    longest = max(request.height, request.width)
    for side in range(longest - unit, _SMALLEST_SIDE - 1, -unit):
        height, width = (
            max(_SMALLEST_SIDE, value * side // longest // unit * unit)
            for value in (request.height, request.width)
        )
        yield f"{width}x{height}", footprint, replace(request, height=height, width=width)


def _batches(request: Request) -> Iterator[Request]:
    for batch in reversed(range(1, request.batch)):
        yield replace(request, batch=batch)


def _together(footprint: Footprint, request: Request) -> Iterator[tuple[str, Footprint, Request]]:
    """Smaller weights, keys and values in eight bits; one image at a time; fewer references."""
    packed = replace(footprint, kv_dtype="float8_e4m3fn")
    single = replace(request, batch=1)
    requests = [("", request)]
    if request.batch > 1:
        requests.append(("batch 1 with ", single))
    requests += [(f"{_count(len(less.references))} with ", less) for less in _fewer(single)]
    for text, less in requests:
        for precision in _PRECISIONS:
            if PRECISIONS[precision] <= PRECISIONS[footprint.precision]:
                change = f"{text}{precision} transformer, fp8 text encoder and fp8 K/V"
                yield change, packed.quantized(precision, "fp8"), less
