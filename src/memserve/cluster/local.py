"""A gateway and its instances as processes on this machine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TypeVar

import aiohttp
import msgspec

from memserve.api.serving import Shutdown
from memserve.api.status import InstanceState
from memserve.cluster.child import Child
from memserve.config import ClusterConfig, InstanceConfig, available_cores
from memserve.errors import ClusterError
from memserve.flags import to_flags
from memserve.models.resolve import Progress
from memserve.pool.segment import sweep

# How often a starting cluster is asked for its state, and how long one question may take.
POLL_SECONDS = 0.2
POLL_TIMEOUT = 5.0
# A child drains for `drain_seconds`, if it has come to serve requests, and then needs up to
# CLOSE_SECONDS to close connections, end its engine's step and give memory back. One that is
# asked twice does not drain; after KILL_SECONDS more it is not asked any more.
CLOSE_SECONDS = 10.0
KILL_SECONDS = 5.0

_T = TypeVar("_T")


class _Member(msgspec.Struct, frozen=True):
    id: str
    state: InstanceState


class _Cluster(msgspec.Struct, frozen=True):
    """What we use of a gateway's `GET /cluster`."""

    instances: tuple[_Member, ...]


class LocalCluster:
    """Owns the processes from `start` to `stop`; the caller must call `stop`, whatever happens."""

    def __init__(
        self,
        config: ClusterConfig,
        shutdown: Shutdown,
        progress: Progress,
    ) -> None:
        """Every process resolves the model again: it should be on this machine by now.

        `shutdown.forced` ends waiting for running requests in `stop`.
        """
        self.url = ""  # of the gateway, once `start` has returned
        self._config = config
        self._shutdown = shutdown
        self._progress = progress
        self._gateway: Child | None = None
        self._instances: list[Child] = []
        self._serving = False

    async def start(self) -> None:
        """Start everything and wait until every instance is ready.

        Raises ClusterError as soon as a process ends, with its last lines.
        """
        for name, arguments in instance_commands(self._config):
            self._instances.append(await Child.spawn(name, arguments))
        addresses = [await child.address() for child in self._instances]
        count = f"{len(addresses)} instance{'s' if len(addresses) > 1 else ''}"
        self._progress(f"loading {self._config.model.path} into {count}")
        self._gateway = await Child.spawn("gateway", self._gateway_command(addresses))
        self.url = await self._gateway.address()
        await self.or_failure(self._all_ready())
        self._serving = True

    async def watch(self) -> None:
        """Runs until a process ends, and raises ClusterError then."""
        children = self._children()
        await asyncio.wait([c.ended for c in children], return_when=asyncio.FIRST_COMPLETED)
        dead = next(child for child in children if child.ended.done())
        raise await dead.failure()

    async def or_failure(self, work: Awaitable[_T]) -> _T:
        """The result of `work`; ClusterError if a process ends before. `work` is cancelled then."""
        watching = asyncio.ensure_future(self.watch())
        working = asyncio.ensure_future(work)
        try:
            await asyncio.wait((watching, working), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                await watching
            return await working
        finally:
            watching.cancel()
            working.cancel()

    def show_output(self, show: Callable[[str], None]) -> None:
        """Hand over what the processes print from now on, line by line."""
        for child in self._children():
            child.show_output(show)

    async def stop(self) -> None:
        """End the gateway, which lets running requests finish, then the instances."""
        patience = CLOSE_SECONDS + (self._config.gateway.drain_seconds if self._serving else 0)
        await self._end([self._gateway] if self._gateway else [], patience)
        await self._end(self._instances, patience)
        sweep()  # an instance that was killed has left its shared memory behind

    async def _end(self, children: Sequence[Child], seconds: float) -> None:
        if not children:
            return

        async def all_ended() -> None:
            await asyncio.wait([child.ended for child in children])

        for child in children:
            child.terminate()
        if await self._shutdown.wait_for(all_ended(), seconds):
            return
        for child in children:
            child.terminate()
        await asyncio.wait([child.ended for child in children], timeout=KILL_SECONDS)
        for child in children:
            child.kill()
        await all_ended()

    def _children(self) -> list[Child]:
        return [*([self._gateway] if self._gateway else []), *self._instances]

    def _gateway_command(self, instances: Sequence[str]) -> list[str]:
        members = [argument for url in instances for argument in ("--instances", url)]
        return ["gateway", *members, *to_flags(self._config.model), *to_flags(self._config.gateway)]

    async def _all_ready(self) -> None:
        ready: set[str] = set()
        timeout = aiohttp.ClientTimeout(total=POLL_TIMEOUT)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while len(ready) < len(self._instances):
                for member in await self._members(session):
                    if member.state is InstanceState.READY and member.id not in ready:
                        ready.add(member.id)
                        self._progress(f"{member.id} is ready")
                await asyncio.sleep(POLL_SECONDS)

    async def _members(self, session: aiohttp.ClientSession) -> tuple[_Member, ...]:
        try:
            async with session.get(f"{self.url}/cluster") as answer:
                if answer.status != 200:
                    raise ClusterError(f"GET /cluster: {answer.status} {await answer.text()}")
                return msgspec.json.decode(await answer.read(), type=_Cluster).instances
        except (aiohttp.ClientError, TimeoutError):
            return ()  # not yet; a gateway that has ended is noticed by `watch`


async def run_local_cluster(
    config: ClusterConfig,
    progress: Progress,
    ready: Callable[[LocalCluster], None],
) -> None:
    """Run a cluster until SIGINT or SIGTERM; a second one does not wait for requests.

    `ready` is called when it serves. Raises ClusterError when a process of it fails.
    """
    shutdown = Shutdown()
    shutdown.on_signals()
    cluster = LocalCluster(config, shutdown, progress)

    async def serve() -> None:
        await cluster.start()
        ready(cluster)
        await cluster.watch()

    serving = asyncio.ensure_future(serve())
    requested = asyncio.ensure_future(shutdown.requested.wait())
    try:
        await asyncio.wait((serving, requested), return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
        progress("stopping; Ctrl-C again to stop without waiting for requests")
    finally:
        serving.cancel()
        requested.cancel()
        await asyncio.wait((serving,))  # or it would start a process behind our back
        await cluster.stop()


def instance_commands(config: ClusterConfig) -> Iterator[tuple[str, list[str]]]:
    """Name and `memserve` arguments of each instance."""
    settings = [table for table in config.instance for _ in range(table.count)]
    for index, table in enumerate(settings):
        name = f"{table.role}-{index}"
        yield (
            name,
            [
                "instance",
                "--id",
                name,
                *to_flags(config.model),
                *to_flags(config.cache),
                *to_flags(_own_settings(table, len(settings))),
                "--drain-seconds",
                str(config.gateway.drain_seconds),
            ],
        )


def _own_settings(table: InstanceConfig, instances: int) -> InstanceConfig:
    """One instance's share: threads of several instances would take turns on the same cores."""
    threads = table.threads
    if threads is None and table.cpus is None:
        threads = max(1, available_cores() // instances)
    return msgspec.structs.replace(table, count=1, threads=threads)
