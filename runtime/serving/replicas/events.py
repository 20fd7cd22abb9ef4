"""What passes between the front and a replica: plain data.

Refusals are data too: an exception would come back wrapped, and has to be built by what it holds.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from klein_kv.runtime.serving.errors import ServiceError
from klein_kv.runtime.serving.jobs import (
    EditJob,
    EditResult,
    EncodeJob,
    EncodeResult,
    EngineFacts,
    Pixels,
)

__all__ = [
    "Event",
    "Job",
    "Preview",
    "Refusal",
    "ReplicaHandle",
    "ReplicaLostError",
    "Result",
    "Status",
    "Taken",
]

Job = EditJob | EncodeJob
Result = EditResult | EncodeResult


@dataclass(frozen=True, slots=True)
class Taken:
    """The replica has the job: if it is lost from now on, perhaps because of the job."""


@dataclass(frozen=True, slots=True, eq=False)
class Preview:
    """Arguments of `OnPreview`."""

    step: int
    pixels: Pixels


@dataclass(frozen=True, slots=True)
class Refusal:
    """Arguments of a `ServiceError`."""

    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None

    def error(self) -> "ServiceError | ReplicaLostError":
        """To raise. A replica that takes nothing on is about to end: as good as lost."""
        if self.code in ("not_ready", "draining"):
            return ReplicaLostError(self.message)
        return ServiceError(self.code, self.message, self.param, retry_after_s=self.retry_after_s)


Event = Taken | Preview | Refusal | Result
"""Of a job: `Taken`, previews, and then a refusal or a result."""


@dataclass(frozen=True, slots=True)
class Status:
    """How a replica is.

    Attributes:
        ready: `Engine.ready`.
        gauges: `Engine.gauges`.
    """

    ready: bool
    gauges: dict[str, float]


class ReplicaLostError(Exception):
    """The replica's process is gone, or cannot be reached. Nobody is told: another one is asked."""


class ReplicaHandle(Protocol):
    """A replica as the front sees it. Whatever waits may raise `ReplicaLostError`."""

    async def open(self) -> EngineFacts:
        """Loads and warms up; `BackendError` with what the replica says if it cannot."""

    def do(self, job: Job) -> AsyncGenerator[Event, None]:
        """Does a job; closing the generator takes the job back."""

    async def status(self) -> Status:
        """See there."""

    async def close(self, timeout_s: float) -> None:
        """Frees what it holds and ends its process, at the latest when the time is over."""
