"""Where the seconds of a call go: marks around every graph and copy, read when the call is done.

On a GPU the marks are events on the backend's stream, so taking them waits for nothing; what lies
between two of them is what the device needed, whenever the host queued it. Elsewhere they are the
host's clock. A graph's first run includes loading it: `KleinKVPipeline.warm_up` does that before.
"""

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, ParamSpec, TypeVar

from numpy.typing import NDArray

from klein_kv.errors import BackendError
from klein_kv.runtime.backend import Backend, Buffer, DeviceClock, GraphMemory

__all__ = ["HostClock", "Span", "TimedBackend", "Timings", "record_timings", "timings_from_spans"]

COPIES = "copies"
_STEPS = ("first_step", "cached_step", "plain_step")

P = ParamSpec("P")
R = TypeVar("R")


class Span(NamedTuple):
    """One run of a graph, or one copy, between two marks; `stage` is the graph or "copies"."""

    stage: str
    start: object
    end: object


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of one call by stage; 0, or empty, where the call had no such stage.

    Attributes:
        text: the text encoder; 0 for a prompt seen before.
        vae_encode: the VAE encoder, all references together.
        encode_references: keys and values made without a step.
        first_step: the step that makes keys and values.
        cached_steps: every step on keys and values that were there.
        plain_steps: every step of plain klein.
        step_gaps: between the end of a step and the start of the next: the loop itself, callbacks
            and their copies; on a GPU the time that it waited for the host.
        vae_decode: the VAE decoder.
        copies: host to device and back.
        total: the whole call by the host's clock.
    """

    text: float = 0.0
    vae_encode: float = 0.0
    encode_references: float = 0.0
    first_step: float = 0.0
    cached_steps: tuple[float, ...] = ()
    plain_steps: tuple[float, ...] = ()
    step_gaps: tuple[float, ...] = ()
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
        once = (self.text, self.vae_encode, self.encode_references, self.vae_decode, self.copies)
        return sum(once) + sum(self.steps)

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
    """Adds up what was recorded.

    Args:
        spans: in the order in which they ended.
        elapsed: seconds between two marks.
        total: seconds of the whole call.
    """
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
        text=sum(seconds["text_encoder"]),
        vae_encode=sum(seconds["vae_encoder"]),
        encode_references=sum(seconds["encode_references"]),
        first_step=sum(seconds["first_step"]),
        cached_steps=tuple(seconds["cached_step"]),
        plain_steps=tuple(seconds["plain_step"]),
        step_gaps=tuple(gaps),
        vae_decode=sum(seconds["vae_decoder"]),
        copies=sum(seconds[COPIES]),
        total=total,
    )


class HostClock:
    """Marks for backends whose calls return when the work is done."""

    def mark(self) -> float:
        """Now, in seconds."""
        return time.perf_counter()

    def elapsed(self, start: Any, end: Any) -> float:
        """Seconds between two marks."""
        return float(end - start)


_SPANS: ContextVar[list[Span] | None] = ContextVar("spans", default=None)
"""What the call under way has recorded; of this thread alone."""


class TimedBackend:
    """A backend that passes everything on, and records graphs and copies while a call asks for it.

    Args:
        backend: does the work; its own clock is used where it has one (`DeviceClock`).
        nvtx: mark every graph and copy as an NVTX range (needs the nvtx package).

    Raises:
        BackendError: nvtx is not installed.
    """

    def __init__(self, backend: Backend, *, nvtx: bool = False) -> None:
        self.name = backend.name
        self._backend = backend
        self._clock = backend if isinstance(backend, DeviceClock) else HostClock()
        self._range: Callable[[str], contextlib.AbstractContextManager[object]] = (
            _nvtx_ranges() if nvtx else contextlib.nullcontext
        )

    def run(self, graph: str, inputs: Mapping[str, Buffer]) -> dict[str, Buffer]:
        """See `Backend.run`."""
        with self._span(graph):
            return self._backend.run(graph, inputs)

    def upload(self, array: NDArray[Any]) -> Buffer:
        """See `Backend.upload`."""
        with self._span(COPIES):
            return self._backend.upload(array)

    def download(self, buffer: Buffer) -> NDArray[Any]:
        """See `Backend.download`."""
        with self._span(COPIES):
            return self._backend.download(buffer)

    def view(self, buffer: Buffer, shape: tuple[int, ...]) -> Buffer:
        """See `Backend.view`."""
        return self._backend.view(buffer, shape)

    def release(self, graph: str) -> None:
        """See `Backend.release`."""
        self._backend.release(graph)

    def available_memory(self) -> int:
        """See `Backend.available_memory`."""
        return self._backend.available_memory()

    def graph_memory(self, graph: str) -> GraphMemory:
        """See `Backend.graph_memory`."""
        return self._backend.graph_memory(graph)

    @contextlib.contextmanager
    def record(self) -> Iterator[Callable[[], Timings]]:
        """Records until the block ends.

        Yields:
            What gives the timings so far; to be called after the last download, so that there is
            nothing left to wait for.
        """
        spans: list[Span] = []
        token = _SPANS.set(spans)
        start = time.perf_counter()
        try:
            yield lambda: timings_from_spans(
                spans, self._clock.elapsed, time.perf_counter() - start
            )
        finally:
            _SPANS.reset(token)

    def _span(self, stage: str) -> contextlib.AbstractContextManager[object]:
        spans = _SPANS.get()
        return self._range(stage) if spans is None else self._recorded(stage, spans)

    @contextlib.contextmanager
    def _recorded(self, stage: str, spans: list[Span]) -> Iterator[None]:
        with self._range(stage):
            start = self._clock.mark()
            yield
            spans.append(Span(stage, start, self._clock.mark()))


def record_timings(call: Callable[P, R]) -> Callable[P, R]:
    """Makes a pipeline's call leave what it took in `timings`; one that fails leaves the old."""

    @functools.wraps(call)
    def timed(*args: P.args, **kwargs: P.kwargs) -> R:
        pipeline: Any = args[0]
        with pipeline.timed_backend.record() as timings:
            result = call(*args, **kwargs)
            pipeline.timings = timings()
        return result

    return timed


def _nvtx_ranges() -> Callable[[str], Any]:
    try:
        import nvtx
    except ImportError as error:
        raise BackendError(
            "NVTX ranges need the nvtx package; install it with pip install 'klein-kv[nvtx]'"
        ) from error

    def mark(stage: str) -> Any:
        return nvtx.annotate(stage, domain="klein_kv")

    return mark
