"""`RayEngine`: many replicas that look like one engine.

Every job is sent by the digest of its references, so that a set's keys and values are made and kept
on one replica. This process sends all jobs, so it needs no router beside itself: names of replicas
are hashed (`rank`), and a replica that replaces a lost one has its name, hence its sets.
Nothing here knows of Ray; cluster.py does.
"""

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from PIL import Image

from klein_kv.errors import BackendError, KleinKVError
from klein_kv.runtime.serving.errors import ServiceError, draining, expired, not_ready
from klein_kv.runtime.serving.jobs import EngineFacts, Job, OnPreview, Result
from klein_kv.runtime.serving.replicas.events import ReplicaHandle, ReplicaLostError, Taken

__all__ = ["RayEngine", "rank"]

_log = logging.getLogger(__name__)

_ASK_EVERY_S = 1.0
_ANSWER_WITHIN_S = 30.0
_LONGEST_PAUSE_S = 60.0
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
        shown: previews that were handed on.
        taken: replicas that had it when they were lost, and the one that has it now.
    """

    job: Job
    on_preview: OnPreview | None
    shown: int = 0
    taken: int = 0


def rank(key: str, name: str) -> bytes:
    """A replica's rank for a key; the least is asked first, and is the key's home.

    Each key has an order of its own: a name that is missing hands its keys on to all others alike,
    and nothing else moves. Source: Thaler and Ravishankar, "A Name-Based Mapping Scheme for
    Rendezvous" (1996).
    """
    return hashlib.sha256(f"{name}\n{key}".encode()).digest()


class RayEngine:
    """Implements `Engine`. Made on the event loop that it is used on; opens all replicas at once.

    Args:
        make_replica: starts the process of the replica of this name.
        count: replicas.
        on_failed: called with what keeps a replica from being opened for the first time; later
            on it is tried again and again.
    """

    def __init__(
        self,
        make_replica: Callable[[str], ReplicaHandle],
        count: int,
        on_failed: Callable[[BaseException], None],
    ) -> None:
        self._make_replica = make_replica
        self._on_failed = on_failed
        self._places = [_Place(f"replica-{i}") for i in range(count)]
        self.facts: EngineFacts | None = None
        self._opened = self._draining = False
        self._under_way: set[asyncio.Timeout] = set()
        self._loop = asyncio.get_running_loop()
        self._keeping = asyncio.ensure_future(self._work())

    @property
    def ready(self) -> bool:
        """All replicas were up once and one is now, and nobody drains."""
        return self._opened and not self._draining and any(place.up for place in self._places)

    def gauges(self) -> dict[str, float]:
        """Those of every replica that is up, as of a second ago; and which are up or were lost."""
        figures: dict[str, float] = {}
        for place in self._places:
            known = place.gauges if place.up else {}
            known = known | {"replica_up": place.up, "replica_lost_total": place.lost}
            figures |= {f"{gauge}@{place.name}": value for gauge, value in known.items()}
        return figures

    async def drain(self, timeout_s: float) -> None:
        """See `Engine`; what is not done by then is answered with "draining"."""
        self._draining = True
        end = self._loop.time() + timeout_s
        while self._under_way and self._loop.time() < end:
            await asyncio.sleep(_TRY_AGAIN_S)
        for limit in self._under_way:
            limit.reschedule(0)
        await asyncio.sleep(0)  # those who wait are told

    def close(self, timeout_s: float = 10.0) -> None:
        """Ends all replicas. Called in another thread than the event loop's."""
        asyncio.run_coroutine_threadsafe(self._close(timeout_s), self._loop).result()

    async def _close(self, timeout_s: float) -> None:
        self._draining = True
        self._keeping.cancel()
        await asyncio.gather(self._keeping, return_exceptions=True)
        handles = [place.handle for place in self._places if place.handle is not None]
        await asyncio.gather(*(handle.close(timeout_s) for handle in handles))

    # Jobs -----------------------------------------------------------------------------------------

    async def do(self, job: Job, on_preview: OnPreview | None = None) -> Result:
        """See `Engine`. All jobs with the same references are sent to the same replica."""
        if self._draining:
            raise draining()
        if not self.ready:
            raise not_ready()
        ends = None if job.timeout_s is None else self._loop.time() + job.timeout_s
        try:
            async with asyncio.timeout_at(ends) as limit:
                self._under_way.add(limit)
                try:
                    return await self._somewhere(_Run(job, on_preview))
                finally:
                    self._under_way.remove(limit)
        except TimeoutError:
            if self._draining:
                raise draining() from None
            raise expired() from None

    async def _somewhere(self, run: _Run) -> Result:
        while True:
            refusal: ServiceError | None = None
            for place in self._order(run.job):
                try:
                    return await self._at(place, run)
                except ReplicaLostError as error:
                    place.up = False
                    _log.warning("%s was lost with a job: %s", place.name, error)
                    if run.taken > 1:  # the job itself may be what kills them
                        raise ServiceError("internal_error", "the request failed twice") from error
                except ServiceError as error:
                    if error.code != "queue_full":
                        raise
                    refusal = refusal or error  # its home's
            if not run.taken:
                raise refusal or not_ready()
            await asyncio.sleep(_TRY_AGAIN_S)  # it was taken on once: it waits for a place

    def _order(self, job: Job) -> list[_Place]:
        """Replicas to be asked, one after the other."""
        up = [place for place in self._places if place.up]
        key = job.digest or (str(job.loras) if job.loras else "")
        if not key:
            return sorted(up, key=lambda place: place.jobs)
        return sorted(up, key=lambda place: (place.jobs >= _CROWD, rank(key, place.name)))

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
                    elif isinstance(event, Image.Image):
                        previews += 1
                        if run.on_preview is not None and previews > run.shown:
                            run.shown = previews
                            run.on_preview(event)
                    elif isinstance(event, ServiceError):
                        run.taken -= event.code == "queue_full"
                        if event.code in ("not_ready", "draining"):
                            raise ReplicaLostError(event.message)  # as good as lost: it ends
                        raise event
                    else:
                        return event
            raise ReplicaLostError("it ended without a result")
        finally:
            place.jobs -= 1

    # Replicas -------------------------------------------------------------------------------------

    async def _work(self) -> None:
        try:
            await asyncio.gather(*map(self._open, self._places))
            self._opened = True
            await asyncio.gather(*map(self._keep, self._places))
        except Exception as error:  # noqa: BLE001 - of every kind: it is told
            known = isinstance(error, KleinKVError)
            self._on_failed(error if known else BackendError(f"a replica is lost: {error}"))

    async def _open(self, place: _Place) -> None:
        place.handle = self._make_replica(place.name)
        facts = await place.handle.open()
        self.facts = self.facts or facts
        if facts != self.facts:
            raise BackendError(
                f"{place.name} has {facts}, another one has {self.facts}; expected the same "
                "artifacts on every machine"
            )
        await self._ask(place, place.handle)

    async def _ask(self, place: _Place, handle: ReplicaHandle) -> None:
        async with asyncio.timeout(_ANSWER_WITHIN_S):
            place.up, place.gauges = await handle.status()

    async def _keep(self, place: _Place) -> None:
        """Asks a replica again and again how it is, and replaces it when it is lost."""
        pause = _ASK_EVERY_S
        while True:
            await asyncio.sleep(pause)
            try:
                if place.handle is None:
                    await self._open(place)
                    _log.warning("%s is replaced", place.name)
                else:
                    await self._ask(place, place.handle)
                pause = _ASK_EVERY_S
            except (ReplicaLostError, TimeoutError, KleinKVError) as error:
                why = str(error) or "it does not answer"
                _log.warning("%s is lost and will be replaced: %s", place.name, why)
                place.up = False
                place.lost += 1
                if place.handle is not None:
                    await place.handle.close(0)
                    place.handle = None
                pause = min(2 * pause, _LONGEST_PAUSE_S)
