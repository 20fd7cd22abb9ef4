"""What would fit in place of a request that does not: found by planning it."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from klein_kv.runtime.planning.footprint import PRECISIONS, Footprint
from klein_kv.runtime.planning.memory_plan import MemoryPlan
from klein_kv.runtime.planning.request import Request, edit_stages

__all__ = ["Choice", "what_fits"]

_SMALLEST_SIDE = 128
_SMALLEST_REFERENCE = 64
_PRECISIONS = ("fp8", "nvfp4")

_Changes = Iterator[tuple[str, Footprint, Request]]
"""Changed requests, the least change first, each with its text for people."""


class Choice(NamedTuple):
    """A change that makes a request fit, for people ("2 references"), and the plan then."""

    text: str
    plan: MemoryPlan


def what_fits(
    plan: MemoryPlan, make: Callable[[Footprint, Request], MemoryPlan], *, device: bool = True
) -> list[Choice]:
    """Changes that make a request fit, each by itself; if none does, several together.

    The least change of each kind. Off a `device` smaller weights and K/V in eight bits do not help:
    on a host weights are mapped files, and keys and values are computed with as they are.
    """

    def least(changes: _Changes) -> list[Choice]:
        for text, footprint, request in changes:
            changed = make(footprint, request)
            if changed.fits:
                return [Choice(text, changed)]
        return []

    in_fewer_bits = (_float8_kv, _fewer_bits) if device else ()
    kinds = (_fewer_references, *in_fewer_bits, _smaller_references, _smaller_output, _fewer_images)
    choices = [choice for kind in kinds for choice in least(kind(plan.footprint, plan.request))]
    return choices or (least(_together(plan.footprint, plan.request)) if device else [])


def _fewer_references(footprint: Footprint, request: Request) -> _Changes:
    if request.kv_held:
        return
    for count in reversed(range(1, len(request.references))):
        text = f"{count} reference{'s' * (count > 1)}"
        yield text, footprint, replace(request, references=request.references[:count])
    none = edit_stages(footprint.graphs.variant, 0)
    # An edit, not the encoding of references alone, and not one that starts from its reference.
    alone = set(none).isdisjoint(request.stages) or "blend" in request.stages
    if request.references and not alone:
        stages = tuple(stage for stage in none if stage in (*request.stages, "cached_step"))
        yield "no references", footprint, replace(request, references=(), stages=stages)


def _float8_kv(footprint: Footprint, request: Request) -> _Changes:
    if footprint.kv_bytes(request) and not footprint.float8_kv:
        yield "fp8 K/V", footprint.changed(float8_kv=True), request


def _fewer_bits(footprint: Footprint, request: Request) -> _Changes:
    own = {name: PRECISIONS[precision] for name, precision in footprint.precisions.items()}
    for precision in _PRECISIONS:
        if PRECISIONS[precision] < own["transformer"]:
            yield f"{precision} transformer", footprint.changed(transformer=precision), request
    if PRECISIONS["fp8"] < own["text_encoder"]:
        yield "fp8 text encoder", footprint.changed(text_encoder="fp8"), request


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
    single = replace(request, batch=1)
    requests = [("", request)]
    if request.batch > 1:
        requests.append(("batch 1 with ", single))
    requests += [(f"{text} with ", less) for text, _, less in _fewer_references(footprint, single)]
    for text, less in requests:
        for precision in _PRECISIONS:
            if PRECISIONS[precision] <= PRECISIONS[footprint.precisions["transformer"]]:
                smaller = footprint.changed(
                    float8_kv=True, transformer=precision, text_encoder="fp8"
                )
                yield f"{text}{precision} transformer, fp8 text encoder and fp8 K/V", smaller, less
