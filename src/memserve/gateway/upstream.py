"""Connections to instances: kept alive, one call at a time on each, answers read as they come."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools

from memserve.api.generate import GENERATE_PATH
from memserve.api.http_client import CONNECT_SECONDS
from memserve.api.serving import IDLE_CONNECTION_SECONDS


class Unreachable(Exception):
    """An instance that could not be reached, or broke off its answer."""


class _Stale(Unreachable):
    """A kept connection that the instance had closed already: nothing was lost."""


class Flow(Protocol):
    """Where an answer comes from."""

    def pause(self) -> None:
        """Read no more: whoever the answer goes to is slow."""

    def resume(self) -> None: ...


class Sink(Protocol):
    """Where an answer goes. Called from the event loop; raises nothing."""

    def begin(self, flow: Flow) -> None:
        """The call is on its way."""

    def head(self, status: int, retry_after: bytes | None) -> None: ...

    def received(self, data: bytes, last: bool) -> None:
        """Bytes of the body, as many as came at once. With `last`, which comes once and maybe
        without bytes, the answer is complete."""


@dataclass(slots=True)
class _Target:
    """An instance's address, and the idle connections to it, the last used one at the end."""

    host: str
    port: int
    head: bytes  # of a call, up to the length of its body
    idle: list[_Connection] = field(default_factory=list)


class Upstream:
    """Calls instances by address. Owns the connections; one event loop's."""

    def __init__(self) -> None:
        self._targets: dict[str, _Target] = {}
        self._closed = False

    async def call(self, address: str, body: bytes, sink: Sink) -> None:
        """POST a call; returns when its answer is complete. Cancelled, it hangs up at once.

        Raises Unreachable when the connection cannot be made or breaks.
        """
        target = self._targets.get(address) or self._new_target(address)
        request = (b"%b%d\r\n\r\n" % (target.head, len(body)), body)
        connection = self._idle(target)
        if connection is not None:
            try:
                await connection.exchange(request, sink)
            except _Stale:
                connection = None
        if connection is None:
            connection = await self._connect(target)
            await connection.exchange(request, sink)
        if connection.reusable and not self._closed:
            connection.idle_since = time.monotonic()
            target.idle.append(connection)
        else:
            connection.abort()

    def close(self) -> None:
        self._closed = True
        for target in self._targets.values():
            for connection in target.idle:
                connection.abort()
            target.idle.clear()

    def _idle(self, target: _Target) -> _Connection | None:
        oldest = time.monotonic() - IDLE_CONNECTION_SECONDS
        while target.idle:
            connection = target.idle.pop()
            if connection.idle_since < oldest:  # and so are all below it
                for other in (connection, *target.idle):
                    other.abort()
                target.idle.clear()
            elif connection.reusable:
                return connection
        return None

    async def _connect(self, target: _Target) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                _, connection = await loop.create_connection(
                    lambda: _Connection(loop), target.host, target.port
                )
        except TimeoutError as error:
            raise Unreachable(f"no connection within {CONNECT_SECONDS} s") from error
        except OSError as error:
            raise Unreachable(f"no connection: {error}") from error
        return connection

    def _new_target(self, address: str) -> _Target:
        parts = urlsplit(address)
        head = (
            f"POST {GENERATE_PATH} HTTP/1.1\r\nhost: {parts.netloc}\r\n"
            "content-type: application/json\r\ncontent-length: "
        ).encode()
        target = _Target(parts.hostname or "", parts.port or 80, head)
        self._targets[address] = target
        return target


class _Connection(asyncio.Protocol):
    """One connection; the parser calls it back."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)  # until connected
        self._parser = httptools.HttpResponseParser(self)
        self._sink: Sink | None = None
        self._done: asyncio.Future[None] | None = None
        self._pieces: list[bytes] = []  # of the body, from one read
        self._retry_after: bytes | None = None
        self._answered = False  # a byte of the current answer has come
        self._complete = False
        self._paused = False
        self._calls = 0
        self.reusable = True
        self.idle_since = 0.0

    async def exchange(self, request: Sequence[bytes], sink: Sink) -> None:
        """Raises Unreachable; _Stale where it makes sense to try on a new connection."""
        self._sink = sink
        self._answered = self._complete = False
        self._retry_after = None
        self._calls += 1
        done = self._done = self._loop.create_future()
        sink.begin(self)
        self._transport.writelines(request)
        try:
            await done
        except asyncio.CancelledError:
            self.abort()
            raise
        finally:
            self._sink = self._done = None
            self.resume()

    def abort(self) -> None:
        self.reusable = False
        self._transport.abort()

    # --- Flow

    def pause(self) -> None:
        if not self._paused and not self._transport.is_closing():
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            if not self._transport.is_closing():
                self._transport.resume_reading()

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        sink = self._sink
        if sink is None:  # nobody has asked
            self.abort()
            return
        self._answered = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(Unreachable(f"not an answer: {error}"))
            return
        pieces = self._pieces
        if pieces or self._complete:
            body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            pieces.clear()
            sink.received(body, self._complete)
        if self._complete and self._done is not None and not self._done.done():
            self._done.set_result(None)

    def eof_received(self) -> None:
        """The instance has hung up: the transport is closed."""

    def connection_lost(self, error: Exception | None) -> None:
        self.reusable = False
        kind = Unreachable if self._answered or self._calls == 1 else _Stale
        self._fail(kind(f"the connection was lost: {error or 'closed'}"))

    def _fail(self, error: Unreachable) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)
        if self.reusable:
            self.abort()

    # --- httptools' callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"retry-after":
            self._retry_after = value

    def on_headers_complete(self) -> None:
        if self._sink is not None:
            self._sink.head(self._parser.get_status_code(), self._retry_after)

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)

    def on_message_complete(self) -> None:
        self._complete = True
        self.reusable = self.reusable and self._parser.should_keep_alive()
