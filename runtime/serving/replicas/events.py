"""What passes between the front and a replica: plain data.

Refusals are data too: an exception that a replica raises would come back wrapped.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from klein_kv.runtime.serving.errors import ServiceError
from klein_kv.runtime.serving.jobs import EngineFacts, Job, Result

__all__ = ["Event", "ReplicaHandle", "ReplicaLostError", "Taken"]


@dataclass(frozen=True, slots=True)
class Taken:
    """The replica has the job: if it is lost from now on, perhaps because of the job."""


Event = Taken | Image.Image | ServiceError | Result
"""Of a job: `Taken`, previews, and then a refusal or a result."""


class ReplicaLostError(Exception):
    """The replica's process is gone, or cannot be reached. Nobody is told: another one is asked."""


class ReplicaHandle(Protocol):
    """A replica as the front sees it. Whatever waits may raise `ReplicaLostError`."""

    async def open(self) -> EngineFacts:
        """Loads and warms up; `BackendError` with what the replica says if it cannot."""

    def do(self, job: Job) -> AsyncGenerator[Event, None]:
        """Does a job; closing the generator takes the job back."""

    async def status(self) -> tuple[bool, dict[str, float]]:
        """`Engine.ready` and `Engine.gauges`."""

    async def close(self, timeout_s: float) -> None:
        """Frees what it holds and ends its process, at the latest when the time is over."""
