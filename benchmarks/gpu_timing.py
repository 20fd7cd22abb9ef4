"""Time and memory of work on a device: events on a GPU, the host's clock on a CPU."""

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = [
    "Clock",
    "Sample",
    "held_bytes",
    "median_seconds",
    "synchronize",
    "timed",
    "with_spread",
]


@dataclass(slots=True)
class Sample:
    """One run of a denoising loop.

    Attributes:
        steps: seconds of each step, on the device.
        wall: seconds of all steps on the host's clock, the device idle before and after.
        peak_bytes: device memory taken above what was held when the loop began; None on a CPU.
    """

    steps: list[float]
    wall: float
    peak_bytes: int | None

    @property
    def seconds(self) -> float:
        """Seconds of all steps, on the device."""
        return sum(self.steps)


@dataclass(slots=True)
class Clock:
    """Marks points of a device's work without waiting for it; waits only at the two ends.

    Attributes:
        device: whose work. On a GPU marks are events on the current stream.
    """

    device: torch.device
    _marks: list[Any] = field(default_factory=list)
    _wall: float = 0.0
    _held: int = 0

    @property
    def _cuda(self) -> bool:
        return self.device.type == "cuda"

    def start(self) -> None:
        """Begins a sample, with an idle device."""
        synchronize(self.device)
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            self._held = torch.cuda.memory_allocated(self.device)
        self._marks.clear()
        self._wall = time.perf_counter()
        self.mark()

    def mark(self) -> None:
        """Ends a step."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def stop(self) -> Sample:
        """Waits for the last mark; the sample since `start`."""
        synchronize(self.device)
        wall = time.perf_counter() - self._wall
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if not self._cuda:
            return Sample([b - a for a, b in pairs], wall, None)
        steps = [a.elapsed_time(b) / 1e3 for a, b in pairs]  # milliseconds
        peak = torch.cuda.max_memory_allocated(self.device) - self._held
        return Sample(steps, wall, peak)


def synchronize(device: torch.device) -> None:
    """Waits for all work of a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def held_bytes(device: torch.device) -> int:
    """Device memory of tensors and of CUDA graphs, whose own pools serve nobody else; 0 on a CPU.

    What the allocator merely keeps to use again is not counted.
    """
    if device.type != "cuda":
        return 0
    return sum(
        segment["total_size" if any(segment.get("segment_pool_id", ())) else "allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if segment.get("device", device.index) == device.index
    )


def timed(function: Any, device: torch.device, repeats: int, warm_up: int = 1) -> list[float]:
    """Seconds of every repeat of a function, on the device."""
    for _ in range(warm_up):
        function()
    clock = Clock(device)
    clock.start()
    for _ in range(repeats):
        function()
        clock.mark()
    return clock.stop().steps


def median_seconds(function: Any, device: torch.device, repeats: int, warm_up: int = 1) -> float:
    """The median of `timed`."""
    return statistics.median(timed(function, device, repeats, warm_up))


def with_spread(values: list[float]) -> dict[str, float]:
    """Median, smallest, largest and the two quartiles."""
    q1, median, q3 = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * values
    )
    return {"median": median, "min": min(values), "q1": q1, "q3": q3, "max": max(values)}
