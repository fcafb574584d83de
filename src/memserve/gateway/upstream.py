"""Calls to instances, on keep-alive connections that are kept for the next ones."""

from __future__ import annotations

import asyncio
import hmac
import ssl
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from memserve.api import msgpack
from memserve.api.audience import origin_of
from memserve.api.generate import GENERATE_PATH
from memserve.api.peer_client import CONNECT_SECONDS
from memserve.api.serving import IDLE_CONNECTION_SECONDS
from memserve.api.signatures import SCHEME, Signer, body_digest, digest_of
from memserve.api.tls import unchecked_tls
from memserve.gateway.upstream_connection import (
    Challenged,
    Connection,
    Flow,
    Sink,
    Stale,
    Unreachable,
)
from memserve.hosts import is_loopback

_TARGET = GENERATE_PATH.encode()
_INFO = b"/info"  # a cheap request that needs a signature
_NOTHING = body_digest(b"")
ONE_WRITE_BYTES = 64 * 1024  # up to here copying a body costs less than writing two buffers


@dataclass(slots=True)
class _Target:
    """An instance's address, and idle connections to it, the most recently used one last."""

    host: str
    port: int
    tls: ssl.SSLContext | bool | None
    origin: str
    netloc: bytes
    head: bytes  # a call's request head, up to the value of content-length
    idle: list[Connection] = field(default_factory=list)

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
        except Challenged as error:
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

    async def _exchange(self, target: _Target, body: bytes, sink: Sink, lines: bytes) -> Connection:
        """Make the call; return the connection that it was made on."""
        connection = self._idle(target)
        if connection is not None:
            try:
                await self._post(connection, target, body, sink, lines)
                return connection
            except Stale:
                pass
        connection = await self._connect(target)
        await self._post(connection, target, body, sink, lines)
        return connection

    async def _post(
        self, connection: Connection, target: _Target, body: bytes, sink: Sink, lines: bytes
    ) -> None:
        signed, line = None, connection.authorization
        if self._signer is not None and not line:
            signed = self._signer.sign(target.origin, b"POST", _TARGET, await digest_of(body))
            line = _authorization(signed.authorization)
        head = b"%b%d\r\n%b%b\r\n" % (target.head, len(body), line, lines)
        one_write = len(body) <= ONE_WRITE_BYTES
        await connection.exchange((head + body,) if one_write else (head, body), sink, signed)

    def _idle(self, target: _Target) -> Connection | None:
        oldest = time.monotonic() - IDLE_CONNECTION_SECONDS
        while target.idle:
            connection = target.idle.pop()
            if connection.idle_since < oldest:  # the ones below are older still
                connection.abort()
                target.hang_up()
            elif connection.reusable:
                return connection
        return None

    async def _connect(self, target: _Target) -> Connection:
        """Return a connection to a process that has proved to have the cluster's secret: prompts
        go to no other."""
        connection = await self._open(target)
        if self._signer is None:
            return connection
        try:
            await _prove(connection, target, self._signer)
        except Challenged as error:
            if not self._signer.learn(target.origin, *error.told):
                raise
            connection = await self._open(target)
            await _prove(connection, target, self._signer)
        return connection

    async def _open(self, target: _Target) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                _, connection = await loop.create_connection(
                    lambda: Connection(loop, self._signer),
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


async def _prove(connection: Connection, target: _Target, signer: Signer) -> None:
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
