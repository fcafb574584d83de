"""A gateway and its instances as processes on this machine."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from memserve.api.api_keys import KEYS_VARIABLE, hashed
from memserve.api.serving import Shutdown, on_reload
from memserve.api.status import InstanceState
from memserve.clock import Clock, MonotonicClock
from memserve.cluster.child import Child, end_children
from memserve.cluster.client import ClusterClient
from memserve.cluster.port import ReservedPort
from memserve.cluster.restarts import RestartLimits, Restarts
from memserve.cluster.supervised import Supervised
from memserve.config import ClusterConfig, InstanceConfig, available_cores
from memserve.errors import ClusterError
from memserve.flags import to_flags
from memserve.hosts import is_loopback
from memserve.models.resolve import Progress
from memserve.pool.segment import sweep
from memserve.secrets import SECRET_VARIABLE, cluster_secret, keep_secret, new_secret

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
        given = cluster_secret()
        # Of its own, so that another user of this machine is a stranger to it, and this user's
        # other clusters are, too.
        self._secret = new_secret() if given.local else given
        self._secret_file: Path | None = None
        self._port: ReservedPort | None = None
        self._gateway: Supervised | None = None
        self._instances: list[Supervised] = []
        self._serving = False
        self._ready: set[str] = set()  # instances that have been, once

    async def begin(self) -> None:
        """Start everything and wait until the gateway has an instance to send requests to.

        Raises ClusterError when a process ends before that, with its last lines.
        """
        self._port = ReservedPort(
            self._config.gateway.host,
            self._config.gateway.port,
            tls=self._config.security.tls_cert is not None,
        )
        self._secret_file = keep_secret(self._secret, self._port.number)
        for name, arguments in instance_commands(self._config):
            one = self._supervised(name, [*arguments, "--join", self._port.url])
            self._instances.append(one)
            await one.start()
        gateway = msgspec.structs.replace(self._config.gateway, port=self._port.number)
        command = ["gateway", *to_flags(self._config.model), *to_flags(gateway)]
        command += to_flags(self._config.security)
        keys = {KEYS_VARIABLE: hashed(self._config.gateway.api_keys)}
        self._gateway = self._supervised("gateway", command, self._some_instance_lives, keys)
        await self._gateway.start()
        count = f"{len(self._instances)} instance{'s' if len(self._instances) > 1 else ''}"
        self._progress(f"loading {self._config.model.path} into {count}")
        self.url = await self.or_failure(self._gateway.child.address())
        try:
            await self.or_failure(self._some_ready())
        except ClusterError as failure:
            # Clients may be served since the last look at the gateway: they go first.
            if not await self._look():
                raise
            self._progress(str(failure))
        self._serving = True

    async def start(self) -> None:
        """As `begin`, but wait until every instance is ready: for who wants all or nothing.

        Raises ClusterError as soon as a process ends, with its last lines.
        """
        await self.begin()
        await self.or_failure(self._all_ready())

    async def settled(self) -> list[str]:
        """Returns when every instance is ready, or has crashed meanwhile: the names of those
        that are not ready. To be awaited beside `supervise`, which starts them again."""
        while True:
            await self._look()
            late = [one for one in self._instances if one.name not in self._ready]
            if all(one.crashes for one in late):
                return [one.name for one in late]
            await asyncio.sleep(POLL_SECONDS)

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

        The gateway is never given up while an instance lives, since instances hold what is
        cached. Raises ClusterError when the last instance is lost for good, or the gateway has
        been asked to end.
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
                        self._progress(f"the others go on without {one.name}")
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

    def reload(self) -> None:
        """Have the gateway read its clients' keys again."""
        if self._gateway is not None and self._gateway.started:
            self._gateway.child.reload()

    async def stop(self) -> None:
        """End the gateway, which lets running requests finish, then the instances."""
        patience = CLOSE_SECONDS + (self._config.gateway.drain_seconds if self._serving else 0)
        gateway = [self._gateway] if self._gateway is not None else []
        for group in (gateway, self._instances):
            children = [one.child for one in group if one.started]
            await end_children(children, self._shutdown, patience, KILL_SECONDS)
        if self._port is not None:
            self._port.close()
        if self._secret_file is not None:
            self._secret_file.unlink(missing_ok=True)
        sweep()  # an instance that was killed has left its shared memory behind

    def _supervised(
        self,
        name: str,
        arguments: Sequence[str],
        needed: Callable[[], bool] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Supervised:
        return Supervised(
            name,
            arguments,
            Restarts(self._limits, self._clock),
            self._progress,
            self._module,
            needed,
            {SECRET_VARIABLE: str(self._secret), **(environment or {})},
        )

    def _some_instance_lives(self) -> bool:
        return any(one.alive for one in self._instances)

    def _all(self) -> list[Supervised]:
        return [*([self._gateway] if self._gateway else []), *self._instances]

    def _children(self) -> list[Child]:
        return [one.child for one in self._all()]

    async def _some_ready(self) -> None:
        while True:
            if await self._look():
                return
            await asyncio.sleep(POLL_SECONDS)

    async def _all_ready(self) -> None:
        while len(self._ready) < len(self._instances):
            await self._look()
            await asyncio.sleep(POLL_SECONDS)

    async def _look(self) -> bool:
        """Ask the gateway who is ready; whether anybody is."""
        async with ClusterClient(self.url, self._secret) as client:
            try:
                members = (await client.view()).instances
            except ClusterError:  # it has ended: whoever watches it finds out
                return False
        ready = {member.id for member in members if member.state is InstanceState.READY}
        for name in sorted(ready - self._ready):
            self._progress(f"{name} is ready")
        self._ready |= ready
        return bool(ready)


async def run_local_cluster(
    config: ClusterConfig,
    progress: Progress,
    ready: Callable[[LocalCluster], None],
    *,
    module: str = "memserve",
) -> None:
    """Run a cluster until SIGINT or SIGTERM; a second one does not wait for requests.

    `ready` is called when all of it serves, or what does not has crashed, and is started again.
    Raises ClusterError when a process fails before anything serves, or when so often afterwards
    that nothing useful is left. `module`: as in `LocalCluster`.
    """
    shutdown = Shutdown()
    shutdown.on_signals()
    cluster = LocalCluster(config, shutdown, progress, module=module)
    if not sys.stdin.isatty():  # a terminal that closes sends it, too, and means the end
        on_reload(cluster.reload)

    async def tell() -> None:
        late = await cluster.settled()
        ready(cluster)
        if late:
            progress(f"not ready, and started again until they are: {', '.join(late)}")

    async def serve() -> None:
        await cluster.begin()
        telling = asyncio.ensure_future(tell())
        supervising = asyncio.ensure_future(cluster.supervise())
        both = (telling, supervising)
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_EXCEPTION)
            if telling.done():
                telling.result()
            await supervising
        finally:
            for task in both:
                task.cancel()
            await asyncio.wait(both)

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
                # Nobody can listen in on what stays within this machine.
                *([] if is_loopback(table.host) else to_flags(config.security)),
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
