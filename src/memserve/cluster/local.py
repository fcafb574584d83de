"""A gateway and its instances as processes on this machine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TypeVar

import msgspec

from memserve.api.serving import Shutdown
from memserve.api.status import InstanceState
from memserve.clock import Clock, MonotonicClock
from memserve.cluster.child import Child, end_children
from memserve.cluster.client import ClusterClient, GatewayUnreachable
from memserve.cluster.port import ReservedPort
from memserve.cluster.restarts import RestartLimits, Restarts
from memserve.cluster.supervised import Supervised
from memserve.config import ClusterConfig, InstanceConfig, available_cores
from memserve.errors import ClusterError
from memserve.flags import to_flags
from memserve.models.resolve import Progress
from memserve.pool.segment import sweep

POLL_SECONDS = 0.2  # how often a starting cluster is asked for its state
# A child drains for `drain_seconds`, if it has come to serve requests, and then needs up to
# CLOSE_SECONDS to close connections, end its engine's step and give memory back. One that is
# asked twice does not drain; after KILL_SECONDS more it is not asked any more.
CLOSE_SECONDS = 10.0
KILL_SECONDS = 5.0

_T = TypeVar("_T")


class LocalCluster:
    """Owns the processes from `start` to `stop`; the caller must call `stop`, whatever happens."""

    def __init__(
        self,
        config: ClusterConfig,
        shutdown: Shutdown,
        progress: Progress,
        *,
        limits: RestartLimits | None = None,
        clock: Clock | None = None,
        module: str = "memserve",
    ) -> None:
        """Every process resolves the model again: it should be on this machine by now.

        `shutdown.forced` ends waiting for running requests in `stop`. `limits` are those of
        `supervise`; `module` is what Python runs for each process.
        """
        self.url = ""  # of the gateway, once `start` has returned
        self._config = config
        self._shutdown = shutdown
        self._progress = progress
        self._limits = limits or RestartLimits()
        self._clock = clock or MonotonicClock()
        self._module = module
        self._port: ReservedPort | None = None
        self._gateway: Supervised | None = None
        self._instances: list[Supervised] = []
        self._serving = False

    async def start(self) -> None:
        """Start everything and wait until every instance is ready.

        Raises ClusterError as soon as a process ends, with its last lines.
        """
        self._port = ReservedPort(self._config.gateway.host, self._config.gateway.port)
        for name, arguments in instance_commands(self._config):
            one = self._supervised(name, [*arguments, "--join", self._port.url])
            self._instances.append(one)
            await one.start()
        gateway = msgspec.structs.replace(self._config.gateway, port=self._port.number)
        command = ["gateway", *to_flags(self._config.model), *to_flags(gateway)]
        self._gateway = self._supervised("gateway", command)
        await self._gateway.start()
        for one in self._instances:
            await one.child.address()
        count = f"{len(self._instances)} instance{'s' if len(self._instances) > 1 else ''}"
        self._progress(f"loading {self._config.model.path} into {count}")
        self.url = await self._gateway.child.address()
        await self.or_failure(self._all_ready())
        self._serving = True

    def pids(self) -> dict[str, int]:
        """Of the processes that run now, by name."""
        return {one.name: one.child.pid for one in self._all() if one.started}

    async def watch(self) -> None:
        """Runs until a process ends, and raises ClusterError then."""
        children = self._children()
        await asyncio.wait([c.ended for c in children], return_when=asyncio.FIRST_COMPLETED)
        dead = next(child for child in children if child.ended.done())
        raise await dead.failure()

    async def supervise(self) -> None:
        """Start again what crashes, as long as that leaves anything useful.

        Raises ClusterError when the gateway is lost for good, or the last instance.
        """
        assert self._gateway is not None
        keeping = {asyncio.ensure_future(one.keep()): one for one in self._all()}
        lost: ClusterError | None = None
        try:
            while True:
                await asyncio.wait(keeping, return_when=asyncio.FIRST_COMPLETED)
                for task in [task for task in keeping if task.done()]:
                    one = keeping.pop(task)
                    failure = task.exception()
                    if failure is None and one is self._gateway:
                        failure = ClusterError("the gateway has ended, as it was asked to")
                    if isinstance(failure, ClusterError) and one is not self._gateway:
                        lost = failure
                        self._progress(str(failure))
                    elif failure is not None:
                        raise failure
                if set(keeping.values()) == {self._gateway}:
                    raise lost or ClusterError("every instance has ended, as it was asked to")
        finally:
            for task in keeping:
                task.cancel()
            await asyncio.gather(*keeping, return_exceptions=True)

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
        for one in self._all():
            one.show_output(show)

    async def stop(self) -> None:
        """End the gateway, which lets running requests finish, then the instances."""
        patience = CLOSE_SECONDS + (self._config.gateway.drain_seconds if self._serving else 0)
        gateway = [self._gateway] if self._gateway is not None else []
        for group in (gateway, self._instances):
            children = [one.child for one in group if one.started]
            await end_children(children, self._shutdown, patience, KILL_SECONDS)
        if self._port is not None:
            self._port.close()
        sweep()  # an instance that was killed has left its shared memory behind

    def _supervised(self, name: str, arguments: Sequence[str]) -> Supervised:
        restarts = Restarts(self._limits, self._clock)
        return Supervised(name, arguments, restarts, self._progress, self._module)

    def _all(self) -> list[Supervised]:
        return [*([self._gateway] if self._gateway else []), *self._instances]

    def _children(self) -> list[Child]:
        return [one.child for one in self._all()]

    async def _all_ready(self) -> None:
        ready: set[str] = set()
        async with ClusterClient(self.url) as client:
            while len(ready) < len(self._instances):
                try:
                    members = (await client.view()).instances
                except GatewayUnreachable:  # one that has ended is noticed by `watch`
                    members = ()
                for member in members:
                    if member.state is InstanceState.READY and member.id not in ready:
                        ready.add(member.id)
                        self._progress(f"{member.id} is ready")
                await asyncio.sleep(POLL_SECONDS)


async def run_local_cluster(
    config: ClusterConfig,
    progress: Progress,
    ready: Callable[[LocalCluster], None],
) -> None:
    """Run a cluster until SIGINT or SIGTERM; a second one does not wait for requests.

    `ready` is called when it serves. Raises ClusterError when a process fails before that, or
    so often afterwards that nothing useful is left.
    """
    shutdown = Shutdown()
    shutdown.on_signals()
    cluster = LocalCluster(config, shutdown, progress)

    async def serve() -> None:
        await cluster.start()
        ready(cluster)
        await cluster.supervise()

    try:
        await shutdown.run_until_requested(serve())
        progress("stopping; Ctrl-C again to stop without waiting for requests")
    finally:
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
