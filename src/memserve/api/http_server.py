"""An HTTP/1.1 server on asyncio protocols.

A handler gets whole requests, one at a time for each connection. A request that breaks HTTP or
the limits gets an error in OpenAI's shape. `http_connection` has turns and timeouts, `http_parser`
parses requests, `http_limits` bounds connections, time and memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import resource
import socket
import ssl
from collections.abc import Callable, Coroutine

from memserve.api.errors import internal
from memserve.api.http_connection import Admit, Connection
from memserve.api.http_limits import HttpCounters, HttpLimits
from memserve.api.http_message import Reply, Request

log = logging.getLogger(__name__)

Handler = Callable[[Request, Reply], Coroutine[object, object, None]]

# Share of the process's file descriptors for clients' connections: a relayed request takes
# another one upstream, and the process opens some itself.
FILES_SHARE = 0.5


class HttpServer:
    """Serves one handler. Call `close` before the loop ends."""

    def __init__(
        self,
        handler: Handler,
        max_body_bytes: int,
        limits: HttpLimits | None = None,
        counters: HttpCounters | None = None,
        admit: Admit | None = None,
    ) -> None:
        """`counters`: where to count, if another object reads them. `admit` is called for a
        request with a body of unknown size or larger than `HttpLimits.unasked_body`, before any
        of the body is kept."""
        self.handler = handler
        self.admit = admit
        self.max_body_bytes = max_body_bytes
        self.limits = _possible(limits or HttpLimits(), max_body_bytes)
        self.counters = counters or HttpCounters()
        self.held_bytes = 0  # bytes of requests not yet handled; bounded by HttpLimits.held_bytes
        self._connections: set[Connection] = set()
        # Idle connections, the longest idle last; None: not collected since the last sweep.
        self._idle: list[Connection] | None = None
        self._empty = asyncio.Event()
        self.closing = False
        self.loop = asyncio.get_running_loop()
        self._server: asyncio.Server | None = None
        self._sweeping: asyncio.TimerHandle | None = None
        self._tasks: dict[Reply, asyncio.Task[None]] = {}  # the loop's references are weak

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._connections)

    async def start(
        self, sock: socket.socket, backlog: int, tls: ssl.SSLContext | None = None
    ) -> None:
        """Accept connections on a listening socket, which the server owns from now on. With
        `tls`, clients speak TLS; they are counted once they have shaken hands."""
        limits = self.limits
        self._server = await self.loop.create_server(
            lambda: Connection(self),
            sock=sock,
            backlog=backlog,
            ssl=tls,
            ssl_handshake_timeout=None if tls is None else limits.handshake_seconds,
            ssl_shutdown_timeout=None if tls is None else limits.linger_seconds,
        )
        self._sweep()

    async def close(self, seconds: float) -> None:
        """Accept no more connections; abort busy ones after `seconds`."""
        self.closing = True
        if self._sweeping is not None:
            self._sweeping.cancel()
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.close_when_idle()
        if self._connections:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), seconds)
        for connection in list(self._connections):
            connection.abort()

    def add(self, connection: Connection) -> bool:
        """Register a connection. Return whether there is room for it; if not, it must refuse."""
        self.counters.connections += 1
        full = len(self._connections) >= self.limits.connections
        room = not full or self._make_room()
        self._connections.add(connection)
        self.counters.refused_connections += not room
        return room

    def discard(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if self.closing and not self._connections:
            self._empty.set()

    def answer(self, request: Request, reply: Reply) -> None:
        """Run the handler."""
        self._tasks[reply] = self.loop.create_task(self._answer(request, reply))

    async def _answer(self, request: Request, reply: Reply) -> None:
        try:
            work = self.handler(request, reply)
            del request  # frees its body as soon as the handler drops it
            await work
        finally:
            # asyncio logs an exception of the handler; the client must still get an end.
            del self._tasks[reply]
            if not reply.ended:
                if reply.started:
                    reply.abort()
                else:
                    reply.send_error(internal("The server failed while it had this request."))

    def _make_room(self) -> bool:
        """Close the connection that has been idle for longest; return whether there was one. Idle
        connections are collected once per sweep, so that a flood of connections stays cheap."""
        if self._idle is None:
            idle = [connection for connection in self._connections if connection.idle]
            self._idle = sorted(idle, key=lambda connection: connection.deadline, reverse=True)
        while self._idle:
            connection = self._idle.pop()
            if connection.idle:
                connection.close_when_idle()
                self.counters.evicted += 1
                return True
        return False

    def _sweep(self) -> None:
        self._sweeping = self.loop.call_later(self.limits.sweep_seconds, self._sweep)
        self._idle = None
        now = self.loop.time()
        for connection in list(self._connections):
            try:
                connection.check(now)
            except Exception:  # one connection's failure must not end the sweep of the others
                log.exception("a connection could not be looked at")
                connection.abort()


def _possible(limits: HttpLimits, max_body_bytes: int) -> HttpLimits:
    """Return the limits, with `connections` that the process's descriptors allow and `held_bytes`
    for at least two of the largest bodies."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    connections = limits.connections
    if files != resource.RLIM_INFINITY:
        connections = min(connections, int(files * FILES_SHARE))
    return dataclasses.replace(
        limits,
        connections=connections,
        held_bytes=max(limits.held_bytes, 2 * max_body_bytes),
    )
