"""Progress of a TensorRT build: a bar on a terminal, a line per stage otherwise."""

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

__all__ = ["PhaseTree", "make_monitor"]

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Phase:
    parent: str | None
    steps: int
    done: int = 0
    inner: float = 0.0  # of the step that is under way


class PhaseTree:
    """Phases within phases, as TensorRT reports them, to one number from 0 to 1.

    Attributes:
        fraction: share of the build that is done; never falls.
    """

    def __init__(self) -> None:
        self.fraction = 0.0
        self._phases: dict[str, _Phase] = {}

    def start(self, name: str, parent: str | None, steps: int) -> bool:
        """Opens a phase; says whether it is a stage (one level below the build) worth a line."""
        self._phases[name] = _Phase(parent, max(steps, 1))
        return parent is not None and self._phases.get(parent, _Phase("", 1)).parent is None

    def step(self, name: str) -> None:
        """Counts a step of a phase, and what it is of those around it."""
        phase = self._phases.get(name)
        if phase is not None:
            phase.done, phase.inner = phase.done + 1, 0.0
        while phase is not None:
            share = min(phase.done + phase.inner, phase.steps) / phase.steps
            if phase.parent is None:
                self.fraction = max(self.fraction, share)
            phase = self._phases.get(phase.parent or "")
            if phase is not None:
                phase.inner = max(phase.inner, share)

    def finish(self, name: str) -> None:
        """Closes a phase."""
        phase = self._phases.pop(name, None)
        if phase is not None and phase.parent is None:
            self.fraction = 1.0


@contextlib.contextmanager
def make_monitor(
    trt: Any, title: str, show: bool | None, stopped: threading.Event
) -> Iterator[Any]:
    """An `IProgressMonitor` for one build, which ends it at the next step once `stopped` is set.

    `title` begins the bar, or each line; `show` None shows a bar on a terminal.
    """
    visible = sys.stderr.isatty() if show is None else show
    tree = PhaseTree()
    bar = tqdm(
        total=100,
        desc=title,
        disable=not visible,
        leave=False,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}",
    )

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if tree.start(name, parent, steps):
                bar.set_postfix_str(f" {name}", refresh=False)
                if not visible:
                    _log.info("%s: %s", title, name)

        def step_complete(self, name: str, step: int) -> bool:  # noqa: ARG002
            tree.step(name)
            bar.update(int(100 * tree.fraction) - bar.n)
            return not stopped.is_set()

        def phase_finish(self, name: str) -> None:
            tree.finish(name)

    try:
        yield Monitor()
    finally:
        bar.close()
