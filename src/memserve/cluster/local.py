"""A local cluster: a gateway and its instances as supervised processes on this machine."""

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
from memserve.cluster.running import announce_cluster
from memserve.cluster.supervised import Supervised
from memserve.config import ClusterConfig, InstanceConfig, available_cores
from memserve.errors import ClusterError
from memserve.flags import to_flags
from memserve.hosts import is_loopback
from memserve.models.resolve import Progress
from memserve.pool.segment import sweep
from memserve.secrets import SECRET_VARIABLE, Secret, cluster_secret, keep_secret, new_secret

POLL_SECONDS = 0.2  # between looks at the state of a starting cluster
# A child that serves drains for `drain_seconds`, and then needs up to CLOSE_SECONDS to close
# connections, end its engine's step and free memory. After a second SIGTERM it does not drain;
# KILL_SECONDS later it is killed.
CLOSE_SECONDS = 10.0
KILL_SECONDS = 5.0

_T = TypeVar("_T")


class LocalCluster:
    """Owns the processes from `begin` or `start` to `stop`, which the caller must always call."""

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
        """Each process resolves the model again, so it should be on this machine already.

        `shutdown.forced` ends the wait for running requests in `stop`. `limits`: of restarts in
        `supervise`. `module`: run by Python for each process.
        """
        self.url = ""  # of the gateway, once `begin` has returned
        self._config = config
        self._shutdown = shutdown
        self._progress = progress
        self._limits = limits or RestartLimits()
        self._clock = clock or MonotonicClock()
        self._module = module
        given = cluster_secret()
        # A secret of its own, so that neither other users of this machine nor this user's other
        # clusters can use it.
        self._secret = new_secret() if given.local else given
        self._files: list[Path] = []  # with secret and address, for this user's commands
        self._port: ReservedPort | None = None
        self._gateway: Supervised | None = None
        self._instances: list[Supervised] = []
        self._serving = False
        self._ready: set[str] = set()  # instances that have been ready once

    async def begin(self) -> None:
        """Start all processes and wait until the gateway has a ready instance.

        Raises ClusterError, with its last lines, if a process ends before that.
        """
        self._port = ReservedPort(
            self._config.gateway.host,
            self._config.gateway.port,
            tls=self._config.security.tls_cert is not None,
        )
        self._files.append(keep_secret(self._secret, self._port.number))
        for name, arguments in instance_commands(self._config):
            one = self._supervised(name, [*arguments, "--join", self._port.url])
            self._instances.append(one)
            await one.start()
        gateway = msgspec.structs.replace(self._config.gateway, port=self._port.number)
        command = ["gateway", *to_flags(self._config.model), *to_flags(gateway)]
        command += [*to_flags(self._config.security), *to_flags(self._config.log)]
        command += to_flags(self._config.traces)
        keys = {KEYS_VARIABLE: hashed(self._config.gateway.api_keys)}
        self._gateway = self._supervised("gateway", command, self._some_instance_lives, keys)
        await self._gateway.start()
        count = f"{len(self._instances)} instance{'s' if len(self._instances) > 1 else ''}"
        self._progress(f"loading {self._config.model.path} into {count}")
        self.url = await self.or_failure(self._gateway.child.address())
        host = self._config.gateway.host
        self._files.append(announce_cluster(self._port.url, host, self._port.number))
        try:
            await self.or_failure(self._some_ready())
        except ClusterError as failure:
            # Go on if an instance has become ready meanwhile: clients may be served already.
            if not await self._look():
                raise
            self._progress(str(failure))
        self._serving = True

    async def start(self) -> None:
        """As `begin`, but wait until every instance is ready.

        Raises ClusterError, with its last lines, as soon as a process ends.
        """
        await self.begin()
        await self.or_failure(self._all_ready())

    async def settled(self) -> list[str]:
        """Wait until every instance has been ready or has crashed, and return the names of those
        that have not been ready. Call it beside `supervise`, which starts them again."""
        while True:
            await self._look()
            late = [one for one in self._instances if one.name not in self._ready]
            if all(one.crashes for one in late):
                return [one.name for one in late]
            await asyncio.sleep(POLL_SECONDS)

    @property
    def secret(self) -> Secret:
        """The cluster's secret, for other processes that are started beside it."""
        return self._secret

    def pids(self) -> dict[str, int]:
        """Return the process ids by name."""
        return {one.name: one.child.pid for one in self._all() if one.started}

    async def watch(self) -> None:
        """Wait until a process ends, and raise ClusterError with its last lines."""
        children = self._children()
        await asyncio.wait([c.ended for c in children], return_when=asyncio.FIRST_COMPLETED)
        dead = next(child for child in children if child.ended.done())
        raise await dead.failure()

    async def supervise(self) -> None:
        """Start crashed processes again, until the gateway or all instances have ended.

        The gateway is never given up while an instance lives, since instances hold the cached KV.
        Raises ClusterError when the last instance has ended or is given up, or the gateway ends.
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
        """Return the result of `work`. If a process ends before, cancel it and raise
        ClusterError."""
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
        """Call `show` with each line that the processes print, kept ones first."""
        for one in self._all():
            one.show_output(show)

    def reload(self) -> None:
        """Have the gateway read its clients' API keys again."""
        if self._gateway is not None and self._gateway.started:
            self._gateway.child.reload()

    async def stop(self) -> None:
        """End the gateway, which finishes running requests, then the instances. Free the port, the
        files of secret and address, and shared memory of killed processes."""
        patience = CLOSE_SECONDS + (self._config.gateway.drain_seconds if self._serving else 0)
        gateway = [self._gateway] if self._gateway is not None else []
        for group in (gateway, self._instances):
            children = [one.child for one in group if one.started]
            await end_children(children, self._shutdown, patience, KILL_SECONDS)
        if self._port is not None:
            self._port.close()
        for file in self._files:
            file.unlink(missing_ok=True)
        sweep()  # a killed instance leaves its shared memory behind

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
        """Ask the gateway for ready instances; return whether there are any."""
        async with ClusterClient(self.url, self._secret) as client:
            try:
                members = (await client.view()).instances
            except ClusterError:  # it has ended, which `watch` or `supervise` finds out
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
    beside: Callable[[LocalCluster], Awaitable[None]] | None = None,
    *,
    module: str = "memserve",
) -> None:
    """Run a cluster until SIGINT or SIGTERM; a second signal ends the wait for requests.

    `ready` is called when every instance has been ready or has crashed, and `beside` is awaited
    from then on; it is cancelled before the cluster stops. Raises ClusterError if a process ends
    before an instance is ready, or as `LocalCluster.supervise`. `module`: as in `LocalCluster`.
    """
    shutdown = Shutdown()
    shutdown.on_signals()
    cluster = LocalCluster(config, shutdown, progress, module=module)
    if not sys.stdin.isatty():  # a terminal that closes sends SIGHUP, too, to end the process
        on_reload(cluster.reload)

    async def tell() -> None:
        late = await cluster.settled()
        ready(cluster)
        if late:
            progress(f"not ready, and started again until they are: {', '.join(late)}")
        if beside is not None:
            await beside(cluster)

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
    """Yield the name and the `memserve` arguments of each instance."""
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
                *to_flags(config.log),
                *to_flags(_own_settings(table, len(settings))),
                *to_flags(config.traces),
                # Loopback traffic needs no TLS.
                *([] if is_loopback(table.host) else to_flags(config.security)),
                "--drain-seconds",
                str(config.gateway.drain_seconds),
            ],
        )


def _own_settings(table: InstanceConfig, instances: int) -> InstanceConfig:
    """Return one instance's settings, with its share of the cores as threads if neither threads nor
    cores are given: with more threads than cores, instances slow each other down."""
    threads = table.threads
    if threads is None and table.cpus is None:
        threads = max(1, available_cores() // instances)
    return msgspec.structs.replace(table, count=1, threads=threads)
