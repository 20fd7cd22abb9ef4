"""One way to reach `tensorrt_rtx` and `tensorrt`: which of the two, which version, what it logged.

Both have the same interface where this project uses it; the differences are asked for with
`hasattr` at the place of use. Nothing is imported until `load_module` is called.
"""

import importlib
import logging
import re
from dataclasses import dataclass, field
from typing import Any

from klein_kv.errors import BackendError, RequestError

__all__ = ["MODULES", "BuildLog", "load_module", "make_logger", "module_version"]

_log = logging.getLogger(__name__)

MODULES = ("tensorrt_rtx", "tensorrt")
"""Names that `load_module` takes besides "auto", in the order that "auto" tries them."""

_EXTRAS = {"tensorrt_rtx": "klein-kv[rtx]", "tensorrt": "klein-kv[tensorrt]"}
_SCRATCH = re.compile(r"Total Activation Memory: (\d+) bytes")


def load_module(name: str = "auto") -> Any:
    """Imports TensorRT.

    Args:
        name: "tensorrt_rtx", "tensorrt", or "auto" for the first of them that is installed.

    Raises:
        RequestError: another name.
        BackendError: not installed, or its libraries do not load.
    """
    if name not in ("auto", *MODULES):
        raise RequestError(f"module is {name!r}, expected 'auto' or one of {', '.join(MODULES)}")
    failures = []
    for candidate in MODULES if name == "auto" else (name,):
        try:
            module = importlib.import_module(candidate)
        except (ImportError, OSError, RuntimeError) as error:
            failures.append(f"{candidate}: {error}")
            continue
        if hasattr(module, "Builder"):
            return module
        failures.append(f"{candidate}: it has no Builder (a stub package?)")
    wanted = "TensorRT" if name == "auto" else name
    install = " or ".join(
        f"pip install '{_EXTRAS[candidate]}'"
        for candidate in (MODULES if name == "auto" else (name,))
    )
    raise BackendError(f"{wanted} is not usable ({'; '.join(failures)}); install it: {install}")


def module_version(trt: Any) -> str:
    """Version of the library, e.g. "1.7.1.116"; engines of another version do not load."""
    return str(trt.__version__)


_TOLD_ERRORS, _TOLD_LENGTH = 2, 600
"""Messages, and characters of them, that an error of ours carries."""


@dataclass(slots=True)
class BuildLog:
    """What TensorRT said during one build.

    Attributes:
        errors: messages of severity ERROR and worse, in order.
        layers: one kernel plan per optimization profile: the lines of "Engine Layer Information".
        scratch_bytes: activation memory per optimization profile.
    """

    errors: list[str] = field(default_factory=list)
    layers: list[list[str]] = field(default_factory=list)
    scratch_bytes: list[int] = field(default_factory=list)

    @property
    def reason(self) -> str:
        """TensorRT's own words: the first errors, of which later ones follow."""
        words = " | ".join(message.strip() for message in self.errors[:_TOLD_ERRORS])
        return words[:_TOLD_LENGTH] or "it gave no reason"

    def add(self, message: str) -> None:
        """Keeps what the rest of the project reads of a message; forgets the rest."""
        if message.startswith("Layers:\n") or "Engine Layer Information" in message[:80]:
            lines = [line for line in message.splitlines() if line.startswith("Name: ")]
            # After the kernels comes a table of inputs and outputs; its lines are indented.
            if lines:
                self.layers.append(lines)
        elif found := _SCRATCH.match(message):
            self.scratch_bytes.append(int(found[1]))


def make_logger(trt: Any, log: BuildLog) -> Any:
    """A logger for builds: at VERBOSE, fills `log` and passes warnings on to `logging`.

    Errors are passed on for debugging alone: the caller raises them.
    """
    severity = trt.ILogger

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, level: Any, message: str) -> None:
            if level == severity.VERBOSE or level == severity.INFO:
                log.add(message)
            elif level == severity.WARNING:
                _log.debug("%s", message)
            else:
                _log.debug("%s", message)
                log.errors.append(message)

    return Logger()
