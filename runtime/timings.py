"""Where the seconds of a call go: marks around every graph and copy, read when the call is done.

On a GPU the marks are events on the backend's stream, so taking them waits for nothing; what lies
between two of them is what the device needed, whenever the host queued it. Elsewhere they are the
host's clock. What is loaded when its graph first runs counts for that graph.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from klein_kv.errors import BackendError

__all__ = ["COPIES", "LOADING", "Span", "Timings", "nvtx_ranges", "timings_from_spans"]

COPIES = "copies"
LOADING = "load"
_STEPS = ("first_step", "cached_step", "plain_step")


class Span(NamedTuple):
    """One run of a graph, one copy (`COPIES`) or one loading (`LOADING`), between two marks."""

    stage: str
    start: object
    end: object


_ONCE = {
    "load": LOADING,
    "text": "text_encoder",
    "vae_encode": "vae_encoder",
    "encode_references": "encode_references",
    "first_step": "first_step",
    "blend": "blend",
    "vae_decode": "vae_decoder",
    "copies": COPIES,
}
"""Fields of `Timings` that add up all spans of a stage."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of one call by stage; 0, or empty, where the call had no such stage."""

    load: float = 0.0  # weights and engines, and memory taken, before the first graph ran
    text: float = 0.0  # the text encoder; 0 for a prompt seen before
    vae_encode: float = 0.0  # all references together
    encode_references: float = 0.0  # keys and values made without a step
    first_step: float = 0.0  # the step that makes keys and values
    cached_steps: tuple[float, ...] = ()  # every step on keys and values that were there
    plain_steps: tuple[float, ...] = ()  # every step of plain klein
    # Between the end of a step and the start of the next: the loop itself, callbacks and their
    # copies, `blend`; on a GPU the time that it waited for the host.
    step_gaps: tuple[float, ...] = ()
    blend: float = 0.0  # mixing latents with a start image, all steps together
    vae_decode: float = 0.0
    copies: float = 0.0  # host to device and back
    total: float = 0.0  # the whole call by the host's clock

    @property
    def steps(self) -> tuple[float, ...]:
        """Every step, in order."""
        first = (self.first_step,) if self.first_step else ()
        return first + self.cached_steps + self.plain_steps

    @property
    def stages(self) -> float:
        """All stages together; the rest of `total` is the host's own work."""
        once: float = sum(getattr(self, name) for name in _ONCE)
        return once + sum(self.cached_steps) + sum(self.plain_steps)

    def to_dict(self) -> dict[str, Any]:
        """Every field, and `stages`, as JSON takes them."""
        return {**asdict(self), "stages": self.stages}

    def to_text(self) -> str:
        """One line for people: what took part, in the order of a call."""
        parts = [
            (name.replace("_", " "), seconds) for name in _ONCE if (seconds := getattr(self, name))
        ]
        for kind, values in (("cached", self.cached_steps), ("plain", self.plain_steps)):
            if values:
                parts.append((f"{len(values)} {kind} steps, each", sum(values) / len(values)))
        listed = ", ".join(f"{name} {value:.3f}" for name, value in parts)
        return f"{self.total:.3f} s: {listed}"


def timings_from_spans(
    spans: Sequence[Span], elapsed: Callable[[Any, Any], float], total: float
) -> Timings:
    """Adds up spans, in the order in which they ended; `elapsed` is seconds between two marks."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for span in spans:
        seconds[span.stage].append(elapsed(span.start, span.end))
    steps = [span for span in spans if span.stage in _STEPS]
    return Timings(
        cached_steps=tuple(seconds["cached_step"]),
        plain_steps=tuple(seconds["plain_step"]),
        step_gaps=tuple(elapsed(one.end, after.start) for one, after in pairwise(steps)),
        total=total,
        **{name: sum(seconds[stage]) for name, stage in _ONCE.items()},
    )


def nvtx_ranges() -> Callable[[str], Any]:
    """Gives NVTX ranges of the domain klein_kv, by name; BackendError: nvtx is not installed."""
    try:
        import nvtx
    except ImportError as error:
        raise BackendError(
            "NVTX ranges need the nvtx package; install it with pip install 'klein-kv[nvtx]'"
        ) from error

    return functools.partial(nvtx.annotate, domain="klein_kv")
