"""One pipeline behind a queue: the engine of a service in one process.

One thread opens the pipeline and runs one job after the other. Nothing but graphs runs there:
images are prepared before, and made into files after it, in other threads.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from klein_kv.runtime.serving.errors import ServiceError, draining, expired, not_ready
from klein_kv.runtime.serving.job_queue import JobQueue, Ticket
from klein_kv.runtime.serving.jobs import (
    EditJob,
    EditResult,
    EngineFacts,
    Job,
    OnPreview,
    Result,
)
from klein_kv.runtime.serving.runner import (
    DeviceLostError,
    PipelineRunner,
    StoppedError,
    is_out_of_memory,
    refusal,
)

__all__ = ["EngineRoom"]

_log = logging.getLogger(__name__)

_MOST_FAILURES = 3
"""Unforeseen errors in a row after which the device is examined thoroughly."""

_SMOOTHING = 0.2
"""Weight of the newest job in the average time of one."""


class EngineRoom:
    """Implements `Engine`.

    Args:
        open_runner: opens and warms up; called on the room's thread.
        queue: jobs that may wait.
        on_failed: called on the room's thread with what ended it: the runner could not be opened,
            or its device does not answer any more.
    """

    def __init__(
        self,
        open_runner: Callable[[], PipelineRunner],
        queue: int,
        on_failed: Callable[[BaseException], None],
    ) -> None:
        self._open = open_runner
        self._on_failed = on_failed
        self._queue = JobQueue()
        self._most = queue
        self._changed = threading.Condition()
        self._state = "starting"  # then "ready", "draining", "failed" or "closed"
        self._running: Ticket | None = None
        self.facts: EngineFacts | None = None
        self._store_gauges: dict[str, float] = {}
        self._counts = dict.fromkeys(("jobs", "cancelled", "expired", "out_of_memory", "failed"), 0)
        self._seconds = 0.0  # of a job, on average
        self._failures = 0  # in a row
        self._after = ThreadPoolExecutor(1, "klein-kv-after")  # one: previews come before results
        self._thread = threading.Thread(target=self._work, name="klein-kv-gpu", daemon=True)
        self._thread.start()

    # What the event loop calls ------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Warmed up, and not draining."""
        return self._state == "ready"

    async def do(self, job: Job, on_preview: OnPreview | None = None) -> Result:
        """See `Engine`."""
        ticket = Ticket(job, asyncio.get_running_loop().create_future(), on_preview)
        with self._changed:
            self._check()
            self._queue.append(ticket)
            self._changed.notify()
        try:
            async with asyncio.timeout(job.timeout_s):
                result: Result = await ticket.result
                return result
        except TimeoutError:
            self._counts["expired"] += 1
            raise expired() from None
        except asyncio.CancelledError:
            self._counts["cancelled"] += 1
            raise
        finally:
            ticket.gone = True
            with self._changed:
                if ticket in self._queue:
                    self._queue.remove(ticket)

    def gauges(self) -> dict[str, float]:
        """See `Engine`."""
        return {
            "queue_depth": len(self._queue),
            "in_flight": float(self._running is not None),
            "job_seconds_average": self._seconds,
            **{f"{name}_total": count for name, count in self._counts.items()},
            **self._store_gauges,
        }

    async def drain(self, timeout_s: float) -> None:
        """See `Engine`; what is not done by then is answered with "draining"."""
        with self._changed:
            if self._state in ("starting", "ready"):
                self._state = "draining"
        end = time.monotonic() + timeout_s
        while (self._running or self._queue) and time.monotonic() < end:
            await asyncio.sleep(0.02)
        self._give_up(draining())
        await asyncio.sleep(0)  # those who wait are told

    def close(self, timeout_s: float = 10.0) -> None:
        """Ends the thread, after the job under way, and frees the pipeline."""
        with self._changed:
            if self._state != "failed":
                self._state = "closed"
            self._changed.notify()
        self._give_up(draining())
        self._thread.join(timeout_s)
        self._after.shutdown(wait=False)

    def _check(self) -> None:
        """Refuses what cannot be taken on now."""
        if self._state == "draining":
            raise draining()
        if self._state != "ready":
            raise not_ready()
        waiting = len(self._queue)
        if waiting >= self._most:
            raise ServiceError(
                "queue_full",
                f"{waiting} requests are waiting, expected less; come again later",
                retry_after_s=max(0.1, (waiting + 1) * self._seconds),
            )

    # What the thread does -----------------------------------------------------------------------

    def _work(self) -> None:
        try:
            runner = self._open()
            self.facts = runner.facts
            self._store_gauges = runner.gauges()
            with self._changed:
                if self._state == "starting":
                    self._state = "ready"
            _log.info("ready")
            while (ticket := self._next()) is not None:
                self._serve(runner, ticket)
                self._store_gauges = runner.gauges()
                del ticket  # its images
        except BaseException as error:  # noqa: BLE001 - of every kind: it is told
            with self._changed:
                self._state = "failed"
                self._running = None
            self._give_up(not_ready())
            self._on_failed(error)
        else:
            runner.close()

    def _next(self) -> Ticket | None:
        with self._changed:
            self._running = None
            while not self._queue:
                if self._state in ("closed", "failed"):
                    return None
                self._changed.wait()
            self._running = self._queue.take()
            return self._running

    def _serve(self, runner: PipelineRunner, ticket: Ticket) -> None:
        """Does one job; raises `DeviceLostError` where nothing works any more."""
        start = time.monotonic()
        for last_try in (False, True):
            if not ticket.wanted:
                return
            try:
                made = self._run(runner, ticket)
                break
            except StoppedError:
                return
            except Exception as error:  # noqa: BLE001 - told in words of ours
                if last_try or not is_out_of_memory(error):
                    self._explain(runner, ticket, error)
                    return
            # The error is gone here, and with it the buffers that its frames held.
            _log.warning("out of memory: kept references are given up, and the job runs again")
            self._counts["out_of_memory"] += 1
            runner.free()
        seconds = time.monotonic() - start
        self._failures = 0
        self._counts["jobs"] += 1
        self._seconds += (seconds - self._seconds) * (_SMOOTHING if self._seconds else 1.0)
        if isinstance(made, EditResult):
            made = replace(made, queued_s=start - ticket.queued_at)
        self._after.submit(self._answer, ticket, made)

    def _explain(self, runner: PipelineRunner, ticket: Ticket, error: Exception) -> None:
        """Tells who waits; asks the device whether it still works, if nobody foresaw the error."""
        known = refusal(error)
        if known is not None:
            _log.info("a job was refused: %s", error)
            self._answer(ticket, known)
            return
        _log.error("a job failed", exc_info=error)
        self._answer(ticket, ServiceError("internal_error", "the request failed"))
        self._counts["failed"] += 1
        self._failures += 1
        if not runner.works(thoroughly=self._failures >= _MOST_FAILURES):
            raise DeviceLostError(
                f"the device is lost ({type(error).__name__}: {error})"
            ) from error

    def _run(self, runner: PipelineRunner, ticket: Ticket) -> Result:
        job = ticket.job
        if not isinstance(job, EditJob):
            return runner.encode(job)

        def on_denoised(latents: Any) -> None:
            self._after.submit(self._show, runner, ticket, latents)

        return runner.edit(job, lambda: ticket.wanted, on_denoised)

    def _show(self, runner: PipelineRunner, ticket: Ticket, latents: Any) -> None:
        picture = runner.preview(latents) if ticket.wanted else None
        if picture is not None and ticket.on_preview is not None:
            self._on_loop(ticket, ticket.on_preview, picture)

    def _give_up(self, why: ServiceError) -> None:
        with self._changed:
            waiting = [*self._queue]
            self._queue.clear()
            if self._running is not None:
                waiting.append(self._running)
        for ticket in waiting:
            self._answer(ticket, why)
            ticket.gone = True

    def _answer(self, ticket: Ticket, answer: object) -> None:
        def tell() -> None:
            if ticket.result.done():
                return
            if isinstance(answer, Exception):
                ticket.result.set_exception(answer)
            else:
                ticket.result.set_result(answer)

        self._on_loop(ticket, tell)

    def _on_loop(self, ticket: Ticket, call: Callable[..., None], *arguments: Any) -> None:
        try:
            ticket.result.get_loop().call_soon_threadsafe(call, *arguments)
        except RuntimeError:  # the loop is closed: nobody waits
            _log.debug("an answer came after its loop had ended")
