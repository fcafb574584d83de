"""Mutated requests in pieces of any size, answered at any time: nothing escapes, nothing stays."""

from __future__ import annotations

import asyncio
import random

import pytest

from memserve.api.http_connection import Connection
from memserve.api.http_message import Reply, Request
from memserve.api.http_server import HttpServer

CONNECTIONS = 1000  # of each seed, in about half a second
UPGRADE = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nt: x\r\n\r\n"
VALID = [
    b"GET / HTTP/1.1\r\nhost: h\r\n\r\n",
    b"POST /p HTTP/1.1\r\nhost: h\r\ncontent-length: 5\r\n\r\nabcde",
    b"POST /p HTTP/1.1\r\nHost: h\r\n" + UPGRADE + CHUNKED,
    b"POST / HTTP/1.1\r\nHost: h\r\n%bexpect: 100-continue\r\ncontent-length: 1\r\n\r\na" % UPGRADE,
    b"POST /p HTTP/1.0\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\nab",
    b"POST /b HTTP/1.1\r\nhost: h\r\ncontent-length: 30000\r\n\r\n" + b"z" * 30_000,
]
PUT_IN = [b"\r\n", b" ", b"\n", b"0", b"\x00", b"\r\n\r\n", UPGRADE, b"Host: x\r\n"]


class Transport(asyncio.Transport):
    """Takes everything."""

    def __init__(self) -> None:
        super().__init__()
        self.closing = False
        self.written: list[bytes] = []

    def write(self, data: object) -> None:
        assert isinstance(data, bytes)
        assert not self.closing
        self.written.append(data)

    def write_eof(self) -> None: ...

    def can_write_eof(self) -> bool:
        return True

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = True

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0


class Fuzz:
    """One seed's connections, one after the other."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.waiting: list[Reply] = []
        self.server = HttpServer(self._nothing, 40_000)
        self.server.answer = self._answer  # type: ignore[method-assign]
        self.served = 0

    async def _nothing(self, request: Request, reply: Reply) -> None: ...

    def _answer(self, request: Request, reply: Reply) -> None:
        self.waiting.append(reply)
        if self.random.random() < 0.5:
            self._reply()

    def _reply(self) -> None:
        self.waiting.pop().send(200, b"{}")

    def _mutated(self) -> bytes:
        chance = self.random
        data = bytearray(b"".join(chance.choices(VALID, k=chance.randint(1, 6))))
        for _ in range(chance.choice((0, 0, 1, 2, 5))):
            at = chance.randrange(len(data))
            match chance.randrange(3):
                case 0:
                    data[at] = chance.randrange(256)
                case 1:
                    del data[at : at + min(8, len(data) - 1)]
                case 2:
                    data[at:at] = chance.choice(PUT_IN)
            data = data or bytearray(b"x")
        return bytes(data)

    def run(self) -> None:
        transport, connection = Transport(), Connection(self.server)
        connection.connection_made(transport)
        data, at = self._mutated(), 0
        while at < len(data) and not transport.closing:
            chance = self.random.random()
            if connection._paused:  # nothing comes then
                if self.waiting:
                    self._reply()
                else:
                    assert not connection._writable, "paused for nothing"
                    connection.resume_writing()
                continue
            if chance < 0.1:
                (connection.pause_writing if connection._writable else connection.resume_writing)()
            elif chance > 0.9:
                connection.check(self.server.loop.time())
            elif chance < 0.3 and self.waiting:
                self._reply()
            end = at + self.random.choice((1, 3, 50, 5_000, 40_000))
            connection.data_received(data[at:end])
            at = end
            assert self.server.held_bytes == connection._held >= 0
        if not connection._writable:
            connection.resume_writing()
        while self.waiting:
            self._reply()
        self.served += any(b"200" in written for written in transport.written)
        connection.connection_lost(None)
        assert self.server.held_bytes == 0
        assert self.server.connections == 0


@pytest.mark.parametrize("seed", [1, 2])
async def test_whatever_comes_a_connection_stays_in_order(seed: int) -> None:
    fuzz = Fuzz(seed)
    for _ in range(CONNECTIONS):
        fuzz.run()
    assert fuzz.served > CONNECTIONS / 2  # it starts from what is valid
    assert fuzz.server.counters.malformed > CONNECTIONS / 5
