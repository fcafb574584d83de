"""The actor of one process: it runs on a node of the Ray cluster, and keeps the process running.

Ray starts the actor again when it or its node is lost (`max_restarts`), perhaps on another node.
The process ends with its actor (`cluster.watchdog`), so that there are no two of a name for long.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections import deque
from collections.abc import AsyncIterator

import ray
import ray.exceptions
import ray.util

from memserve.api.serving import Shutdown
from memserve.api.tls import client_tls
from memserve.clock import MonotonicClock
from memserve.cluster.client import ClusterClient
from memserve.cluster.port import ReservedPort
from memserve.cluster.restarts import RestartLimits, Restarts
from memserve.cluster.supervised import Supervised
from memserve.errors import ClusterError
from memserve.hosts import WILDCARDS, bracketed
from memserve.pool.segment import sweep
from memserve.ray.connection import first_line, process_names
from memserve.ray.order import PREFIX, Report, decode_order, decode_report, encode

log = logging.getLogger(__name__)

_KEPT_LINES = 500  # of output, for readers that are slow or come later
ASK_SECONDS = 5.0  # for another actor's answer, which is at hand; a lost node gives none
RETRY_SECONDS = 0.5


class Member:
    """The actor. Its methods take and return bytes (`order.py`)."""

    def __init__(self, order: bytes) -> None:
        self._order = decode_order(order)
        self._life = uuid.uuid4().hex
        self._node: str = ray.util.get_node_ip_address()
        self._joined = dict[str, str]()  # URLs of gateways, by name
        self._url = ""
        self._lines: deque[tuple[bool, str]] = deque(maxlen=_KEPT_LINES)
        self._said = 0  # lines so far
        self._ended: str | None = None
        self._news = asyncio.Condition()
        self._shutdown = Shutdown()
        self._port: ReservedPort | None = None
        self._process: Supervised | None = None
        # Kept in an attribute: the loop has weak references to tasks only.
        self._running = asyncio.get_running_loop().create_task(self._run())

    async def order(self) -> bytes:
        return encode(self._order)

    async def report(self, seen: int, seconds: float) -> bytes:
        """Return a `Report` with the lines after the `seen`-th; waits up to `seconds` for one."""
        before = self._state()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds), self._news:
                await self._news.wait_for(lambda: self._said > seen or self._state() != before)
        new = min(self._said - seen, len(self._lines)) if seen <= self._said else len(self._lines)
        url, pid, crashes, alive, ended = self._state()
        lines = tuple(self._lines)[len(self._lines) - new :]
        return encode(
            Report(self._life, self._node, pid, url, crashes, alive, ended, self._said, lines)
        )

    async def meet(self, gateway: str, url: str) -> None:
        """Register with a gateway that has another address than it had."""
        if self._joined.get(gateway) == url:
            return
        self._joined[gateway] = url
        if self._url:
            tls = client_tls(self._order.config.security.tls_ca)
            async with ClusterClient(url, self._order.secret, tls) as client:
                await client.add(self._url)

    async def reload(self) -> None:
        if self._process is not None:
            self._process.reload()

    async def stop(self, seconds: float) -> None:
        """End the process, which has `seconds` for what it runs; a second call does not wait."""
        self._shutdown.request()
        if self._process is not None:
            await self._process.stop(self._shutdown, seconds)
        self._running.cancel()  # it may wait for a gateway, or in the pause before a restart
        await asyncio.wait((self._running,))
        if self._ended is None:
            self._ended = ""
        await self._tell()
        sweep()  # of killed processes

    async def _run(self) -> None:
        try:
            process = self._process = Supervised(
                self._order.name,
                self._order.arguments,
                Restarts(RestartLimits(), MonotonicClock()),
                self._progress,
                self._order.module,
                lambda: self._order.is_gateway,
                self._order.secrets,
                self._where,
            )
            if self._order.is_gateway:
                self._reserve()
            else:
                await self._find_gateways()
            await process.start()
            process.show_output(self._output)
            following = asyncio.ensure_future(self._follow(process))
            try:
                await process.keep()
            finally:
                following.cancel()
            self._ended = ""
        except ClusterError as error:
            self._ended = str(error)
        finally:
            if self._port is not None:
                self._port.close()
            await self._tell()

    def _where(self) -> list[str]:
        """Return the arguments that depend on the node and on where the gateways are now."""
        if self._port is not None:
            return ["--host", self._host(), "--port", str(self._port.number)]
        urls = dict.fromkeys([*self._joined.values(), *self._order.join])
        return ["--host", self._node, *(part for url in urls for part in ("--join", url))]

    def _host(self) -> str:
        return self._order.host or self._node

    def _reserve(self) -> None:
        self._port = ReservedPort(self._host(), self._order.port, tls=self._order.tls)

    async def _follow(self, process: Supervised) -> None:
        """Learn the address of each life of the process, and introduce a gateway to the members."""
        child = None
        while True:
            if process.child is not child and process.alive:
                child, self._url = process.child, ""
                with contextlib.suppress(ClusterError):  # it ends, and has another life
                    url = await process.address()
                    self._url = self._reachable(url)
                    await self._tell()
                    if self._order.is_gateway:
                        await self._introduce()
            await asyncio.sleep(RETRY_SECONDS)

    def _reachable(self, url: str) -> str:
        """Return a process's URL as other nodes know it."""
        if self._port is None or self._host() not in WILDCARDS:
            return url
        return f"{'https' if self._order.tls else 'http'}://{bracketed(self._node)}:{self._port.number}"

    async def _introduce(self) -> None:
        """Tell the members where this gateway is: it may have been elsewhere when they started."""
        async for name, member in self._others():
            try:
                async with asyncio.timeout(ASK_SECONDS):
                    await member.meet.remote(self._order.name, self._url)
            except (ray.exceptions.RayError, TimeoutError) as error:
                why = first_line(error)
                log.warning("%s was not told of %s: %s", name, self._order.name, why)

    async def _others(self) -> AsyncIterator[tuple[str, ray.actor.ActorHandle]]:
        """Yield the name and the actor of each instance of this cluster."""
        space = self._order.namespace
        for name in await process_names(space):
            if name not in self._order.gateways:
                with contextlib.suppress(ValueError):  # it has just ended
                    yield name, await asyncio.to_thread(ray.get_actor, PREFIX + name, space)

    async def _find_gateways(self) -> None:
        """Wait until a gateway has an address, if there are any among the actors."""
        while self._order.gateways and not self._joined:
            for name in self._order.gateways:
                url = await self._url_of(name)
                if url:
                    self._joined.setdefault(name, url)
            if not self._joined:
                await asyncio.sleep(RETRY_SECONDS)

    async def _url_of(self, gateway: str) -> str:
        """Return a gateway's URL; "" while it has none."""
        try:
            actor = await asyncio.to_thread(ray.get_actor, PREFIX + gateway, self._order.namespace)
            async with asyncio.timeout(ASK_SECONDS):
                return decode_report(await actor.report.remote(0, 0.0)).url
        except (ValueError, ray.exceptions.RayError, TimeoutError):
            return ""  # Ray starts it, or starts it again

    def _state(self) -> tuple[str, int | None, int, bool, str | None]:
        process = self._process
        if process is None or process.place is None:
            return self._url, None, 0, False, self._ended
        alive = process.alive and self._ended is None
        return self._url, process.place.pid, process.crashes, alive, self._ended

    def _progress(self, line: str) -> None:
        self._say(False, line)

    def _output(self, line: str) -> None:
        self._say(True, line)

    def _say(self, printed: bool, line: str) -> None:
        self._lines.append((printed, line))
        self._said += 1
        self._telling = asyncio.ensure_future(self._tell())

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()
