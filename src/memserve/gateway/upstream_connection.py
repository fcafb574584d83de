"""One keep-alive connection to an instance: a call at a time, its answer passed on as it comes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from http import HTTPStatus
from typing import Protocol, cast

import httptools

from memserve.api.local_connection import CONNECTION_HEADER
from memserve.api.signatures import PROOF_HEADER, Signed, Signer
from memserve.hosts import is_loopback

_UNAUTHORIZED = HTTPStatus.UNAUTHORIZED.value


class Unreachable(Exception):
    """The instance could not be reached, or broke off its answer."""


class Stale(Unreachable):
    """The instance had closed an idle connection: the call can be made again."""


class Challenged(Unreachable):
    """A 401: the call was signed for another life of the instance, which has not run it."""

    def __init__(self, challenge: bytes, proof: bytes | None, signed: Signed) -> None:
        super().__init__("the instance does not take this gateway's signature")
        self.told = challenge.decode("latin-1"), proof, signed


class Flow(Protocol):
    """Flow control of an answer's source."""

    def pause(self) -> None:
        """Read no more for now: the answer's receiver is slow."""

    def resume(self) -> None: ...


class Sink(Protocol):
    """Receiver of an answer. Called from the event loop; raises nothing."""

    def begin(self, flow: Flow) -> None:
        """The call is about to be sent."""

    def head(self, status: int, retry_after: bytes | None, media: bytes | None) -> None: ...

    def received(self, data: bytes, last: bool) -> None:
        """Take the body's bytes of one read. `last`: the answer is complete; comes once, maybe
        without bytes."""


class Connection(asyncio.Protocol):
    """One connection, with the callbacks of asyncio and httptools."""

    def __init__(self, loop: asyncio.AbstractEventLoop, signer: Signer | None) -> None:
        """`signer`: checks the proofs of answers to signed calls."""
        self._loop = loop
        self._signer = signer
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)  # until connected
        self._parser = httptools.HttpResponseParser(self)
        self._sink: Sink | None = None
        self._done: asyncio.Future[None] | None = None
        self._pieces: list[bytes] = []  # parts of the body in one read
        self._retry_after: bytes | None = None
        self._media: bytes | None = None  # content-type
        self._answered = False  # a byte of the current answer has come
        self._complete = False
        self._paused = False
        self._calls = 0
        self._signed: Signed | None = None
        self._proof: bytes | None = None
        self._challenge = b""
        self.local = False  # within this machine
        self.token = b""  # the last connection token from the instance; see `local_connection`
        self.authorization = b""  # header line with the token; empty: calls are signed
        self.reusable = True
        self.idle_since = 0.0

    async def exchange(self, request: Sequence[bytes], sink: Sink, signed: Signed | None) -> None:
        """Send a request and wait for the whole answer. Raises Unreachable: Stale if another
        connection may do, Challenged for a 401."""
        self._sink = sink
        self._signed = signed
        self._answered = self._complete = False
        self._retry_after = self._media = self._proof = None
        self._challenge = b""
        self._calls += 1
        done = self._done = self._loop.create_future()
        sink.begin(self)
        if len(request) == 1:
            self._transport.write(request[0])
        else:
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
        self.local = is_loopback(sock.getpeername()[0])

    def data_received(self, data: bytes) -> None:
        sink = self._sink
        if sink is None:  # bytes without a request
            self.abort()
            return
        self._answered = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(Unreachable(f"not an answer: {error}"))
            return
        pieces = self._pieces
        if self._done is None or self._done.done():  # the head's proof was not valid
            pieces.clear()
        elif pieces or self._complete:
            body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            pieces.clear()
            sink.received(body, self._complete)
        if self._complete and self._done is not None and not self._done.done():
            self._done.set_result(None)

    def eof_received(self) -> None:
        """The instance has hung up: the transport is closed."""

    def connection_lost(self, error: Exception | None) -> None:
        self.reusable = False
        kind = Unreachable if self._answered or self._calls == 1 else Stale
        self._fail(kind(f"the connection was lost: {error or 'closed'}"))

    def _fail(self, error: Unreachable) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)
        if self.reusable:
            self.abort()

    # --- httptools' callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"retry-after":
            self._retry_after = value
        elif name == b"content-type":
            self._media = value
        elif name == PROOF_HEADER:
            self._proof = value
        elif name == b"www-authenticate":
            self._challenge = value
        elif name == CONNECTION_HEADER:
            self.token = value

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if self._signed is not None and (failure := self._failure(status, self._signed)):
            self._fail(failure)
        elif self.authorization and status == _UNAUTHORIZED:
            self._fail(Unreachable("the instance does not know this connection any more"))
        elif self._sink is not None:
            self._sink.head(status, self._retry_after, self._media)

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)

    def on_message_complete(self) -> None:
        self._complete = True
        self.reusable = self.reusable and self._parser.should_keep_alive()

    def _failure(self, status: int, signed: Signed) -> Unreachable | None:
        """Return why an answer with this head is not trusted; None: it is."""
        if status == _UNAUTHORIZED:
            return Challenged(self._challenge, self._proof, signed)
        if self._signer is None or not self._signer.proves(signed, status, self._proof):
            return Unreachable("whoever answers there does not have the cluster's secret")
        return None
