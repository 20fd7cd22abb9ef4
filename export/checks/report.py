"""A report of checks that go on when one fails: one JSON file, fit for a bug report.

It names nothing that is the user's. It is written when a check begins and when it ends, so that a
library that ends the process leaves what was found before, and which check was under way.
"""

import json
import logging
import platform
import re
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from klein_kv.artifacts.digest import write_atomic
from klein_kv.errors import ArtifactError, KleinKVError
from klein_kv.export.checks.graph_runs import Row

__all__ = ["Check", "Report"]

_log = logging.getLogger(__name__)

_HOMES = re.compile(r"(/home/|/Users/|[A-Za-z]:\\+Users\\+)[^/\\\s'\":]+")


@dataclass(slots=True)
class Check:
    """One check; whatever its `with` block raises ends the block alone.

    Its status is "passed", "failed", or "running" in the report of a process that ended meanwhile;
    `save` is called when it begins and when it ends.
    """

    name: str
    save: Callable[[], None]
    status: str = "running"
    seconds: float = 0.0
    message: str = ""
    measured: dict[str, Any] = field(default_factory=dict)

    def __enter__(self) -> Self:
        self.seconds = -time.perf_counter()
        self.save()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        self.seconds += time.perf_counter()
        if error is not None and not isinstance(error, Exception):
            return False  # an interruption
        self.status = "passed" if error is None else "failed"
        self.message = "" if error is None else _words(error)
        _log.info("%s  %7.2f s  %s", self.status, self.seconds, self.name)
        self.save()
        return True

    def hold(self, rows: list[Row]) -> None:
        """Notes comparisons.

        Raises:
            ArtifactError: one is out of tolerance.
        """
        self.measured["rows"] = [row.to_dict() for row in rows]
        failed = [row for row in rows if not row.ok]
        if failed:
            raise ArtifactError(
                "; ".join(
                    f"{row.name} is off by {row.difference.relative:.3g} (relative), by "
                    f"{row.difference.max:.3g} at most, expected "
                    f"{row.tolerance.bound:.3g} (measured elsewhere: {row.tolerance.measured:.2g})"
                    for row in failed
                )
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        names = ("name", "status", "seconds", "message", "measured")
        return {name: getattr(self, name) for name in names}


class Report:
    """Checks of one run, and what they ran on: versions, GPU, digests.

    The file `out` is kept up to date, if there is one; `hidden` maps texts to what stands for them.
    """

    def __init__(self, out: Path | None, hidden: Mapping[str, str]) -> None:
        self.checks: list[Check] = []
        self.facts: dict[str, Any] = {}
        self._out = out
        self._hidden = {str(Path.home()): "~", platform.node(): "HOST", **hidden}
        self._hidden.pop("", None)

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.status == "passed" for check in self.checks)

    def check(self, name: str) -> Check:
        """Begins a check: `with report.check(...) as check:`."""
        self.checks.append(Check(name, self._save))
        return self.checks[-1]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON takes it, without what is hidden."""
        checks = [check.to_dict() for check in self.checks]
        value = {"format": "klein-kv verify", "format_version": 1, "ok": self.ok, **self.facts}
        cleaned: dict[str, Any] = self._clean(value | {"checks": checks})
        return cleaned

    def to_text(self) -> str:
        """A line for each check and each comparison."""
        lines = []
        for check in self.checks:
            lines.append(f"{check.status:8} {check.name}  {self._clean(check.message)}".rstrip())
            lines += [
                f"         {row['name']:40} relative {row['relative'] or 0:9.2e}, "
                f"tolerance {row['tolerance']:.3g}"
                for row in check.measured.get("rows", [])
            ]
        count = sum(check.status == "passed" for check in self.checks)
        return "\n".join([*lines, f"{count} of {len(self.checks)} checks passed"])

    def _save(self) -> None:
        if self._out is not None:
            write_atomic(self._out, (json.dumps(self.to_dict(), indent=1) + "\n").encode())

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
    if isinstance(error, KleinKVError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    calls = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
    return f"{type(error).__name__}: {error} (in {', '.join(calls)})"
