"""What a self-test found: checks that go on when one fails, and one JSON file that holds no names.

The file is written anew after every check, aside first. A library that takes the process down so
leaves what was found before, and which check was under way.
"""

import contextlib
import json
import logging
import os
import platform
import re
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from klein_kv import __version__
from klein_kv.errors import KleinKVError, RequestError

__all__ = ["Check", "CheckError", "CheckSkipped", "Report"]

_log = logging.getLogger(__name__)

_FORMAT = "klein-kv selftest"
_FORMAT_VERSION = 1
_HOMES = re.compile(r"(/home/|/Users/|[A-Za-z]:\\+Users\\+)[^/\\\s'\":]+")

Status = Literal["running", "passed", "failed", "skipped"]


class CheckError(Exception):
    """A check's own verdict; everything else that a check raises is a failure too.

    Args:
        message: what was found, and what was expected.
        measured: the numbers behind it.
    """

    def __init__(self, message: str, measured: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.measured = dict(measured or {})


class CheckSkipped(Exception):  # noqa: N818 - no error
    """A check that finds that it is none of its business here."""


@dataclass(slots=True)
class Check:
    """One check.

    Attributes:
        name: what was checked.
        status: "running" only in the report of a process that ended during this check.
        seconds: how long it took.
        measured: numbers.
        message: why it failed or was left out.
    """

    name: str
    status: Status = "running"
    seconds: float = 0.0
    measured: dict[str, Any] = field(default_factory=dict)
    message: str = ""


class Report:
    """Checks and facts of one run.

    Args:
        out: file to keep up to date; None keeps none.
        hidden: text -> what stands for it in the report: paths that are nobody's business.

    Attributes:
        checks: in the order in which they began.
        facts: what the checks ran on, by topic.
    """

    def __init__(self, out: Path | None = None, hidden: Mapping[str, str] | None = None) -> None:
        self.checks: list[Check] = []
        self.facts: dict[str, Any] = {}
        self._out = out
        self._hidden = {str(Path.home()): "~", platform.node(): "HOST"} | dict(hidden or {})
        self._hidden.pop("", None)

    @property
    def failed(self) -> list[Check]:
        """Checks that failed."""
        return [check for check in self.checks if check.status == "failed"]

    @property
    def ok(self) -> bool:
        """Whether something passed and nothing failed."""
        return not self.failed and any(check.status == "passed" for check in self.checks)

    def hide(self, path: Path, stand_in: str) -> None:
        """Keeps a path out of the report."""
        self._hidden[str(path)] = stand_in

    def run(self, name: str, function: Callable[[], Mapping[str, Any] | None]) -> bool:
        """Runs one check; whatever it raises is noted, and the next one can run.

        Args:
            name: what is checked.
            function: raises if it fails; returns what it measured.

        Returns:
            Whether it passed.
        """
        check = Check(name)
        self.checks.append(check)
        self.save()
        start = time.perf_counter()
        try:
            check.measured = dict(function() or {})
            check.status = "passed"
        except CheckSkipped as reason:
            check.status, check.message = "skipped", str(reason)
        except Exception as error:  # noqa: BLE001 - the report is where all of them go
            check.status = "failed"
            check.message = _words(error)
            check.measured = getattr(error, "measured", {})
        check.seconds = time.perf_counter() - start
        self._told(check)
        return check.status == "passed"

    def attempt(self, name: str, function: Callable[[], object]) -> bool:
        """Does what belongs to no check; it is noted only if it fails.

        Args:
            name: what is done.
            function: raises if it fails.

        Returns:
            Whether it succeeded.
        """
        try:
            function()
        except Exception as error:  # noqa: BLE001 - as in `run`
            self.checks.append(Check(name, "failed", message=_words(error)))
            self._told(self.checks[-1])
            return False
        return True

    def skip(self, name: str, reason: str) -> None:
        """Notes a check that is left out."""
        self.checks.append(Check(name, "skipped", message=reason))
        self._told(self.checks[-1])

    def _told(self, check: Check) -> None:
        told = f": {self._clean(check.message)}" if check.message else ""
        _log.info("%-7s %7.2f s  %s%s", check.status, check.seconds, check.name, told)
        self.save()

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON takes it, without what is hidden."""
        value = {
            "format": _FORMAT,
            "format_version": _FORMAT_VERSION,
            "klein_kv": __version__,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "ok": self.ok,
            "failed": [check.name for check in self.failed],
            **self.facts,
            "checks": [asdict(check) for check in self.checks],
        }
        cleaned: dict[str, Any] = self._clean(value)
        return cleaned

    def to_text(self) -> str:
        """A line per check, and the outcome."""
        lines = []
        for check in self.checks:
            told = f"  {self._clean(check.message)}" if check.message else ""
            lines.append(f"{check.status:8} {check.name}{told}")
        counts = {
            status: sum(check.status == status for check in self.checks)
            for status in ("passed", "failed", "skipped")
        }
        lines.append(", ".join(f"{count} {status}" for status, count in counts.items()))
        return "\n".join(lines)

    def save(self) -> None:
        """Writes the file.

        Raises:
            RequestError: it cannot be written there.
        """
        if self._out is None:
            return
        partial = self._out.with_name(f".{self._out.name}.partial-{os.getpid()}")
        try:
            partial.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
            partial.replace(self._out)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise RequestError(
                f"the report cannot be written to {self._out} ({error.strerror}); name another "
                "file with --out"
            ) from error

    def _clean(self, value: Any) -> Any:
        if isinstance(value, str):
            for text in sorted(self._hidden, key=len, reverse=True):
                value = value.replace(text, self._hidden[text])
            return _HOMES.sub("~", value)
        if isinstance(value, Mapping):
            return {self._clean(key): self._clean(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._clean(item) for item in value]
        return value


def _words(error: Exception) -> str:
    """An error of ours is its message; of another one the last calls say where it came from."""
    if isinstance(error, KleinKVError | CheckError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    calls = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
    return f"{type(error).__name__}: {error} (in {', '.join(calls)})"
