"""One client's connection to the HTTP server: turns, timeouts, and bytes held.

Requests are answered one at a time. While a pipelined request waits, nothing is read, and no more
of the last read is parsed. The next request does not begin while the client does not read its
answers. So a connection holds at most one request, one answer beyond the transport's high-water
mark, one read, and the requests of one slice.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from typing import Protocol, cast

import httptools

from memserve.api import http_half_closed
from memserve.api.errors import ApiError
from memserve.api.http_half_closed import CONTINUE, HalfClosed
from memserve.api.http_limits import HttpCounters, HttpLimits
from memserve.api.http_message import Reply, Request
from memserve.api.http_parser import MAX_SLICE_BYTES, RequestParser
from memserve.api.http_refusals import timed_out, too_many_bodies, too_many_connections
from memserve.api.local_connection import LocalConnection
from memserve.api.tcp_info import Silence

# Called at the end of a request's head, before its body: returns a refusal, or None. Changes no
# state if it returns None, since the handler checks again.
Admit = Callable[[Request], ApiError | None]

# Memory of a waiting request without its body: a few headers and their objects.
REQUEST_BYTES = 1024
_END_OF_HEAD = b"\r\n\r\n"


class Owner(Protocol):
    """The part of the server that a connection uses."""

    limits: HttpLimits
    counters: HttpCounters
    admit: Admit | None
    max_body_bytes: int
    held_bytes: int  # of unfinished and waiting requests, of all connections
    closing: bool
    loop: asyncio.AbstractEventLoop

    def add(self, connection: Connection) -> bool:
        """Register a connection; return whether there is room for it. `discard` it in any case."""

    def discard(self, connection: Connection) -> None: ...

    def answer(self, request: Request, reply: Reply) -> None:
        """Run the handler."""


class Connection(asyncio.Protocol):
    """One client's connection: the sink of its parser, and the wire of its replies."""

    def __init__(self, server: Owner) -> None:
        self._server = server
        self._now = server.loop.time
        self._parser: RequestParser = cast(RequestParser, None)  # while connected
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)  # once connected
        self._secure = False  # TLS
        self._reply: Reply | None = None  # being answered
        self._began = 0.0  # when its handler began
        self._http_10 = False  # of its request
        self._waiting: deque[Request | ApiError] = deque()  # pipelined behind it
        self._unread = b""  # the last read, not parsed yet from `_at` on
        self._at = 0
        self._held = 0  # this connection's bytes in `Owner.held_bytes`
        self._paused = False
        self._writable = True
        self._last = False  # no further request is taken
        self._discards = False  # received bytes are dropped, since a request was refused
        self.deadline = 0.0  # for the client's next request; valid while none is there
        self._since = 0.0  # since when an unfinished head or body is waited for; 0: none
        self._in_head = True  # `_since` is a head's, not a body's
        self._stalled = 0.0  # since when the client has read nothing
        self._unsent = 0  # bytes in the write buffer at the last check
        self._silence = Silence()
        self._half_closed: HalfClosed | None = None

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._secure = transport.get_extra_info("sslcontext") is not None
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        local = _is_local(transport.get_extra_info("peername"))
        server, limits = self._server, self._server.limits
        self._parser = RequestParser(
            self,
            server.max_body_bytes,
            limits.small_body,
            private=local or self._secure,
            unasked=None if server.admit is None else limits.unasked_body,
            local=LocalConnection() if local else None,
        )
        self.deadline = self._now() + limits.idle_seconds
        if not server.add(self):
            self._last = True
            self._next(too_many_connections())

    def connection_lost(self, error: Exception | None) -> None:
        self._server.discard(self)
        if self._half_closed is not None:
            self._half_closed.cancel()
            self._half_closed = None
        self._waiting.clear()
        self._unread = b""
        self._last = True
        self._parser.close()
        self._hold(0)
        reply, self._reply = self._reply, None  # breaks the reference cycle
        if reply is not None:
            reply.hung_up()

    def data_received(self, data: bytes) -> None:
        if self._last:
            return
        parser = self._parser
        if len(data) > MAX_SLICE_BYTES or self._waiting:
            self._take(data)
        else:
            try:
                parser.feed_data(data)
            except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
                parser.stumbled(data, error)
            if parser.unfinished:
                parser.count(len(data))
        if parser.unfinished:
            self._wait_for_more()

    def eof_received(self) -> bool | None:
        reply = self._reply
        if reply is None or reply.started or self._secure:
            return None  # the transport is closed
        wait = http_half_closed.YOUNG_SECONDS
        young = self._now() < self._began + wait
        if self._http_10 and not young:
            return None
        server = self._server
        half_closed = HalfClosed(server.loop, self._transport, reply, self._departed)
        if self._http_10:
            half_closed.wait(server.limits.half_closed_seconds)
        else:
            half_closed.ask(wait if young else 0.0)
        self._half_closed = half_closed
        server.counters.half_closed += 1
        self._last = True
        self._since = 0.0
        self._parser.stop()
        self._account()
        return True

    def pause_writing(self) -> None:
        self._flow(False)

    def resume_writing(self) -> None:
        self._flow(True)

    # --- the parser's sink

    def requested(self, request: Request) -> None:
        self._last = self._last or not request.keep_alive
        self._since = 0.0
        if self._held:
            self._account()
        if self._reply is None and self._writable and not self._waiting:
            self._begin(request)
        else:
            self._next(request)

    def expects(self) -> None:
        if self._reply is None and not self._waiting:
            self.send(CONTINUE)

    def headed(self, head: Request) -> None:
        server = self._server
        error = None if server.admit is None else server.admit(head)
        if error is not None and not self._last:
            server.counters.turned_away += 1
            self._refuse(error)

    def announced(self, length: int) -> None:
        server = self._server
        room = server.limits.held_bytes - server.held_bytes
        if length > room:
            self._refuse_body()

    def refused(self, error: ApiError) -> None:
        self._server.counters.malformed += 1
        self._refuse(error)

    # --- replies

    def send(self, data: bytes) -> None:
        self._transport.write(data)

    def replied(self, keep_alive: bool) -> None:
        """The reply is complete: begin the next pipelined request, or wait for one, or close."""
        self._reply = None
        if self._transport.is_closing():
            return
        if self._waiting and keep_alive:
            self._go_on()
        elif self._discards and not self._waiting:
            if self._transport.can_write_eof():  # not with TLS
                self._transport.write_eof()
            self._listen(self._server.limits.linger_seconds)
        elif self._last or self._server.closing or not keep_alive:
            self._transport.close()
        elif self._unread:
            self._go_on()
        else:
            self._listen(self._server.limits.idle_seconds)

    @property
    def idle(self) -> bool:
        """Whether closing the connection loses no request and no answer."""
        return (
            self._reply is None
            and not (self._since or self._waiting or self._unread)
            and not self._transport.is_closing()
        )

    def close_when_idle(self) -> None:
        if self._reply is None:
            self._transport.close()

    def abort(self) -> None:
        self._transport.abort()

    def check(self, now: float) -> None:
        """Close the connection, or refuse its request, if a time limit is exceeded."""
        limits, counters = self._server.limits, self._server.counters
        if self._silence.lasts(self._transport, now, limits.silent_seconds):
            counters.silent += 1
            self._transport.abort()
        elif not self._writable or self._transport.is_closing():
            unsent = self._transport.get_write_buffer_size()
            if unsent != self._unsent:
                self._unsent, self._stalled = unsent, now
            elif now > self._stalled + limits.stalled_seconds:
                counters.stalled += 1
                self._transport.abort()
        elif self._since and not self._paused:
            if self._in_head and now > self._since + limits.head_seconds:
                counters.head_timeouts += 1
                self._refuse(timed_out("head"))
            elif not self._in_head and now > (
                self._since + limits.body_seconds + self._parser.body_size / limits.body_rate
            ):
                counters.body_timeouts += 1
                self._refuse(timed_out("body"))
        elif self._reply is None and not self._since and now > self.deadline:
            self._transport.close()

    # --- turns

    def _take(self, data: bytes = b"") -> None:
        """Parse until a request waits; keep the rest for later."""
        if self._unread:
            data = self._unread[self._at :] + data if data else self._unread
        else:
            self._at = 0
        at, view, parser = self._at, memoryview(data), self._parser
        size = len(data)
        while at < size and not self._waiting and not self._last:
            if parser.unfinished:
                end = at + (parser.missing or MAX_SLICE_BYTES)
            else:  # up to a head's end, so that its body is fed as one part
                end = at + MAX_SLICE_BYTES
                found = data.find(_END_OF_HEAD, at, end)
                if found >= 0:
                    end = found + len(_END_OF_HEAD)
            parser.feed(view[at:end])
            at = end
        if at >= size or self._last:
            self._unread = b""
        else:
            self._unread, self._at = data, at
            self._pause()
            self._account()

    def _next(self, work: Request | ApiError) -> None:
        if self._reply is None and self._writable and not self._waiting:
            self._begin(work)
            return
        self._waiting.append(work)
        self._pause()
        self._account()

    def _begin(self, work: Request | ApiError) -> None:
        if isinstance(work, ApiError):
            nothing = Request("GET", "", b"", [], b"", False, False, b"")
            self._reply = reply = Reply(self, nothing, self._writable)
            reply.send_error(work)
            return
        self._http_10 = work.http_10
        self._began = self._now()
        self._reply = reply = Reply(self, work, self._writable)
        self._server.answer(work, reply)

    def _go_on(self) -> None:
        """Begin waiting requests and parse received bytes; then read on."""
        while self._reply is None and self._writable and (self._waiting or self._unread):
            if self._waiting:
                self._begin(self._waiting.popleft())
            else:
                self._take()
                if self._parser.unfinished:
                    self._wait_for_more()
        if self._held:
            self._account()
        if not (self._waiting or self._unread or self._last) and self._writable:
            self._listen(self._server.limits.idle_seconds)

    def _listen(self, seconds: float) -> None:
        self.deadline = self._now() + seconds
        if self._paused:
            self._paused = False
            if self._since:  # the time without reading does not count
                self._since = self._now()
            self._transport.resume_reading()

    def _pause(self) -> None:
        if not self._paused and not self._transport.is_closing():
            self._paused = True
            self._transport.pause_reading()

    def _flow(self, writable: bool) -> None:
        self._writable = writable
        self._stalled = self._now()
        if self._reply is not None:
            self._reply.writable = writable
            if self._reply.on_flow is not None:
                self._reply.on_flow(not writable)
        elif writable and (self._waiting or not self._last):
            self._go_on()

    # --- unfinished and refused requests

    def _wait_for_more(self) -> None:
        """Start the time limit of an unfinished head or body, and count its bytes."""
        parser = self._parser
        if not self._since or self._in_head != parser.in_head:
            self._since = self._now()
            self._in_head = parser.in_head
        parser.gather()
        self._account()

    def _account(self) -> None:
        """Update the bytes held; refuse a body if all connections hold too many."""
        held = self._parser.held + len(self._unread)
        for work in self._waiting:
            held += REQUEST_BYTES if isinstance(work, ApiError) else REQUEST_BYTES + len(work.body)
        self._hold(held)
        server = self._server
        if held > server.limits.small_body and server.held_bytes > server.limits.held_bytes:
            self._refuse_body()

    def _hold(self, size: int) -> None:
        self._server.held_bytes += size - self._held
        self._held = size

    def _refuse_body(self) -> None:
        if not self._last:
            self._server.counters.bodies_refused += 1
            self._refuse(too_many_bodies())

    def _refuse(self, error: ApiError) -> None:
        """Answer with an error behind the waiting requests, and take no further request."""
        if self._last:
            return
        self._last = self._discards = True
        self._since = 0.0
        self._unread = b""
        self._parser.stop()
        self._next(error)
        if self._held:
            self._account()

    def _departed(self) -> None:
        self._server.counters.departed += 1
        self._transport.abort()


def _is_local(peer: object) -> bool:
    """Return whether a peer's address is loopback; Unix sockets have no address, and count, too."""
    if not isinstance(peer, tuple):
        return True
    host = str(peer[0]).removeprefix("::ffff:")
    return host == "::1" or host.startswith("127.")
