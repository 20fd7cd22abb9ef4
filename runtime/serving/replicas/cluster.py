"""Replicas as actors of Ray: the only module that imports it.

Why actors, and not Ray Serve, which is made of them: Serve's consistent hashing (alpha in 2.60)
hashes a replica's random id, so the one that replaces it gets other sets; with a deployment per
replica, calls to one that is being replaced wait in its router (measured: 8 to 10 s) where the next
replica should be asked; its replicas listen on all interfaces, and stay on the GPUs when the front
is killed. Actors end with the process that made them.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import tempfile
from collections.abc import AsyncGenerator, Callable
from typing import Any

from klein_kv.errors import BackendError, RequestError
from klein_kv.runtime.serving.jobs import EngineFacts, Job
from klein_kv.runtime.serving.replicas.engine import RayEngine
from klein_kv.runtime.serving.replicas.events import Event, ReplicaLostError
from klein_kv.runtime.serving.replicas.replica import Replica
from klein_kv.runtime.serving.runner import PipelineRunner

__all__ = ["RayCluster"]

_log = logging.getLogger(__name__)

_LOCAL = "local"


class RayCluster:
    """A connection to Ray, which starts replicas.

    Args:
        address: "local" starts Ray on this machine, on loopback and with a secret of its own; or
            HOST:PORT of a cluster that this machine is part of.
        open_runner: see `Replica`.
        queue: jobs that may wait at each replica.
        count: replicas; None for one per GPU.
        device: "cpu" has replicas share the CPUs; otherwise each has a GPU of its own, which is
            "cuda" there.

    Attributes:
        count: of replicas.

    Raises:
        BackendError: Ray is not installed, cannot be reached, refuses the token, or has too few
            GPUs.
        RequestError: an address of another form.
    """

    def __init__(
        self,
        address: str,
        open_runner: Callable[[], PipelineRunner],
        queue: int,
        count: int | None = None,
        device: str | None = None,
    ) -> None:
        if device not in (None, "cpu", "cuda"):
            raise RequestError(f"device is {device!r}, which Ray chooses; expected 'cuda' or 'cpu'")
        if "://" in address:
            raise RequestError(
                f"the address of Ray is {address!r}, expected 'local', or HOST:PORT of a cluster "
                "that this machine is part of (`ray start --address=HOST:PORT`)"
            )
        local = address == _LOCAL
        _secure(local)
        try:
            import ray
        except ImportError as error:
            raise BackendError(
                f"Ray is not installed here ({error}); pip install 'klein-kv[serve,ray]'"
            ) from error
        self._ray: Any = ray
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        options: dict[str, Any] = {}
        if local:  # Ray opens its folder to every user of the machine: it lies in a closed one
            self._folder = tempfile.TemporaryDirectory(
                prefix="klein-kv-", ignore_cleanup_errors=True
            )
            options = {"include_dashboard": False, "_temp_dir": f"{self._folder.name}/ray"}
        try:
            ray.init(address, logging_level=logging.WARNING, **options)
        except (ray.exceptions.RayError, OSError, RuntimeError, ValueError) as error:
            self.close()
            raise BackendError(f"Ray at {address} cannot be used: {error}") from error
        kind = "CPU" if device == "cpu" else "GPU"
        there = self._ray.cluster_resources().get(kind, 0)
        self.count = int(there) if count is None else count
        if self.count < 1 or (kind == "GPU" and self.count > there):
            self.close()
            raise BackendError(
                f"{self.count} replicas do not fit where Ray at {address} has {there:g} "
                f"{kind}s; expected a GPU for each, or --device cpu and a number of --replicas"
            )
        share: dict[str, Any] = {"num_gpus": 1.0}
        if kind == "CPU":
            share = {"num_cpus": min(1.0, there / self.count / 2)}  # machines are not filled evenly
        self._actors = ray.remote(**share, max_restarts=0, max_task_retries=0)(Replica)
        self._arguments = open_runner, queue

    def open_engine(self, on_failed: Callable[[BaseException], None]) -> RayEngine:
        """Replicas as one engine, on the running event loop."""
        return RayEngine(self._start, self.count, on_failed)

    def _start(self, name: str) -> "RayReplica":
        del name  # Ray's own names stay taken for a while after a loss
        return RayReplica(self._ray, self._actors.remote(*self._arguments))

    def close(self) -> None:
        """Ends all replicas, and Ray where it was started here."""
        self._ray.shutdown()
        if self._folder is not None:
            self._folder.cleanup()


class RayReplica:
    """Implements `ReplicaHandle` by an actor."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray = ray
        self._actor = actor

    async def open(self) -> EngineFacts:
        """See `ReplicaHandle`."""
        answer = await self._ask(self._actor.open.remote())
        if isinstance(answer, EngineFacts):
            return answer
        raise BackendError(f"a replica cannot be opened: {answer}")

    async def do(self, job: Job) -> AsyncGenerator[Event, None]:
        """See `ReplicaHandle`."""
        answers = self._actor.do.remote(job)
        try:
            async for answer in answers:
                yield await answer
        except self._ray.exceptions.RayError as error:
            raise ReplicaLostError(_first_line(error)) from error
        finally:
            self._ray.cancel(answers)  # nothing happens where it is done

    async def status(self) -> tuple[bool, dict[str, float]]:
        """See `ReplicaHandle`."""
        ready, gauges = await self._ask(self._actor.status.remote())
        return ready, gauges

    async def close(self, timeout_s: float) -> None:
        """See `ReplicaHandle`."""
        if timeout_s > 0:
            with contextlib.suppress(ReplicaLostError, TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._ask(self._actor.close.remote(timeout_s))
        self._ray.kill(self._actor)

    async def _ask(self, answer: Any) -> Any:
        try:
            return await answer
        except self._ray.exceptions.RayError as error:
            raise ReplicaLostError(_first_line(error)) from error


def _secure(local: bool) -> None:
    """Ray takes these from the environment alone, and hands them on to its processes."""
    environ = os.environ  # noqa: TID251 - there is no other way to tell it
    if local:
        # Whatever its name says, this has all of Ray's processes listen on loopback (ray 2.60,
        # `services.get_node_ip_address`); otherwise they listen on all interfaces.
        environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        environ["RAY_AUTH_MODE"] = "token"
    else:
        environ.setdefault("RAY_AUTH_MODE", "token")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
