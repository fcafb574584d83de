"""An HTTP server on the loopback interface, and clients that talk to it byte by byte."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager

import uvloop

from memserve.api.http_connection import Admit
from memserve.api.http_limits import HttpLimits
from memserve.api.http_message import Reply, Request
from memserve.api.http_server import HttpServer
from memserve.api.serving import bind

LIMIT = 1000  # of bodies, unless a test says otherwise
LOOPS = [asyncio.DefaultEventLoopPolicy, uvloop.EventLoopPolicy]
Handle = Callable[[Request, Reply], Coroutine[object, object, None]]


async def echo(request: Request, reply: Reply) -> None:
    """Says what came: method, path and body, and how many headers."""
    body = b"%b %b %b" % (request.method.encode(), request.path.encode(), request.body)
    reply.send(200, body, ((b"x-seen", b"%d" % len(request.headers)),))


class Conversation:
    """A client's end of a connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def say(self, *parts: bytes) -> None:
        for part in parts:
            self.writer.write(part)

    async def hear(self) -> tuple[int, dict[bytes, bytes], bytes]:
        """Status, headers and body of the next answer."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        status, *lines = head.rstrip().split(b"\r\n")
        headers = dict(line.split(b": ", 1) for line in lines)
        if b"content-length" in headers:
            body = await self.reader.readexactly(int(headers[b"content-length"]))
        elif headers.get(b"transfer-encoding") == b"chunked":
            body = b""
            while size := int(await self.reader.readline(), 16):
                body += (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readline()
        else:
            body = await self.reader.read()
        return int(status.split(b" ")[1]), headers, body

    async def error(self) -> tuple[int, str]:
        status, _, body = await self.hear()
        detail = json.loads(body)["error"]
        assert set(detail) == {"message", "type", "param", "code"}
        return status, detail["code"]

    async def ended(self) -> bool:
        return await self.reader.read() == b""


class Served:
    """A server, and how to reach it."""

    def __init__(self, server: HttpServer, address: tuple[str, int]) -> None:
        self.server = server
        self.host, self.port = address

    async def connect(self, tls: ssl.SSLContext | None = None) -> Conversation:
        return Conversation(*await asyncio.open_connection(self.host, self.port, ssl=tls))


@asynccontextmanager
async def serving(
    handle: Handle = echo,
    limit: int = LIMIT,
    limits: HttpLimits | None = None,
    tls: ssl.SSLContext | None = None,
    host: str = "127.0.0.1",
    admit: Admit | None = None,
) -> AsyncIterator[Served]:
    """A server of `handle`, with bodies of up to `limit` bytes."""
    sock = bind(host, 0)
    server = HttpServer(handle, limit, limits, admit=admit)
    await server.start(sock, 16, tls)
    try:
        yield Served(server, sock.getsockname()[:2])
    finally:
        await server.close(1.0)


def post(body: bytes, path: bytes = b"/p", *headers: bytes) -> bytes:
    lines = b"".join(header + b"\r\n" for header in headers)
    return b"POST %b HTTP/1.1\r\nhost: h\r\n%bcontent-length: %d\r\n\r\n%b" % (
        path,
        lines,
        len(body),
        body,
    )
