"""Jobs that wait for a GPU: those with the same references and adapters come together.

A set of references that was just used is on the device, and changing adapters writes weights. So a
job that goes with the last one may overtake others, but nobody is overtaken more than a few times.
"""

import asyncio
import math
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from klein_kv.runtime.serving.jobs import EditJob, EncodeJob, OnPreview

__all__ = ["JobQueue", "Ticket"]

MOST_OVERTAKEN = 8
"""Jobs that may be taken before the one that has waited longest."""


@dataclass(slots=True, eq=False)
class Ticket:
    """A job, and who waits for it.

    Attributes:
        result: set on its own event loop, `loop`.
        deadline: `time.monotonic()` when the result is of no use any more.
        gone: nobody waits for it.
        overtaken: jobs that came later and were taken before it.
    """

    job: EditJob | EncodeJob
    result: "asyncio.Future[Any]"
    loop: asyncio.AbstractEventLoop
    on_preview: OnPreview | None = None
    queued_at: float = field(default_factory=time.monotonic)
    gone: bool = False
    overtaken: int = 0

    @property
    def deadline(self) -> float:
        """See above."""
        timeout = self.job.timeout_s
        return math.inf if timeout is None else self.queued_at + timeout

    @property
    def wanted(self) -> bool:
        """Whether its result is still of use."""
        return not self.gone and time.monotonic() < self.deadline


class JobQueue:
    """At most `most` tickets, in the order in which a GPU takes them; the caller locks."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._waiting: deque[Ticket] = deque()
        self._last: tuple[Any, str] = ((), "")

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def full(self) -> bool:
        """Whether there is no room for another one."""
        return len(self._waiting) >= self.most

    def put(self, ticket: Ticket) -> None:
        """Takes one in."""
        self._waiting.append(ticket)

    def remove(self, ticket: Ticket) -> None:
        """Takes one out, where it still is."""
        if ticket in self._waiting:
            self._waiting.remove(ticket)

    def take(self) -> Ticket:
        """The next one: the oldest, or one that goes with the last."""
        oldest = self._waiting[0]
        chosen = oldest
        if oldest.overtaken < MOST_OVERTAKEN:
            chosen = max(self._waiting, key=self._likeness)  # the first of the likest
        if chosen is not oldest:
            oldest.overtaken += 1
        self._waiting.remove(chosen)
        self._last = chosen.job.loras, chosen.job.digest
        return chosen

    def empty(self) -> list[Ticket]:
        """Takes out all."""
        waiting, self._waiting = list(self._waiting), deque()
        return waiting

    def _likeness(self, ticket: Ticket) -> int:
        """2: the same adapters and references as the last job, 1: the same adapters."""
        loras, digest = self._last
        if ticket.job.loras != loras:
            return 0
        return 2 if ticket.job.digest == digest else 1
