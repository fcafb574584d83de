"""A connection within the machine is proven once; nothing else is taken for that."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from memserve.api import http_connection
from memserve.api.audience import Audience
from memserve.api.guard import Guard
from memserve.api.http_message import Reply, Request
from memserve.api.http_server import HttpServer
from memserve.api.serving import bind, url_of
from memserve.api.signatures import Signer, Verifier, body_digest
from memserve.gateway import upstream_connection
from memserve.gateway.upstream import Upstream
from memserve.gateway.upstream_connection import Flow, Unreachable
from memserve.secrets import Secret

SECRET = Secret(("of the cluster",))
BODY = b"{}"


class Server:
    """Answers what it lets in with its body, and keeps what each request came with."""

    def __init__(self) -> None:
        self.sock = bind("127.0.0.1", 0)
        self.url = url_of(self.sock)
        audience = Audience()
        audience.add_socket(self.sock)
        self.verifier = Verifier(SECRET, audience)
        self.seen: list[bytes] = []
        self.status = 200

    async def handle(self, request: Request, reply: Reply) -> None:
        self.seen.append(request.header(b"authorization") or b"")
        reply.send(self.status, request.body)


@asynccontextmanager
async def serving() -> AsyncIterator[Server]:
    made = Server()
    guard = Guard(made.handle, made.verifier)
    http = HttpServer(guard, 1 << 20, admit=guard.admit)
    await http.start(made.sock, 16)
    try:
        yield made
    finally:
        await http.close(0.0)


class Client:
    """One connection, and what is said on it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def ask(self, authorization: bytes, body: bytes = BODY) -> tuple[int, dict[bytes, bytes]]:
        """Status and headers of the answer."""
        self._writer.write(
            b"POST /x HTTP/1.1\r\nhost: here\r\nauthorization: %b\r\ncontent-length: %d\r\n\r\n%b"
            % (authorization, len(body), body)
        )
        head = await self._reader.readuntil(b"\r\n\r\n")
        first, *lines = head[:-4].split(b"\r\n")
        headers = dict(line.split(b": ", 1) for line in lines)
        await self._reader.readexactly(int(headers[b"content-length"]))
        return int(first.split()[1]), headers


@asynccontextmanager
async def connected(server: Server) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection(*server.sock.getsockname())
    try:
        yield Client(reader, writer)
    finally:
        writer.close()


async def met(client: Client, server: Server) -> bytes:
    """The token that a first signed request earns a connection."""
    signer, origin = Signer(SECRET), server.url
    signed = signer.sign(origin, b"POST", b"/x", body_digest(BODY))
    status, headers = await client.ask(signed.authorization)
    assert status == 401
    assert b"memserve-connection" not in headers
    challenge = headers[b"www-authenticate"].decode()
    assert signer.learn(origin, challenge, headers[b"memserve-proof"], signed)
    signed = signer.sign(origin, b"POST", b"/x", body_digest(BODY))
    status, headers = await client.ask(signed.authorization)
    assert status == 200
    token = headers[b"memserve-connection"]
    assert token == signer.connection_token(signed)
    assert token not in (signed.mac, headers[b"memserve-proof"])
    return token


async def test_a_token_is_good_for_its_connection_alone() -> None:
    async with serving() as server, connected(server) as client, connected(server) as other:
        token = await met(client, server)
        for _ in range(3):
            status, headers = await client.ask(b"MemServe " + token, b"anything")
            assert status == 200
            assert b"memserve-proof" not in headers
        assert (await other.ask(b"MemServe " + token))[0] == 401
        another = await met(other, server)
        assert another != token
        assert (await other.ask(b"MemServe " + token))[0] == 401
        assert (await client.ask(b"MemServe " + another))[0] == 401
        assert (await client.ask(b"MemServe " + token))[0] == 200


async def test_requests_of_others_on_a_proven_connection_are_refused() -> None:
    async with serving() as server, connected(server) as client:
        token = await met(client, server)
        for wrong in (b"", b"MemServe ", token, b"Bearer " + token, b"MemServe " + token[:-1]):
            assert (await client.ask(wrong))[0] == 401
        flipped = bytes([token[0] ^ 1]) + token[1:]
        assert (await client.ask(b"MemServe " + flipped))[0] == 401
        assert len(server.seen) == 1


async def test_a_large_body_with_a_token_is_read() -> None:
    async with serving() as server, connected(server) as client:
        token = await met(client, server)
        assert (await client.ask(b"MemServe " + token, b"x" * 500_000))[0] == 200


async def test_beyond_the_machine_every_request_is_signed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "_is_local", lambda peer: False)
    async with serving() as server, connected(server) as client:
        signer, origin = Signer(SECRET), server.url
        signed = signer.sign(origin, b"POST", b"/x", body_digest(BODY))
        _, headers = await client.ask(signed.authorization)
        signer.learn(
            origin, headers[b"www-authenticate"].decode(), headers[b"memserve-proof"], signed
        )
        signed = signer.sign(origin, b"POST", b"/x", body_digest(BODY))
        status, headers = await client.ask(signed.authorization)
        assert status == 200
        assert b"memserve-connection" not in headers
        token = signer.connection_token(signed)
        assert (await client.ask(b"MemServe " + token))[0] == 401


class Heard:
    """An answer, as a gateway hears it."""

    def __init__(self) -> None:
        self.status = 0
        self.body = b""

    def begin(self, flow: Flow) -> None:
        pass

    def head(self, status: int, retry_after: bytes | None, media: bytes | None) -> None:
        self.status = status

    def received(self, data: bytes, last: bool) -> None:
        self.body += data


async def called(calls: Upstream, server: Server) -> Heard:
    heard = Heard()
    await calls.call(server.url, b"[1]", heard)
    return heard


async def test_a_gateway_signs_once_for_a_connection() -> None:
    async with serving() as server:
        calls = Upstream(Signer(SECRET))
        for _ in range(4):
            heard = await called(calls, server)
            assert (heard.status, heard.body) == (200, b"[1]")
        question, *rest = server.seen
        assert b"." in question
        assert len(rest) == 4
        assert len(set(rest)) == 1
        assert b"." not in rest[0]
        calls.close()


@pytest.mark.parametrize("far", ["server", "gateway"])
async def test_a_gateway_signs_each_call_where_one_side_is_not_local(
    monkeypatch: pytest.MonkeyPatch, far: str
) -> None:
    if far == "server":
        monkeypatch.setattr(http_connection, "_is_local", lambda peer: False)
    else:
        monkeypatch.setattr(upstream_connection, "is_loopback", lambda host: False)
    async with serving() as server:
        calls = Upstream(Signer(SECRET))
        for _ in range(3):
            assert (await called(calls, server)).status == 200
        assert len(set(server.seen)) == 4
        assert all(b"." in given for given in server.seen)
        calls.close()


async def test_a_connection_that_is_not_known_any_more_is_no_client_s_401() -> None:
    async with serving() as server:
        calls = Upstream(Signer(SECRET))
        assert (await called(calls, server)).status == 200
        server.status = 401
        with pytest.raises(Unreachable, match="does not know"):
            await called(calls, server)
        server.status = 200
        assert (await called(calls, server)).status == 200
        calls.close()
