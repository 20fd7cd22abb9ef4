"""Where the seconds of a call go: marks around every graph and copy, read when the call is done.

On a GPU the marks are events on the backend's stream, so taking them waits for nothing; what lies
between two of them is what the device needed, whenever the host queued it. Elsewhere they are the
host's clock. What is loaded when its graph first runs counts for that graph.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of one call by stage; 0, or empty, where the call had no such stage.

    Attributes:
        load: weights and engines, and memory taken, before the first graph ran.
        text: the text encoder; 0 for a prompt seen before.
        vae_encode: the VAE encoder, all references together.
        encode_references: keys and values made without a step.
        first_step: the step that makes keys and values.
        cached_steps: every step on keys and values that were there.
        plain_steps: every step of plain klein.
        step_gaps: between the end of a step and the start of the next: the loop itself, callbacks
            and their copies, `blend`; on a GPU the time that it waited for the host.
        blend: mixing latents with a start image, all steps together.
        vae_decode: the VAE decoder.
        copies: host to device and back.
        total: the whole call by the host's clock.
    """

    load: float = 0.0
    text: float = 0.0
    vae_encode: float = 0.0
    encode_references: float = 0.0
    first_step: float = 0.0
    cached_steps: tuple[float, ...] = ()
    plain_steps: tuple[float, ...] = ()
    step_gaps: tuple[float, ...] = ()
    blend: float = 0.0
    vae_decode: float = 0.0
    copies: float = 0.0
    total: float = 0.0

    @property
    def steps(self) -> tuple[float, ...]:
        """Every step, in order."""
        first = (self.first_step,) if self.first_step else ()
        return first + self.cached_steps + self.plain_steps

    @property
    def stages(self) -> float:
        """All stages together; the rest of `total` is the host's own work."""
        once = (self.load, self.text, self.vae_encode, self.encode_references)
        return sum(once) + sum(self.steps) + self.blend + self.vae_decode + self.copies

    def to_dict(self) -> dict[str, Any]:
        """Every field, and `stages`, as JSON takes them."""
        return {**asdict(self), "stages": self.stages}

    def to_text(self) -> str:
        """One line for people: what took part, in the order of a call."""
        parts = [
            (name.replace("_", " "), value)
            for name, value in asdict(self).items()
            if value and isinstance(value, float) and name != "total"
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
    gaps: list[float] = []
    last_step: Span | None = None
    for span in spans:
        seconds[span.stage].append(elapsed(span.start, span.end))
        if span.stage in _STEPS:
            if last_step is not None:
                gaps.append(elapsed(last_step.end, span.start))
            last_step = span
    return Timings(
        load=sum(seconds[LOADING]),
        text=sum(seconds["text_encoder"]),
        vae_encode=sum(seconds["vae_encoder"]),
        encode_references=sum(seconds["encode_references"]),
        first_step=sum(seconds["first_step"]),
        cached_steps=tuple(seconds["cached_step"]),
        plain_steps=tuple(seconds["plain_step"]),
        step_gaps=tuple(gaps),
        blend=sum(seconds["blend"]),
        vae_decode=sum(seconds["vae_decoder"]),
        copies=sum(seconds[COPIES]),
        total=total,
    )


def nvtx_ranges() -> Callable[[str], Any]:
    """Gives NVTX ranges of the domain klein_kv, by name.

    Raises:
        BackendError: nvtx is not installed.
    """
    try:
        import nvtx
    except ImportError as error:
        raise BackendError(
            "NVTX ranges need the nvtx package; install it with pip install 'klein-kv[nvtx]'"
        ) from error

    return functools.partial(nvtx.annotate, domain="klein_kv")
