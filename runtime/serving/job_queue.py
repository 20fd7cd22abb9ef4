"""Jobs that wait for a GPU: those with the same references and adapters come together.

A set of references that was just used is on the device, and changing adapters writes weights. So a
job that goes with the last one may overtake others, but nobody is overtaken more than a few times.
"""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from klein_kv.runtime.serving.jobs import Job, OnPreview

__all__ = ["JobQueue", "Ticket"]

MOST_OVERTAKEN = 8
"""Jobs that may be taken before the one that has waited longest."""


@dataclass(slots=True, eq=False)
class Ticket:
    """A job, and who waits for it.

    Attributes:
        result: set on its own event loop.
        gone: nobody waits for it.
        overtaken: jobs that came later and were taken before it.
    """

    job: Job
    result: "asyncio.Future[Any]"
    on_preview: OnPreview | None = None
    queued_at: float = field(default_factory=time.monotonic)
    gone: bool = False
    overtaken: int = 0

    @property
    def wanted(self) -> bool:
        """Whether its result is still of use."""
        timeout_s = self.job.timeout_s
        late = timeout_s is not None and time.monotonic() >= self.queued_at + timeout_s
        return not (self.gone or late)


class JobQueue(list[Ticket]):
    """Tickets as they came, taken in the order that suits a GPU; the caller locks."""

    def __init__(self) -> None:
        super().__init__()
        self._last: tuple[Any, str] = ((), "")

    def take(self) -> Ticket:
        """The next one: the oldest, or one that goes with the last."""
        oldest = chosen = self[0]
        if oldest.overtaken < MOST_OVERTAKEN:
            chosen = max(self, key=self._likeness)  # the first of the likest
        if chosen is not oldest:
            oldest.overtaken += 1
        self.remove(chosen)
        self._last = chosen.job.loras, chosen.job.digest
        return chosen

    def _likeness(self, ticket: Ticket) -> int:
        """2: the same adapters and references as the last job, 1: the same adapters."""
        loras, digest = self._last
        if ticket.job.loras != loras:
            return 0
        return 2 if ticket.job.digest == digest else 1
