"""An HTTP/1.1 server on asyncio protocols.

A handler gets requests whole, one at a time for each connection. What breaks HTTP or the limits
is answered in OpenAI's shape. `http_connection` has whose turn it is and how long; `http_parser`
what a request is; `http_limits` what clients may cost.
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

# Of the descriptors that the process may have, clients get so many: a request that is passed on
# takes another one, and the rest is for what the process itself opens.
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
        """`counters` are those to count in, if others read them. `admit` is asked for requests
        whose bodies are larger than `HttpLimits.unasked_body`, or of unknown size, before any of
        the body is kept."""
        self.handler = handler
        self.admit = admit
        self.max_body_bytes = max_body_bytes
        self.limits = _possible(limits or HttpLimits(), max_body_bytes)
        self.counters = counters or HttpCounters()
        self.held_bytes = 0  # now; see HttpLimits
        self._connections: set[Connection] = set()
        self._idle: list[Connection] | None = None  # longest at the end, as of the last sweep
        self._empty = asyncio.Event()
        self.closing = False
        self.loop = asyncio.get_running_loop()
        self._server: asyncio.Server | None = None
        self._sweeping: asyncio.TimerHandle | None = None
        self._tasks: dict[Reply, asyncio.Task[None]] = {}  # the loop's references are weak

    @property
    def connections(self) -> int:
        """Those that are open."""
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
        """Accept no more; connections that are busy have so long to end."""
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
        """A connection tells that it is there; whether there is room for it."""
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
            del request  # its body is kept by whoever needs it, and not until the answer's end
            await work
        finally:
            # What the handler has raised, asyncio logs; its client does not wait for ever.
            del self._tasks[reply]
            if not reply.ended:
                if reply.started:
                    reply.abort()
                else:
                    reply.send_error(internal("The server failed while it had this request."))

    def _make_room(self) -> bool:
        """Close the connection that has been idle for longest. Those that are idle are looked for
        once a sweep: a flood of connections does not make each of them expensive."""
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
            except Exception:  # one connection's trouble must not keep all others for ever
                log.exception("a connection could not be looked at")
                connection.abort()


def _possible(limits: HttpLimits, max_body_bytes: int) -> HttpLimits:
    """The limits, as far as the process and its own bodies allow."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    connections = limits.connections
    if files != resource.RLIM_INFINITY:
        connections = min(connections, int(files * FILES_SHARE))
    return dataclasses.replace(
        limits,
        connections=connections,
        held_bytes=max(limits.held_bytes, 2 * max_body_bytes),
    )
