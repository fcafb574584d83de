"""Valid HTTP requests, damaged, against a server that listens: it answers or hangs up, serves the
next client, and keeps nothing."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import os
import re
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from evaluation.soak.vitals import vitals
from memserve.api.http_message import Reply, Request
from memserve.api.http_server import HttpServer
from tests.fuzz.mutate import INTEGERS, Mutator, mutators

LIMIT = 100_000  # bytes of a body
# Much longer than an answer takes: who is silent for so long does not answer.
PATIENCE = 60.0
# Of a server's own memory, over all mutants: many times what one connection may cost.
GROWTH = 64 * 2**20
BODY = json.dumps({"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 8}).encode()
VALID = (
    b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n",
    b"HEAD /health HTTP/1.1\r\nHost: localhost\r\nConnection: keep-alive\r\n\r\n",
    b"GET http://localhost/metrics?name=a%20b HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.0\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost:8000\r\nContent-Type: application/json\r\n"
    b"Authorization: Bearer key\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY),
    b"POST /v1/completions HTTP/1.1\r\nHost: [::1]\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"%x;ext=1\r\n%b\r\n5\r\n12345\r\n0\r\nX-Trailer: t\r\n\r\n" % (len(BODY), BODY),
    b"POST / HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc",
    b"POST / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    b"HTTP2-Settings: AAMAAABkAAQAoAAA\r\nContent-Length: 3\r\n\r\nabc",
    b"OPTIONS * HTTP/1.1\r\nHost: h\r\nOrigin: http://other\r\n\r\n",
)
GOOD = b"POST /good HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"
_NUMBER = re.compile(rb"\d+")


async def echo(request: Request, reply: Reply) -> None:
    """Also looks at everything that a handler may."""
    said = f"{request.method} {request.path} {len(request.query)} {len(request.headers)} "
    request.header(b"host")
    reply.send(200, said.encode() + request.body[:100], ((b"x-size", b"%d" % len(request.body)),))


class Server:
    """On an event loop of its own, which says what it had to catch."""

    def __init__(self) -> None:
        self.caught: list[str] = []
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(self._catch)
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def start(self) -> None:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self.loop).result(PATIENCE)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self.server.close(1.0), self.loop).result(PATIENCE)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    async def _start(self) -> None:
        sock = socket.create_server(("127.0.0.1", 0))
        self.port = sock.getsockname()[1]
        self.server = HttpServer(echo, LIMIT)
        await self.server.start(sock, 16)

    def _catch(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.caught.append(f"{context.get('message')}: {context.get('exception')!r}")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server()
    running.start()
    yield running
    running.stop()


def damaged(mutator: Mutator) -> bytes:
    """One or several requests, of which something is wrong."""
    valid = mutator.one_of(VALID)
    match mutator.random.randrange(5):
        case 0:
            return mutator.bytes(valid)
        case 1:  # its numbers: lengths, versions, chunks
            chosen = mutator.random.choice(list(_NUMBER.finditer(valid)) or [None])
            if chosen is None:
                return mutator.bytes(valid)
            number = str(mutator.one_of(INTEGERS)).encode()[:400]
            return valid[: chosen.start()] + number + valid[chosen.end() :]
        case 2:  # its lines
            return mutator.text(valid.decode("ascii"))
        case 3:  # its body alone
            head, _, body = valid.partition(b"\r\n\r\n")
            return head + b"\r\n\r\n" + mutator.bytes(body)
        case _:  # pipelined
            return b"".join(mutator.bytes(valid) for _ in range(mutator.random.randrange(2, 30)))


def exchange(port: int, request: bytes, cuts: int = 1) -> bytes:
    """Everything that the server says to it. It must end the connection by itself, as no more
    comes from here."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as sock:
        received = b""
        try:
            for place in range(cuts):
                part = len(request) * place // cuts, len(request) * (place + 1) // cuts
                sock.sendall(request[slice(*part)])
            sock.shutdown(socket.SHUT_WR)
            while data := sock.recv(65536):
                received += data
        except (ConnectionResetError, BrokenPipeError):
            pass  # it has hung up on what was still being sent
        except OSError as error:
            if error.errno != errno.ENOTCONN:  # the same, found out by `shutdown`
                raise
        return received


def test_every_damaged_request_is_answered_or_hung_up_on(server: Server) -> None:
    own = os.getpid()
    assert exchange(server.port, GOOD).startswith(b"HTTP/1.1 200 OK\r\n")
    for request in VALID:
        exchange(server.port, request)
    gc.collect()
    before = vitals(own)
    assert before is not None
    for mutator in mutators("http"):
        request = damaged(mutator)
        try:
            said = exchange(server.port, request, mutator.random.choice((1, 1, 2, 7)))
        except TimeoutError:
            pytest.fail(f"{mutator!r}: neither answered nor hung up: {request[:300]!r}")
        assert not said or said.startswith(b"HTTP/1.1 "), f"{mutator!r}: {said[:100]!r}"
        assert not server.caught, f"{mutator!r}: {server.caught[0]}"
        if not mutator.random.randrange(20):
            good = exchange(server.port, GOOD)
            assert good.startswith(b"HTTP/1.1 200 OK\r\n"), f"behind {mutator!r}: {good[:100]!r}"
            assert good.endswith(b"POST /good 0 3 ok"), f"behind {mutator!r}: {good[-100:]!r}"
    gc.collect()
    after = vitals(own)
    assert after is not None
    assert after.private - before.private < GROWTH
    assert after.fds <= before.fds + 2
