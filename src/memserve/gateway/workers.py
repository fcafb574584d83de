"""Supervisor of several gateway processes (workers) on one port, to use several cores.

Each worker is a gateway with prompt trees, polls and a queue of its own. Workers share only the
members: each passes joins and leaves on to the others (`Siblings`). The kernel spreads clients'
connections over the workers. The supervising process serves nothing; it restarts workers as
`memserve up` restarts its processes.

Order of the timeouts: a worker that is asked to end needs `drain_seconds`, then up to the
gateway's STOP_SECONDS and the server's CLOSE_SECONDS. WORKER_CLOSE_SECONDS after the drain it is
asked again, and WORKER_KILL_SECONDS later killed: before the gateway's parent process does so to
the whole gateway (`cluster/cluster.py`). Workers whose parent was killed need up to
`watchdog.FORCE_SECONDS` and a shortened drain to free the port: less than ORPHAN_SECONDS.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from memserve.api.serving import Shutdown, announce, on_reload
from memserve.clock import Clock, MonotonicClock
from memserve.cluster.child import Child, end_children
from memserve.cluster.line_printer import STDERR, LinePrinter, LineStream
from memserve.cluster.port import ReservedPort, is_listened_on
from memserve.cluster.restarts import RestartLimits, Restarts
from memserve.cluster.supervised import Supervised
from memserve.config import GatewayConfig
from memserve.errors import ClusterError, ConfigError

log = logging.getLogger(__name__)

WORKER_CLOSE_SECONDS = 6.0
WORKER_KILL_SECONDS = 2.0
ORPHAN_SECONDS = 10.0
_RETRY_SECONDS = 0.25  # between looks whether the port is free

LOOPBACK = "127.0.0.1"  # of the workers' private addresses


@dataclass(frozen=True, slots=True)
class WorkerPlace:
    """A worker's index, and the private ports of all workers, by index."""

    index: int
    ports: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> WorkerPlace:
        """Return the place of `INDEX:PORT,PORT,...`. Raises ConfigError."""
        index, _, ports = text.partition(":")
        try:
            place = cls(int(index), tuple(map(int, ports.split(","))))
        except ValueError as error:
            raise ConfigError(f"{text!r} is not a worker's place") from error
        if not 0 <= place.index < len(place.ports):
            raise ConfigError(f"{text!r} is not a worker's place")
        return place

    def __str__(self) -> str:
        return f"{self.index}:{','.join(map(str, self.ports))}"

    @property
    def port(self) -> int:
        return self.ports[self.index]

    @property
    def siblings(self) -> dict[int, str]:
        """URLs of the other workers, by index."""
        return {
            index: f"http://{LOOPBACK}:{port}"
            for index, port in enumerate(self.ports)
            if index != self.index
        }


class Workers:
    """Owns the workers' processes from `start` to `stop`; `stop` must be called."""

    def __init__(
        self,
        config: GatewayConfig,
        command: Sequence[str],
        shutdown: Shutdown,
        *,
        module: str = "memserve",
        limits: RestartLimits | None = None,
        clock: Clock | None = None,
        show: Callable[[str], None] | None = None,
    ) -> None:
        """`command`: the arguments with which `python -m module` runs a worker, without `--port`
        and `--worker`. `show` is called with each line that workers print; it must not block."""
        self.url = ""  # once `start` has returned
        self._config = config
        self._command = command
        self._shutdown = shutdown
        self._module = module
        self._limits = limits or RestartLimits()
        self._clock = clock or MonotonicClock()
        self._show = show or (lambda line: None)
        self._ports: list[ReservedPort] = []
        self._workers: list[Supervised] = []

    async def start(self, reserved: bool = False) -> None:
        """Start the workers, and wait until all of them listen. `reserved`: this process's parent
        has reserved the port, so other listeners can only be orphaned workers that are ending;
        they have ORPHAN_SECONDS. Raises ClusterError."""
        port = self._config.port
        if reserved:
            await self._orphans_gone()
        else:
            self._ports.append(ReservedPort(self._config.host, port))
            port = self._ports[0].number
        private = [ReservedPort(LOOPBACK, 0) for _ in range(self._config.workers)]
        self._ports += private
        numbers = tuple(one.number for one in private)
        for index in range(self._config.workers):
            place = WorkerPlace(index, numbers)
            arguments = [*self._command, "--port", str(port), "--worker", str(place)]
            restarts = Restarts(self._limits, self._clock)
            needed = partial(self._others_live, index)
            worker = Supervised(
                f"worker-{index}", arguments, restarts, log.warning, self._module, needed
            )
            self._workers.append(worker)
            await worker.start()
            worker.show_output(self._show)
        for worker in self._workers:
            self.url = await worker.child.address()  # all workers have one URL

    async def supervise(self) -> None:
        """Restart workers that crash; return when all have ended in order. Raises ClusterError
        if a worker keeps crashing and no other one lives."""
        keeping = [asyncio.ensure_future(worker.keep()) for worker in self._workers]
        try:
            await asyncio.gather(*keeping)
        finally:
            for task in keeping:
                task.cancel()
            await asyncio.gather(*keeping, return_exceptions=True)

    def reload(self) -> None:
        """Have each worker reload the API keys."""
        for worker in self._workers:
            if worker.started:
                worker.child.reload()

    def pids(self) -> list[int]:
        """Return the process ids of the running workers, in their order."""
        return [worker.child.pid for worker in self._workers if worker.started]

    async def stop(self) -> None:
        """End the workers; running requests have `drain_seconds` to finish."""
        children: list[Child] = [worker.child for worker in self._workers if worker.started]
        seconds = self._config.drain_seconds + WORKER_CLOSE_SECONDS
        await end_children(children, self._shutdown, seconds, WORKER_KILL_SECONDS)
        for port in self._ports:
            port.close()

    def _others_live(self, index: int) -> bool:
        return any(one.alive for at, one in enumerate(self._workers) if at != index)

    async def _orphans_gone(self) -> None:
        host, port = self._config.host, self._config.port
        until = self._clock.now() + ORPHAN_SECONDS
        while is_listened_on(host, port):
            if self._clock.now() >= until:
                raise ClusterError(f"{host}:{port}: {os.strerror(errno.EADDRINUSE)}")
            await asyncio.sleep(_RETRY_SECONDS)


def run_workers(
    config: GatewayConfig,
    command: Sequence[str],
    *,
    module: str = "memserve",
    reserved: bool = False,
    ready_fd: int | None = None,
) -> int:
    """Run `config.workers` gateways until SIGTERM or SIGINT; return the process's exit code. For
    the parameters, see `run_gateway` and `Workers`. Raises ClusterError."""
    asyncio.run(_main(config, command, module, reserved, ready_fd))
    return 0


async def _main(
    config: GatewayConfig,
    command: Sequence[str],
    module: str,
    reserved: bool,
    ready_fd: int | None,
) -> None:
    shutdown = Shutdown()
    shutdown.on_signals()
    # Workers' lines are printed as they are: they have time and level already.
    printer = LinePrinter(STDERR)
    for handler in logging.getLogger().handlers:  # this process's log must not block either
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(LineStream(printer))
    workers = Workers(config, command, shutdown, module=module, show=printer.show)
    on_reload(workers.reload)

    async def serve() -> None:
        await workers.start(reserved)
        announce(workers.url, ready_fd)
        await workers.supervise()

    try:
        await shutdown.run_until_requested(serve())
    finally:
        await workers.stop()
        await asyncio.to_thread(printer.close)
