"""Clients that say no more: those that wait for their answer, and those that have left."""

from __future__ import annotations

import asyncio
import socket
import struct

import pytest

from memserve.api import http_half_closed
from memserve.api.http_half_closed import CONTINUE
from memserve.api.http_limits import HttpLimits
from memserve.api.http_message import Reply, Request
from tests.http_harness import LOOPS, Handle, post, serving
from tests.waiting import until

pytestmark = pytest.mark.filterwarnings("ignore:Overriding the")
OLD = b"POST /p HTTP/1.0\r\ncontent-length: 3\r\n\r\nabc"
NEVER = 1e6  # seconds


@pytest.fixture(params=LOOPS, scope="module")
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    policy: asyncio.AbstractEventLoopPolicy = request.param()
    return policy


class Work:
    """A handler that answers when it is told to, and knows whether its client was there."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.answer = asyncio.Event()
        self.gone = asyncio.Event()

    async def handle(self, request: Request, reply: Reply) -> None:
        reply.on_gone = self._left
        self.begun.set()
        await self.answer.wait()
        reply.send(200, request.body)

    def _left(self) -> None:
        self.gone.set()
        self.answer.set()


async def _echo_later(request: Request, reply: Reply) -> None:
    for _ in range(10):
        await asyncio.sleep(0)
    reply.send(200, request.body)


async def _stream(request: Request, reply: Reply) -> None:
    for _ in range(10):
        await asyncio.sleep(0)
    reply.start(200, ())
    for _ in range(10):
        reply.write(b"x")
        await asyncio.sleep(0)
    reply.end(b"y")


@pytest.mark.parametrize("handle", [_echo_later, _stream])
@pytest.mark.parametrize(
    "requests", [[post(b"abc")], [post(b"abc"), post(b"abc", b"/2", b"connection: close")], [OLD]]
)
async def test_who_has_sent_all_gets_every_answer(handle: Handle, requests: list[bytes]) -> None:
    async with serving(handle) as served:
        client = await served.connect()
        client.say(b"".join(requests))
        client.writer.write_eof()
        for _ in requests:
            status, _, body = await client.hear()
            assert (status, body) == (200, b"abc" if handle is _echo_later else b"x" * 10 + b"y")
        assert await client.ended()
        assert served.server.counters.departed == 0


async def test_who_waits_for_long_is_asked_and_still_gets_its_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_half_closed, "YOUNG_SECONDS", 0.0)
    work = Work()
    async with serving(work.handle) as served:
        client = await served.connect()
        client.say(post(b"abc"))
        await work.begun.wait()
        client.writer.write_eof()
        assert await client.reader.readexactly(len(CONTINUE)) == CONTINUE
        work.answer.set()
        assert (await client.hear())[2] == b"abc"
        assert await client.ended()
        assert served.server.counters.half_closed == 1
        assert not work.gone.is_set()


@pytest.mark.parametrize("young_seconds", [0.0, 0.05])
async def test_who_has_left_is_noticed_before_anything_is_answered(
    young_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_half_closed, "YOUNG_SECONDS", young_seconds)
    work = Work()
    async with serving(work.handle) as served:
        client = await served.connect()
        client.say(post(b"abc"))
        await work.begun.wait()
        client.writer.close()
        await work.gone.wait()
        assert served.server.counters.departed == 1


async def test_who_waits_first_and_leaves_then_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_half_closed, "YOUNG_SECONDS", 0.0)
    monkeypatch.setattr(http_half_closed, "LOOK_SECONDS", (0.005,))
    work = Work()
    async with serving(work.handle) as served:
        client = await served.connect()
        client.say(post(b"abc"))
        client.writer.write_eof()
        for _ in range(3):  # it is asked again and again, as it may leave at any time
            assert await client.reader.readexactly(len(CONTINUE)) == CONTINUE
        assert not work.gone.is_set()
        client.writer.close()
        await work.gone.wait()


async def test_a_reset_is_a_departure_in_any_case() -> None:
    work = Work()
    async with serving(work.handle) as served:
        client = await served.connect()
        client.say(post(b"abc"))
        await work.begun.wait()
        sock = client.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.writer.transport.abort()
        await work.gone.wait()


async def test_the_end_behind_the_beginning_of_an_answer_is_a_departure() -> None:
    gone = asyncio.Event()

    async def stream(request: Request, reply: Reply) -> None:
        reply.on_gone = gone.set
        reply.start(200, ())
        reply.write(b"x")
        await gone.wait()
        reply.end()

    async with serving(stream) as served:
        client = await served.connect()
        client.say(post(b""))
        await client.reader.readuntil(b"x\r\n")
        client.writer.write_eof()
        await gone.wait()


async def test_a_stream_to_a_client_that_has_sent_all_ends_when_it_leaves() -> None:
    gone, go_on = asyncio.Event(), asyncio.Event()

    async def stream(request: Request, reply: Reply) -> None:
        reply.on_gone = gone.set
        await go_on.wait()
        reply.start(200, ())
        while not gone.is_set():
            reply.write(b"x")
            await asyncio.sleep(0)
        reply.end()

    async with serving(stream) as served:
        client = await served.connect()
        client.say(post(b""))
        client.writer.write_eof()
        await until(lambda: served.server.counters.half_closed == 1, "the end of what is sent")
        go_on.set()
        await client.reader.readuntil(b"x\r\n")
        client.writer.close()
        await gone.wait()


async def test_an_old_client_that_says_no_more_has_a_limited_time() -> None:
    work = Work()
    async with serving(work.handle, limits=HttpLimits(half_closed_seconds=0.01)) as served:
        client = await served.connect()
        client.say(OLD)
        client.writer.write_eof()
        await work.gone.wait()
        assert await client.ended()


async def test_an_old_client_whose_end_comes_late_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_half_closed, "YOUNG_SECONDS", 0.0)
    work = Work()
    async with serving(work.handle, limits=HttpLimits(half_closed_seconds=NEVER)) as served:
        client = await served.connect()
        client.say(OLD)
        await work.begun.wait()
        client.writer.close()
        await work.gone.wait()


@pytest.mark.parametrize("cut", [b"POST /p HT", post(b"abc")[:-1], b""])
async def test_the_end_within_a_request_is_the_end(cut: bytes) -> None:
    async with serving() as served:
        client = await served.connect()
        client.say(cut)
        client.writer.write_eof()
        assert await client.ended()
        client = await served.connect()
        client.say(post(b"abc") + cut)
        client.writer.write_eof()
        assert (await client.hear())[2] == b"POST /p abc"
        assert await client.ended()
