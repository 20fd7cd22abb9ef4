"""`RayEngine`: many replicas that look like one engine.

Every job is sent by the digest of its references, so that a set's keys and values are made and kept
on one replica. This process sends all jobs, so it needs no router beside itself: names of replicas
are hashed (`routing.ranked`), and a replica that replaces a lost one has its name, hence its sets.
Nothing here knows of Ray; cluster.py does.
"""

import asyncio
import contextlib
import logging
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Self

from klein_kv.errors import BackendError, KleinKVError
from klein_kv.runtime.serving.errors import ServiceError
from klein_kv.runtime.serving.jobs import (
    EditJob,
    EditResult,
    EncodeJob,
    EncodeResult,
    EngineFacts,
    OnPreview,
)
from klein_kv.runtime.serving.replicas.events import (
    Job,
    Preview,
    Refusal,
    ReplicaHandle,
    ReplicaLostError,
    Result,
    Taken,
)
from klein_kv.runtime.serving.replicas.routing import ranked

__all__ = ["RayEngine"]

_log = logging.getLogger(__name__)

_ASK_EVERY_S = 1.0
_ANSWER_WITHIN_S = 30.0
_LONGEST_PAUSE_S = 60.0
_CLOSE_WITHIN_S = 10.0
_TRY_AGAIN_S = 0.05
_CROWD = 4
"""A set's replica with so many jobs is passed over for one with fewer: keys and values made once
more cost less than a job, waiting costs several."""


@dataclass(slots=True)
class _Place:
    """A name, and the replica that has it now."""

    name: str
    handle: ReplicaHandle | None = None
    up: bool = False
    jobs: int = 0
    lost: int = 0
    gauges: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class _Run:
    """A job on its way from replica to replica.

    Attributes:
        ends: when its result is of no use any more, in the event loop's time.
        shown: previews that were handed on.
        taken: replicas that had it when they were lost, and the one that has it now.
    """

    job: Job
    on_preview: OnPreview | None
    ends: float
    shown: int = 0
    taken: int = 0


class RayEngine:
    """See the module and `jobs.Engine`. Made by `open`, on the event loop that it is used on."""

    def __init__(self, make_replica: Callable[[str], ReplicaHandle], count: int) -> None:
        self._make_replica = make_replica
        self._places = {name: _Place(name) for name in (f"replica-{i}" for i in range(count))}
        self._facts: EngineFacts | None = None
        self._keepers: list[asyncio.Task[None]] = []
        self._draining = False

    @classmethod
    async def open(cls, make_replica: Callable[[str], ReplicaHandle], count: int) -> Self:
        """Opens so many replicas at once.

        Args:
            make_replica: starts the process of the replica of this name.
            count: how many.

        Raises:
            BackendError: one that cannot be opened, or holds another model than the others.
        """
        engine = cls(make_replica, count)
        try:
            async with asyncio.TaskGroup() as group:
                for place in engine._places.values():
                    group.create_task(engine._open(place))
        except* (KleinKVError, ReplicaLostError, TimeoutError) as errors:
            await engine.close()
            raise BackendError(f"{errors.exceptions[0]}") from errors
        engine._keepers = [asyncio.create_task(engine._keep(x)) for x in engine._places.values()]
        return engine

    @property
    def ready(self) -> bool:
        """A replica is up, and nobody drains."""
        return not self._draining and any(place.up for place in self._places.values())

    @property
    def facts(self) -> EngineFacts:
        """Of every replica."""
        if self._facts is None:
            raise ServiceError("not_ready", "no replica is open yet", retry_after_s=5)
        return self._facts

    async def edit(self, job: EditJob, on_preview: OnPreview | None = None) -> EditResult:
        """Makes images."""
        result = await self._do(job, on_preview)
        assert isinstance(result, EditResult)  # noqa: S101 - what a replica answers to an EditJob
        return result

    async def encode(self, job: EncodeJob) -> EncodeResult:
        """Makes keys and values, where edits of this set will be sent."""
        result = await self._do(job, None)
        assert isinstance(result, EncodeResult)  # noqa: S101 - likewise
        return result

    def gauges(self) -> dict[str, float]:
        """Sums over the replicas that are up, as of a second ago."""
        total: Counter[str] = Counter()
        for gauges in self.replica_gauges().values():
            total.update(gauges)  # type: ignore[arg-type] # floats add up as well
        return dict(total)

    def replica_gauges(self) -> dict[str, dict[str, float]]:
        """The same of each replica by its name, and whether it is up, and how often it was lost."""
        return {
            name: (place.gauges if place.up else {})
            | {"replica_up": float(place.up), "replicas_lost_total": float(place.lost)}
            for name, place in self._places.items()
        }

    async def drain(self, timeout_s: float) -> None:
        """Takes on nothing more, and returns when all is done or the time is over."""
        self._draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while any(place.jobs for place in self._places.values()):
                    await asyncio.sleep(_TRY_AGAIN_S)

    async def close(self) -> None:
        """Ends all replicas, whatever they do."""
        self._draining = True
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        handles = [x.handle for x in self._places.values() if x.handle is not None]
        await asyncio.gather(*(handle.close(_CLOSE_WITHIN_S) for handle in handles))

    async def _do(self, job: Job, on_preview: OnPreview | None) -> Result:
        if self._draining:
            raise ServiceError("draining", "the service is shutting down", retry_after_s=5)
        clock = asyncio.get_running_loop().time
        run = _Run(
            job, on_preview, clock() + (math.inf if job.timeout_s is None else job.timeout_s)
        )
        while True:
            refusal = ServiceError("not_ready", "no replica is up at present", retry_after_s=5)
            for place in self._order(job):
                if job.timeout_s is not None:
                    run.job = replace(job, timeout_s=max(0.0, run.ends - clock()))
                try:
                    return await self._at(place, run)
                except ReplicaLostError as error:
                    place.up = False
                    _log.warning("%s was lost with a job: %s", place.name, error)
                    if run.taken > 1:  # the job itself may be what kills them
                        raise ServiceError("internal_error", "the job failed twice") from error
                except ServiceError as error:
                    if error.code != "queue_full":
                        raise
                    refusal = error
            if not run.taken:
                raise refusal
            if clock() > run.ends:
                raise ServiceError("deadline", "the result did not come in time")
            await asyncio.sleep(_TRY_AGAIN_S)  # it was taken on: it waits for a place

    def _order(self, job: Job) -> list[_Place]:
        """Replicas to be asked, one after the other."""
        up = [name for name, place in self._places.items() if place.up]
        key = job.digest or (str(job.loras) if job.loras else "")
        if not key:
            return sorted((self._places[name] for name in up), key=lambda place: place.jobs)
        places = [self._places[name] for name in ranked(key, up)]
        return sorted(places, key=lambda place: place.jobs >= _CROWD)

    async def _at(self, place: _Place, run: _Run) -> Result:
        if place.handle is None:
            raise ReplicaLostError("it is being replaced")
        place.jobs += 1
        previews = 0
        try:
            async with contextlib.aclosing(place.handle.do(run.job)) as events:
                async for event in events:
                    if isinstance(event, Taken):
                        run.taken += 1
                    elif isinstance(event, Preview):
                        previews += 1
                        if run.on_preview is not None and previews > run.shown:
                            run.shown = previews
                            run.on_preview(event.step, event.pixels)
                    elif isinstance(event, Refusal):
                        run.taken -= event.code == "queue_full"
                        raise event.error()
                    else:
                        return event
            raise ReplicaLostError("it ended without a result")
        finally:
            place.jobs -= 1

    async def _open(self, place: _Place) -> None:
        place.handle = self._make_replica(place.name)
        facts = await place.handle.open()
        if self._facts is None:
            self._facts = facts
        elif facts != self._facts:
            raise BackendError(
                f"{place.name} has {facts}, the others have {self._facts}; expected the same "
                "artifacts on every machine"
            )
        await self._ask(place)

    async def _ask(self, place: _Place) -> None:
        if place.handle is None:
            await self._open(place)
            return
        async with asyncio.timeout(_ANSWER_WITHIN_S):
            status = await place.handle.status()
        place.up, place.gauges = status.ready, status.gauges

    async def _keep(self, place: _Place) -> None:
        """Asks a replica again and again how it is, and replaces it when it is lost."""
        pause = _ASK_EVERY_S
        while True:
            await asyncio.sleep(pause)
            try:
                await self._ask(place)
                pause = _ASK_EVERY_S
            except (ReplicaLostError, TimeoutError, KleinKVError) as error:
                _log.warning("%s is lost and will be replaced: %s", place.name, error)
                place.up = False
                place.lost += 1
                if place.handle is not None:
                    await place.handle.close(0)
                    place.handle = None
                pause = min(2 * pause, _LONGEST_PAUSE_S)
