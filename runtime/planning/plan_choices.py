"""What would fit in place of a request that does not: found by planning it."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from klein_kv.artifacts.signature import KVFormat
from klein_kv.runtime.planning.footprint import PRECISIONS, Footprint
from klein_kv.runtime.planning.memory_plan import MemoryPlan
from klein_kv.runtime.planning.request import Request, edit_stages

__all__ = ["Choice", "what_fits"]

_SMALLEST_SIDE = 128
_SMALLEST_REFERENCE = 64
_PRECISIONS = ("fp8", "nvfp4")

_Planner = Callable[[Footprint, Request], MemoryPlan]
_Changes = Iterator[tuple[str, Footprint, Request]]
"""Changed requests, the least change first, each with its text for people."""


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


def what_fits(plan: MemoryPlan, make: _Planner, *, device: bool = True) -> list[Choice]:
    """Changes that make a request fit, each by itself; if none does, several together.

    Args:
        plan: of the request, which does not fit.
        make: plans another one for the same device.
        device: whether smaller weights and K/V in eight bits help: not on a host, where weights
            are mapped files and keys and values are computed with as they are.

    Returns:
        The least change of each kind; empty where nothing helps.
    """
    in_fewer_bits = (_eight_bits, _quantized) if device else ()
    kinds = (_fewer_references, *in_fewer_bits, _smaller_references, _smaller_output, _fewer_images)
    choices = [_first(kind(plan.footprint, plan.request), make) for kind in kinds]
    if device and not any(choices):
        choices = [_first(_together(plan.footprint, plan.request), make)]
    return [choice for choice in choices if choice is not None]


def _first(changes: _Changes, make: _Planner) -> Choice | None:
    for text, footprint, request in changes:
        plan = make(footprint, request)
        if plan.fits:
            return Choice(text, plan)
    return None


def _fewer_references(footprint: Footprint, request: Request) -> _Changes:
    if request.kv_held:
        return
    for count in reversed(range(1, len(request.references))):
        text = f"{count} reference{'s' * (count > 1)}"
        yield text, footprint, replace(request, references=request.references[:count])
    none = edit_stages("plain" if "plain_step" in request.stages else "kv", 0)
    # An edit, not the encoding of references alone.
    if request.references and not set(none).isdisjoint(request.stages):
        stages = tuple(stage for stage in none if stage in (*request.stages, "cached_step"))
        yield "no references", footprint, replace(request, references=(), stages=stages)


def _eight_bits(footprint: Footprint, request: Request) -> _Changes:
    if footprint.kv_bytes(request) and not footprint.kv_dtype.startswith("float8"):
        yield "fp8 K/V", replace(footprint, kv_dtype=KVFormat.FP8_PER_HEAD), request


def _quantized(footprint: Footprint, request: Request) -> _Changes:
    own, text = footprint.precision, footprint.text_precision
    for precision in _PRECISIONS:
        if PRECISIONS[precision] < PRECISIONS[own]:
            yield f"{precision} transformer", footprint.quantized(precision, text), request
    if PRECISIONS["fp8"] < PRECISIONS[text]:
        yield "fp8 text encoder", footprint.quantized(own, "fp8"), request


def _smaller_references(footprint: Footprint, request: Request) -> _Changes:
    """All references by eighths of their sides."""
    if request.kv_held or not request.references:
        return
    unit = footprint.config.vae.multiple_of
    for eighths in reversed(range(1, 8)):
        sizes = tuple(
            (
                max(_SMALLEST_REFERENCE, height * eighths // 8 // unit * unit),
                max(_SMALLEST_REFERENCE, width * eighths // 8 // unit * unit),
            )
            for height, width in request.references
        )
        height, width = max(sizes, key=math.prod)
        yield f"references up to {width}x{height}", footprint, replace(request, references=sizes)


def _smaller_output(footprint: Footprint, request: Request) -> _Changes:
    unit = footprint.config.vae.multiple_of
    longest = max(request.height, request.width)
    for side in range(longest - unit, _SMALLEST_SIDE - 1, -unit):
        height, width = (
            max(_SMALLEST_SIDE, value * side // longest // unit * unit)
            for value in (request.height, request.width)
        )
        yield f"{width}x{height}", footprint, replace(request, height=height, width=width)


def _fewer_images(footprint: Footprint, request: Request) -> _Changes:
    for batch in reversed(range(1, request.batch)):
        yield f"batch {batch}", footprint, replace(request, batch=batch)


def _together(footprint: Footprint, request: Request) -> _Changes:
    """Smaller weights, keys and values in eight bits; one image at a time; fewer references."""
    packed = replace(footprint, kv_dtype=KVFormat.FP8_PER_HEAD)
    single = replace(request, batch=1)
    requests = [("", request)]
    if request.batch > 1:
        requests.append(("batch 1 with ", single))
    requests += [(f"{text} with ", less) for text, _, less in _fewer_references(footprint, single)]
    for text, less in requests:
        for precision in _PRECISIONS:
            if PRECISIONS[precision] <= PRECISIONS[footprint.precision]:
                change = f"{text}{precision} transformer, fp8 text encoder and fp8 K/V"
                yield change, packed.quantized(precision, "fp8"), less
