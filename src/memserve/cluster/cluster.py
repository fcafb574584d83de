"""A cluster: gateways and instances that a backend runs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

from memserve.api.serving import Shutdown
from memserve.clock import MonotonicClock
from memserve.cluster.backend import Backend, Group, Kept, Launch, Place
from memserve.cluster.launches import (
    gateway_launch,
    gateway_names,
    instance_launch,
    instance_launches,
    tables,
)
from memserve.cluster.planning import PlannerLoop
from memserve.cluster.readiness import POLL_SECONDS, Readiness
from memserve.cluster.running import announce_cluster
from memserve.config import ClusterConfig
from memserve.errors import ClusterError, ConfigError
from memserve.hosts import port_of
from memserve.models.resolve import Progress
from memserve.secrets import (
    SECRET_FILE_VARIABLE,
    SECRET_VARIABLE,
    Secret,
    cluster_secret,
    keep_secret,
    new_secret,
)

# A process that serves drains for `drain_seconds`, and then needs up to CLOSE_SECONDS to close
# connections, end its engine's step and free memory.
CLOSE_SECONDS = 10.0
# For which a look of the planner waits for a gateway that does not listen, before it goes on with
# the others: longer than one that listens takes to tell, less than the planner's usual interval.
ADDRESS_SECONDS = 1.0

_T = TypeVar("_T")


class Cluster:
    """Owns the processes from `begin` or `start` to `stop`, which the caller must always call.

    It can be scaled: see `backend.Groups`.
    """

    def __init__(
        self,
        config: ClusterConfig,
        backend: Backend,
        shutdown: Shutdown,
        progress: Progress,
        secret: Secret | None = None,
    ) -> None:
        """Each process resolves the model again, so it should be on its machine already.

        `shutdown.forced` ends the wait for running requests in `stop`. `secret`: the cluster's;
        None: the one that is configured, or a new one.
        """
        self.url = ""  # of the first gateway, once `begin` has returned
        self._config = backend.fit(config)
        self._backend = backend
        self._shutdown = shutdown
        self._progress = progress
        self._secret = secret or _secret_for(self._config)
        self._files: list[Path] = []  # with secret and address, for this user's commands
        self._gateways: list[Kept] = []
        self._instances: list[Kept] = []
        self._group_of: dict[str, str] = {}  # by instance
        self._number = 0  # of the next instance
        self._show: Callable[[str], None] | None = None
        self.serving = False  # an instance has been ready
        self._readiness = Readiness(self._secret, self._config.security.tls_ca, progress)
        self._keeping: dict[asyncio.Future[None], Kept] = {}  # while `supervise` runs
        self._more = asyncio.Event()  # `_keeping` has become larger

    async def begin(self) -> None:
        """Start all processes and wait until the gateway has a ready instance.

        Raises ClusterError, with its last lines, if a process ends before that.
        """
        await self._backend.open()
        for launch in instance_launches(self._config, self._secret):
            await self._add(launch)
        for name in gateway_names(self._config):
            launch = gateway_launch(self._config, self._secret, name)
            gateway = self._backend.kept(launch, self._some_instance_lives)
            self._gateways.append(gateway)
            await gateway.start()
        count = f"{len(self._instances)} instance{'s' if len(self._instances) > 1 else ''}"
        self._progress(f"loading {self._config.model.path} into {count}")
        if self._gateways:
            self.url = await self.or_failure(self._gateways[0].address())
            self._keep_files()
        else:
            self.url = self._config.cluster.join[0]
        try:
            await self.or_failure(self._some_ready())
        except ClusterError as failure:
            # Go on if an instance has become ready meanwhile: clients may be served already.
            if not await self._look():
                raise
            self._progress(str(failure))
        self.serving = True

    async def adopt(self, launches: Sequence[Launch], url: str) -> None:
        """Take over processes that the backend runs already, with a gateway at `url`."""
        self.url, self.serving = url, True
        for launch in sorted(launches, key=lambda one: (one.settings is not None, _number(one))):
            if launch.settings is None:
                self._gateways.append(self._backend.kept(launch, self._some_instance_lives))
                await self._gateways[-1].start()
            else:
                await self._add(launch)

    async def start(self) -> None:
        """As `begin`, but wait until every instance is ready.

        Raises ClusterError, with its last lines, as soon as a process ends.
        """
        await self.begin()
        await self.or_failure(self.all_ready())

    async def settled(self) -> list[str]:
        """Wait until every instance has been ready or has crashed, and return the names of those
        that have not been ready. Call it beside `supervise`, which starts them again."""
        while True:
            await self._look()
            late = [one for one in self._instances if one.name not in self._readiness.ready]
            if all(one.crashes for one in late):
                return [one.name for one in late]
            await asyncio.sleep(POLL_SECONDS)

    @property
    def secret(self) -> Secret:
        """The cluster's secret, for other processes that are started beside it."""
        return self._secret

    def pids(self) -> dict[str, int]:
        """Return the process ids by name, each valid on its process's machine."""
        return {one.name: one.place.pid for one in self._all() if one.place is not None}

    async def watch(self) -> None:
        """Wait until a process ends, and raise ClusterError with its last lines."""
        waiting = [asyncio.ensure_future(one.failure()) for one in self._all()]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            raise next(task for task in waiting if task.done()).result()
        finally:
            for task in waiting:
                task.cancel()

    async def supervise(self) -> None:
        """Have crashed processes started again, until a gateway or all instances have ended.

        A gateway is not given up while an instance lives, since instances hold the cached KV.
        Raises ClusterError when the last instance has ended or is given up, or a gateway ends.
        """
        for one in self._all():
            self._keep(one)
        lost: ClusterError | None = None
        try:
            while True:
                await self._some_ended()
                for task in [task for task in self._keeping if task.done()]:
                    one = self._keeping.pop(task)
                    if one in self._instances:
                        self._instances.remove(one)
                    failure = task.exception()
                    if failure is None and one in self._gateways:
                        failure = ClusterError(f"the {one.name} has ended, as it was asked to")
                    if isinstance(failure, ClusterError) and one not in self._gateways:
                        lost = failure
                        self._progress(str(failure))
                        self._progress(f"the others go on without {one.name}")
                    elif failure is not None:
                        raise failure
                if all(one in self._gateways for one in self._keeping.values()):
                    raise lost or ClusterError("every instance has ended, as it was asked to")
        finally:
            keeping = list(self._keeping)
            self._keeping.clear()
            for task in keeping:
                task.cancel()
            await asyncio.gather(*keeping, return_exceptions=True)

    async def plan(self) -> None:
        """Run the planner, until cancelled. What keeps it from a look is told, and it looks again:
        the cluster serves without it."""
        loop = PlannerLoop(
            self._listening,
            self._config.planner,
            MonotonicClock(),
            self._secret,
            self._readiness.tls,
            self,
            self._progress,
        )
        await loop.run()

    async def _listening(self) -> list[str]:
        """Return the URLs at which gateways listen now. Raises ClusterError if none does."""
        if not self._gateways:
            return list(self._config.cluster.join)
        found = await asyncio.gather(*map(_url_of, self._gateways))
        if urls := [each for each in found if isinstance(each, str)]:
            return urls
        raise ClusterError("; ".join(map(str, found)))

    async def groups(self) -> tuple[Group, ...]:
        return tuple(
            Group(
                name, table.role, tuple(one.name for one in self._instances if self._is(one, name))
            )
            for name, table in tables(self._config).items()
        )

    async def places(self) -> dict[str, Place]:
        return {one.name: one.place for one in self._all() if one.place is not None}

    async def scale(self, group: str, count: int) -> None:
        if group not in tables(self._config):
            known = ", ".join(tables(self._config))
            raise ClusterError(f"there is no group '{group}'; there are: {known}")
        there = [one for one in self._instances if self._is(one, group)]
        if len(self._instances) - len(there) + count < 1:
            raise ClusterError(f"{group} = {count}: a cluster needs an instance")
        for _ in range(count - len(there)):
            launch = instance_launch(self._config, self._secret, group, self._number)
            self._progress(f"starting {launch.name}")
            one = await self._add(launch)
            if self._keeping:
                self._keep(one)
        await asyncio.gather(*map(self._remove, there[count:]))

    async def replace(self, launch: Launch, seconds: float) -> None:
        """End a process once it has finished what it runs, start `launch` in its place, and wait
        until that serves. Raises ClusterError if it does not within `seconds`."""
        processes = self._gateways if launch.settings is None else self._instances
        at = [one.name for one in processes].index(launch.name)
        self._progress(f"{launch.name}: finishes what it runs, and is replaced")
        await self._look()
        await self._stop(processes[at])
        if launch.settings is None:
            self._readiness.ready.clear()  # its successor has to know them
        else:
            self._readiness.replaced(launch.name)
        needed = self._some_instance_lives if launch.settings is None else lambda: False
        successor = processes[at] = self._backend.kept(launch, needed)
        await successor.start()
        try:
            async with asyncio.timeout(seconds):
                url = await successor.address()
                if launch.settings is None:
                    self.url = url
                await self.or_failure(self.all_ready())
        except TimeoutError as error:
            raise ClusterError(f"{launch.name} is not ready after {seconds:g} s") from error

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
        self._show = show
        for one in self._all():
            one.show_output(show)

    def reload(self) -> None:
        """Have the gateways read their clients' API keys again."""
        for gateway in self._gateways:
            gateway.reload()

    async def stop(self) -> None:
        """End the gateways, which finish running requests, then the instances. Remove the files of
        secret and address."""
        for processes in (self._gateways, self._instances):
            await asyncio.gather(*map(self._stop, processes))
        await self._backend.close()
        self._remove_files()

    async def leave(self) -> None:
        """Let the processes go on without this one, as a backend's that are detached from it do."""
        await self._backend.close()
        self._remove_files()

    def _keep_files(self) -> None:
        port = port_of(self.url)
        self._files.append(keep_secret(self._secret, port))
        host = self._config.gateway.host
        self._files.append(announce_cluster(self._backend.url, host, port))

    def _remove_files(self) -> None:
        for file in self._files:
            file.unlink(missing_ok=True)

    async def _add(self, launch: Launch) -> Kept:
        """Start an instance."""
        one = self._backend.kept(launch, lambda: False)
        self._number = max(self._number, 1 + _number(launch))
        await one.start()  # if it cannot be started, there is no such instance
        self._group_of[launch.name] = launch.group
        self._instances.append(one)
        if self._show is not None:
            one.show_output(self._show)
        return one

    async def _remove(self, one: Kept) -> None:
        self._progress(f"{one.name} finishes what it runs, and ends")
        await self._stop(one)
        if one in self._instances:  # nobody supervises it
            self._instances.remove(one)
        self._readiness.ready.discard(one.name)

    async def _stop(self, one: Kept) -> None:
        drain = self._config.gateway.drain_seconds if self.serving else 0
        await one.stop(self._shutdown, CLOSE_SECONDS + drain)

    def _keep(self, one: Kept) -> None:
        self._keeping[asyncio.ensure_future(one.keep())] = one
        self._more.set()

    async def _some_ended(self) -> None:
        """Wait until a process has ended for good."""
        while not any(task.done() for task in self._keeping):
            self._more.clear()
            more = asyncio.ensure_future(self._until_more())
            try:
                await asyncio.wait((*self._keeping, more), return_when=asyncio.FIRST_COMPLETED)
            finally:
                more.cancel()

    async def _until_more(self) -> None:
        await self._more.wait()

    def _is(self, one: Kept, group: str) -> bool:
        return self._group_of[one.name] == group

    def _some_instance_lives(self) -> bool:
        return any(one.alive for one in self._instances)

    def _all(self) -> list[Kept]:
        return [*self._gateways, *self._instances]

    async def _some_ready(self) -> None:
        while True:
            if await self._look():
                return
            await asyncio.sleep(POLL_SECONDS)

    async def all_ready(self) -> None:
        """Wait until every instance has been ready."""
        while any(one.name not in self._readiness.ready for one in self._instances):
            await self._look()
            await asyncio.sleep(POLL_SECONDS)

    async def _look(self) -> bool:
        return await self._readiness.look(self.url, [one.name for one in self._instances])


async def _url_of(one: Kept) -> str | ClusterError:
    """Return where it listens, or why it does not."""
    try:
        async with asyncio.timeout(ADDRESS_SECONDS):
            return await one.address()
    except TimeoutError:
        return ClusterError(f"the {one.name} does not listen yet")
    except ClusterError as error:
        return error


def _number(launch: Launch) -> int:
    """Return the number in the name, by which newer instances are known; 0 without one."""
    end = launch.name.rpartition("-")[2]
    return int(end) if end.isdigit() else 0


def _secret_for(config: ClusterConfig) -> Secret:
    """Return the configured secret; without one a new one, so that neither other users of this
    machine nor this user's other clusters can use it.

    Raises ConfigError if the gateways run elsewhere: theirs has to be configured.
    """
    given = cluster_secret()
    if not given.local:
        return given
    if not config.cluster.gateways:
        raise ConfigError(
            f"cluster.join: set {SECRET_VARIABLE} or {SECRET_FILE_VARIABLE} to the secret of "
            f"{', '.join(config.cluster.join)}"
        )
    return new_secret()
