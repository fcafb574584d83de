"""Keep-alive connections to instances: one call at a time on each, answers read as they come."""

from __future__ import annotations

import asyncio
import hmac
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools

from memserve.api import msgpack
from memserve.api.audience import origin_of
from memserve.api.generate import GENERATE_PATH
from memserve.api.local_connection import CONNECTION_HEADER
from memserve.api.peer_client import CONNECT_SECONDS
from memserve.api.serving import IDLE_CONNECTION_SECONDS
from memserve.api.signatures import PROOF_HEADER, SCHEME, Signed, Signer, body_digest, digest_of
from memserve.api.tls import unchecked_tls
from memserve.hosts import is_loopback

_TARGET = GENERATE_PATH.encode()
_INFO = b"/info"  # a cheap request that needs a signature
_NOTHING = body_digest(b"")
_UNAUTHORIZED = HTTPStatus.UNAUTHORIZED.value
ONE_WRITE_BYTES = 64 * 1024  # up to here copying a body costs less than writing two buffers


class Unreachable(Exception):
    """The instance could not be reached, or broke off its answer."""


class _Stale(Unreachable):
    """The instance had closed an idle connection: the call can be made again."""


class _Challenged(Unreachable):
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


@dataclass(slots=True)
class _Target:
    """An instance's address, and idle connections to it, the most recently used one last."""

    host: str
    port: int
    tls: ssl.SSLContext | bool | None
    origin: str
    netloc: bytes
    head: bytes  # a call's request head, up to the value of content-length
    idle: list[_Connection] = field(default_factory=list)

    def hang_up(self) -> None:
        """Close the idle connections."""
        for connection in self.idle:
            connection.abort()
        self.idle.clear()


class _Unheard:
    """Sink that drops an answer whose proof alone is of interest."""

    def begin(self, flow: Flow) -> None:
        pass

    def head(self, status: int, retry_after: bytes | None, media: bytes | None) -> None:
        pass

    def received(self, data: bytes, last: bool) -> None:
        pass


class Upstream:
    """Calls instances by address. Owns the connections. Belongs to one event loop."""

    def __init__(self, signer: Signer | None, tls: ssl.SSLContext | None = None) -> None:
        """`signer`, `tls`: as in `PeerClient`, which has the same signer."""
        self._signer = signer
        self._tls: ssl.SSLContext | bool = True if tls is None else tls
        self._within = unchecked_tls()
        self._targets: dict[str, _Target] = {}
        self._closed = False

    async def call(self, address: str, body: bytes, sink: Sink, lines: bytes = b"") -> None:
        """POST a call, with more header `lines`, not signed; return when `sink` has the whole
        answer. A cancellation closes the connection at once. Raises Unreachable."""
        target = self._targets.get(address) or self._new_target(address)
        try:
            connection = await self._exchange(target, body, sink, lines)
        except _Challenged as error:
            if self._signer is None or not self._signer.learn(target.origin, *error.told):
                raise
            connection = await self._exchange(target, body, sink, lines)
        kept = self._targets.get(address) is target
        if connection.reusable and kept and not self._closed:
            connection.idle_since = time.monotonic()
            target.idle.append(connection)
        else:
            connection.abort()

    def forget(self, address: str) -> None:
        """Drop an address and its idle connections."""
        target = self._targets.pop(address, None)
        if target is not None:
            target.hang_up()

    def close(self) -> None:
        self._closed = True
        for target in self._targets.values():
            target.hang_up()

    async def _exchange(
        self, target: _Target, body: bytes, sink: Sink, lines: bytes
    ) -> _Connection:
        """Make the call; return the connection that it was made on."""
        connection = self._idle(target)
        if connection is not None:
            try:
                await self._post(connection, target, body, sink, lines)
                return connection
            except _Stale:
                pass
        connection = await self._connect(target)
        await self._post(connection, target, body, sink, lines)
        return connection

    async def _post(
        self, connection: _Connection, target: _Target, body: bytes, sink: Sink, lines: bytes
    ) -> None:
        signed, line = None, connection.authorization
        if self._signer is not None and not line:
            signed = self._signer.sign(target.origin, b"POST", _TARGET, await digest_of(body))
            line = _authorization(signed.authorization)
        head = b"%b%d\r\n%b%b\r\n" % (target.head, len(body), line, lines)
        one_write = len(body) <= ONE_WRITE_BYTES
        await connection.exchange((head + body,) if one_write else (head, body), sink, signed)

    def _idle(self, target: _Target) -> _Connection | None:
        oldest = time.monotonic() - IDLE_CONNECTION_SECONDS
        while target.idle:
            connection = target.idle.pop()
            if connection.idle_since < oldest:  # the ones below are older still
                connection.abort()
                target.hang_up()
            elif connection.reusable:
                return connection
        return None

    async def _connect(self, target: _Target) -> _Connection:
        """Return a connection to a process that has proved to have the cluster's secret: prompts
        go to no other."""
        connection = await self._open(target)
        if self._signer is None:
            return connection
        try:
            await _prove(connection, target, self._signer)
        except _Challenged as error:
            if not self._signer.learn(target.origin, *error.told):
                raise
            connection = await self._open(target)
            await _prove(connection, target, self._signer)
        return connection

    async def _open(self, target: _Target) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                _, connection = await loop.create_connection(
                    lambda: _Connection(loop, self._signer),
                    target.host,
                    target.port,
                    ssl=target.tls,
                )
        except TimeoutError as error:
            raise Unreachable(f"no connection within {CONNECT_SECONDS} s") from error
        except (OSError, ValueError) as error:  # ValueError: not a valid host name
            raise Unreachable(f"no connection: {error}") from error
        return connection

    def _new_target(self, address: str) -> _Target:
        try:
            parts = urlsplit(address)
            origin = origin_of(address)
            port = parts.port
        except ValueError as error:
            raise Unreachable(f"{address!r} is no address") from error
        head = (
            f"POST {GENERATE_PATH} HTTP/1.1\r\nhost: {parts.netloc}\r\n"
            f"content-type: {msgpack.MEDIA}\r\ncontent-length: "
        ).encode()
        netloc = parts.netloc.encode()
        secure = parts.scheme == "https"
        tls = self._within if is_loopback(parts.hostname or "") else self._tls
        port = port or (443 if secure else 80)
        target = _Target(parts.hostname or "", port, tls if secure else None, origin, netloc, head)
        self._targets[address] = target
        return target


async def _prove(connection: _Connection, target: _Target, signer: Signer) -> None:
    """Have the process at the other end prove that it has the secret. Raises Unreachable."""
    signed = signer.sign(target.origin, b"GET", _INFO, _NOTHING)
    head = b"GET %b HTTP/1.1\r\nhost: %b\r\n%b\r\n"
    request = head % (_INFO, target.netloc, _authorization(signed.authorization))
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            await connection.exchange((request,), _Unheard(), signed)
    except TimeoutError as error:
        raise Unreachable(f"no answer within {CONNECT_SECONDS} s") from error
    if not connection.reusable:
        raise Unreachable("the connection was closed")
    token = signer.connection_token(signed)
    if connection.local and hmac.compare_digest(connection.token, token):
        connection.authorization = _authorization(SCHEME + token)


def _authorization(value: bytes) -> bytes:
    return b"authorization: %b\r\n" % value


class _Connection(asyncio.Protocol):
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
        """Send a request and wait for the whole answer. Raises Unreachable: _Stale if another
        connection may do, _Challenged for a 401."""
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
        kind = Unreachable if self._answered or self._calls == 1 else _Stale
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
            return _Challenged(self._challenge, self._proof, signed)
        if self._signer is None or not self._signer.proves(signed, status, self._proof):
            return Unreachable("whoever answers there does not have the cluster's secret")
        return None
