"""What TensorRT tells while it builds: errors, kernel plans, memory."""

import logging
import re
from dataclasses import dataclass, field
from typing import Any

__all__ = ["BuildLog", "make_logger"]

_log = logging.getLogger(__name__)
_SCRATCH = re.compile(r"Total Activation Memory: (\d+) bytes")
_TOLD_ERRORS, _TOLD_LENGTH = 2, 600
"""Messages, and characters of them, that an error of ours carries."""


@dataclass(slots=True)
class BuildLog:
    """What TensorRT said during one build."""

    # messages of severity ERROR and worse, in order
    errors: list[str] = field(default_factory=list)
    # per optimization profile, the lines of "Engine Layer Information"
    layers: list[list[str]] = field(default_factory=list)
    # activation memory per optimization profile
    scratch_bytes: list[int] = field(default_factory=list)

    @property
    def reason(self) -> str:
        """TensorRT's own words: the first errors, of which later ones follow."""
        words = " | ".join(message.strip() for message in self.errors[:_TOLD_ERRORS])
        return words[:_TOLD_LENGTH] or "it gave no reason"

    def add(self, message: str) -> None:
        """Keeps what the rest of the project reads of a message; forgets the rest."""
        if message.startswith("Layers:\n") or "Engine Layer Information" in message[:80]:
            # After the kernels comes a table of inputs and outputs; its lines are indented.
            lines = [line for line in message.splitlines() if line.startswith("Name: ")]
            if lines:
                self.layers.append(lines)
        elif match := _SCRATCH.match(message):
            self.scratch_bytes.append(int(match[1]))


def make_logger(trt: Any, log: BuildLog) -> Any:
    """A logger for builds: at VERBOSE, fills `log` and passes warnings on to `logging`.

    Errors are passed on for debugging alone: the caller raises them.
    """

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, level: Any, message: str) -> None:
            if level in (trt.ILogger.VERBOSE, trt.ILogger.INFO):
                log.add(message)
                return
            _log.debug("%s", message)
            if level != trt.ILogger.WARNING:
                log.errors.append(message)

    return Logger()
