"""An HTTP/1.1 server on asyncio protocols.

A handler gets requests whole, one at a time for each connection; what a client pipelines waits,
and it is not read from meanwhile. What breaks HTTP or the limits is answered in OpenAI's shape.

Order of the limits: a client's idle connection (IDLE_CONNECTION_SECONDS) is closed by the
client before the server would (SERVER_KEEP_ALIVE_SECONDS), so that no request meets a
connection that is just being closed. What follows a refused request is thrown away for
LINGER_SECONDS, since a client that is still sending would lose the refusal with the connection.
A client that reads nothing of what waits for it has STALLED_SECONDS, as it keeps what answers it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Callable, Coroutine
from http import HTTPStatus
from typing import cast
from urllib.parse import unquote

import httptools

from memserve.api.errors import ApiError, body_too_large, internal
from memserve.api.http_message import Header, Reply, Request

SERVER_KEEP_ALIVE_SECONDS = 75.0  # without a byte from a client that has the word
LINGER_SECONDS = 30.0
STALLED_SECONDS = 300.0
SWEEP_SECONDS = 5.0  # how often connections are looked through for these three
MAX_HEAD_BYTES = 64 * 1024  # of request line and headers

Handler = Callable[[Request, Reply], Coroutine[object, object, None]]


class HttpServer:
    """Serves one handler. Call `close` before the loop ends."""

    def __init__(self, handler: Handler, max_body_bytes: int) -> None:
        self.handler = handler
        self.max_body_bytes = max_body_bytes
        self._connections: set[Connection] = set()
        self._empty = asyncio.Event()
        self.closing = False
        self.loop = asyncio.get_running_loop()
        self._server: asyncio.Server | None = None
        self._sweeping: asyncio.TimerHandle | None = None
        self._tasks: dict[Reply, asyncio.Task[None]] = {}  # the loop's references are weak

    async def start(self, sock: socket.socket, backlog: int) -> None:
        """Accept connections on a listening socket, which the server owns from now on."""
        self._server = await self.loop.create_server(
            lambda: Connection(self), sock=sock, backlog=backlog
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

    def add(self, connection: Connection) -> None:
        self._connections.add(connection)

    def discard(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if self.closing and not self._connections:
            self._empty.set()

    def answer(self, request: Request, reply: Reply) -> None:
        """Run the handler."""
        self._tasks[reply] = self.loop.create_task(self._answer(request, reply))

    async def _answer(self, request: Request, reply: Reply) -> None:
        try:
            await self.handler(request, reply)
        finally:
            # What the handler has raised, asyncio logs; its client does not wait for ever.
            del self._tasks[reply]
            if not reply.ended:
                if reply.started:
                    reply.abort()
                else:
                    reply.send_error(internal("The server failed while it had this request."))

    def _sweep(self) -> None:
        now = self.loop.time()
        for connection in list(self._connections):
            connection.check(now)
        self._sweeping = self.loop.call_later(SWEEP_SECONDS, self._sweep)


class Connection(asyncio.Protocol):
    """One client's connection; the parser calls it back."""

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._limit = server.max_body_bytes
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)  # until connected
        self._reply: Reply | None = None  # being answered
        self._waiting: deque[Request | ApiError] = deque()  # pipelined behind it
        self._paused = False
        self._writable = True
        self._last = False  # no further request is taken
        self._discards = False  # what comes is thrown away: something was refused
        self._deadline = 0.0  # while the client has the word
        self._stalled = 0.0  # since when nothing more can be written
        # Of the request that is being read:
        self._url = b""
        self._headers: list[Header] = []
        self._body: list[bytes] = []
        self._size = 0  # of its head, then of its body
        self._silent = 0  # bytes that the parser has kept to itself
        self._in_head = True
        self._keep_alive = True

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._server.add(self)
        self._deadline = self._server.loop.time() + SERVER_KEEP_ALIVE_SECONDS

    def connection_lost(self, error: Exception | None) -> None:
        self._server.discard(self)
        self._waiting.clear()
        if self._reply is not None:
            self._reply.hung_up()

    def data_received(self, data: bytes) -> None:
        if self._last:
            return
        self._silent += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # The request is served without what it wanted to upgrade to.
            self._last = True
        except httptools.HttpParserError as error:
            self._refuse(ApiError(HTTPStatus.BAD_REQUEST, f"Not HTTP/1.1: {error}"))
        if self._silent > MAX_HEAD_BYTES:
            self._refuse(_head_too_large())
        if self._reply is None and not self._last:
            self._deadline = self._server.loop.time() + SERVER_KEEP_ALIVE_SECONDS

    def eof_received(self) -> None:
        """A client that has finished sending has left: the transport is closed."""

    def pause_writing(self) -> None:
        self._flow(False)

    def resume_writing(self) -> None:
        self._flow(True)

    # --- httptools' callbacks

    def on_message_begin(self) -> None:
        self._url = b""
        self._headers = []
        self._body = []
        self._size = self._silent = 0
        self._in_head = True

    def on_url(self, url: bytes) -> None:
        self._silent = 0
        self._size += len(url)
        if self._size > MAX_HEAD_BYTES:
            self._refuse(_head_too_large())
        else:
            self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return  # a trailer: nobody has asked for it
        self._silent = 0
        self._size += len(name) + len(value)
        if self._size > MAX_HEAD_BYTES:
            self._refuse(_head_too_large())
        else:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._size = self._silent = 0
        self._keep_alive = self._parser.should_keep_alive()
        expects = False
        for name, value in self._headers:
            if name == b"content-length" and int(value) > self._limit:
                self._refuse(body_too_large(self._limit))
            elif name == b"expect":
                expects = value.lower() == b"100-continue"
        if expects and not self._last and self._reply is None:
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._silent = 0
        self._size += len(body)
        if self._size > self._limit:
            self._body = []
            self._refuse(body_too_large(self._limit))
        elif not self._discards:
            self._body.append(body)

    def on_message_complete(self) -> None:
        self._silent = 0
        if self._last:
            return
        body = self._body
        path, _, query = self._url.partition(b"?")
        if not path.startswith(b"/"):
            path = _path_of(path)
        self._last = not self._keep_alive
        self._next(
            Request(
                self._parser.get_method().decode("ascii"),
                unquote(path.decode("latin-1")) if b"%" in path else path.decode("latin-1"),
                query,
                self._headers,
                body[0] if len(body) == 1 else b"".join(body),
                self._parser.get_http_version() == "1.0",
                self._keep_alive,
                self._url,
            )
        )

    # --- replies

    def send(self, data: bytes) -> None:
        self._transport.write(data)

    def replied(self, keep_alive: bool) -> None:
        """The reply is complete: the client, or what it has pipelined, has the word."""
        self._reply = None
        if self._transport.is_closing():
            return
        if self._waiting and keep_alive:
            self._begin(self._waiting.popleft())
        elif self._discards and not self._waiting:
            self._transport.write_eof()
            self._listen(LINGER_SECONDS)
        elif self._last or self._server.closing or not keep_alive:
            self._transport.close()
        else:
            self._listen(SERVER_KEEP_ALIVE_SECONDS)

    def close_when_idle(self) -> None:
        if self._reply is None:
            self._transport.close()

    def abort(self) -> None:
        self._transport.abort()

    def check(self, now: float) -> None:
        """Close a connection that its client has kept for too long."""
        if not self._writable and now > self._stalled + STALLED_SECONDS:
            self._transport.abort()
        elif self._reply is None and now > self._deadline:
            self._transport.close()

    def _listen(self, seconds: float) -> None:
        self._deadline = self._server.loop.time() + seconds
        if self._paused:
            self._paused = False
            self._transport.resume_reading()

    def _next(self, work: Request | ApiError) -> None:
        if self._reply is None:
            self._begin(work)
            return
        self._waiting.append(work)
        if not self._paused and not self._transport.is_closing():
            self._paused = True
            self._transport.pause_reading()

    def _begin(self, work: Request | ApiError) -> None:
        if isinstance(work, ApiError):
            nothing = Request("GET", "", b"", [], b"", False, False, b"")
            self._reply = reply = Reply(self, nothing, self._writable)
            reply.send_error(work)
            return
        self._reply = reply = Reply(self, work, self._writable)
        self._server.answer(work, reply)

    def _refuse(self, error: ApiError) -> None:
        """Answer what cannot be read, and read no more."""
        if not self._last:
            self._last = self._discards = True
            self._next(error)

    def _flow(self, writable: bool) -> None:
        self._writable = writable
        self._stalled = self._server.loop.time()
        if self._reply is not None:
            self._reply.writable = writable
            if self._reply.on_flow is not None:
                self._reply.on_flow(not writable)


def _head_too_large() -> ApiError:
    return ApiError(
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
        f"The request's line and headers are larger than {MAX_HEAD_BYTES} bytes.",
        code="headers_too_large",
    )


def _path_of(url: bytes) -> bytes:
    """The path of a whole URL, as proxies send them; anything else as it is."""
    try:
        return httptools.parse_url(url).path or b"/"
    except httptools.HttpParserInvalidURLError:
        return url
