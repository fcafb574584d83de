"""Clients that take more connections, time or memory than they should."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import resource
import tracemalloc
import weakref
from collections.abc import Iterator
from http import HTTPStatus

import pytest

from memserve.api.errors import ApiError
from memserve.api.http_connection import Connection
from memserve.api.http_limits import HttpLimits
from memserve.api.http_message import Reply, Request
from memserve.api.http_parser import MAX_SLICE_BYTES
from memserve.api.http_server import HttpServer
from memserve.api.serving import allow_files
from tests.http_harness import LOOPS, Conversation, Served, post, serving
from tests.waiting import until

pytestmark = pytest.mark.filterwarnings("ignore:Overriding the")
SOON = 0.02  # seconds, of a limit that is to be met
SWEEP = 0.005
NEVER = 1e6
MIB = 1024 * 1024
HEAD = b"POST /p HTTP/1.1\r\nhost: h\r\ncontent-length: %d\r\n\r\n"


@pytest.fixture(params=LOOPS, scope="module")
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    policy: asyncio.AbstractEventLoopPolicy = request.param()
    return policy


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Without a collector: what is left when nobody refers to it is in a cycle."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


# --- time


async def _trickle(client: Conversation, data: bytes) -> None:
    """One byte now and then, for as long as the server takes them."""
    with contextlib.suppress(ConnectionError):
        for byte in data:
            client.say(bytes([byte]))
            await client.writer.drain()
            await asyncio.sleep(SWEEP / 2)


@pytest.mark.parametrize(
    ("sent", "counted"),
    [
        (b"GET /" + b"x" * 10_000, "head_timeouts"),
        (b"GET / HTTP/1.1\r\nhost: h\r\nx: " + b"x" * 10_000, "head_timeouts"),
        (HEAD % 10_000 + b"x" * 9_000, "body_timeouts"),
        (b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n"
         + b"1\r\nx\r\n" * 10_000, "body_timeouts"),
        (b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n1;"
         + b"x" * 10_000, "body_timeouts"),
    ],
    ids=["line", "header", "body", "chunks", "extension"],
)  # fmt: skip
async def test_who_sends_a_byte_now_and_then_is_told_to_stop(sent: bytes, counted: str) -> None:
    limits = HttpLimits(
        head_seconds=SOON,
        body_seconds=SOON,
        idle_seconds=NEVER,
        body_rate=MIB,
        sweep_seconds=SWEEP,
    )
    async with serving(limit=20_000, limits=limits) as served:
        client = await served.connect()
        # The head's first bytes at once, as its time is not what the bodies are about.
        start = sent.find(b"\r\n\r\n") + 4
        client.say(sent[:start])
        trickling = asyncio.create_task(_trickle(client, sent[start:]))
        assert await client.error() == (408, "request_timeout")
        assert getattr(served.server.counters, counted) == 1
        trickling.cancel()
        await asyncio.wait((trickling,))


async def test_blank_lines_do_not_keep_a_connection() -> None:
    limits = HttpLimits(idle_seconds=SOON, sweep_seconds=SWEEP)
    async with serving(limits=limits) as served:
        client = await served.connect()
        trickling = asyncio.create_task(_trickle(client, b"\r\n" * 5_000))
        with contextlib.suppress(ConnectionResetError):  # what it sends after the end
            assert await client.ended()
        trickling.cancel()
        await asyncio.wait((trickling,))


async def test_a_large_body_has_the_time_that_it_takes() -> None:
    # At 1 byte a second the half that came is worth an hour.
    limits = HttpLimits(body_seconds=SWEEP, body_rate=1, sweep_seconds=SWEEP)
    async with serving(limit=10_000, limits=limits) as served:
        client = await served.connect()
        client.say(HEAD % 10_000 + b"x" * 5_000)
        other = await served.connect()
        other.say(HEAD % 10)
        assert (await other.error())[0] == 408  # several sweeps later
        client.say(b"x" * 5_000)
        assert (await client.hear())[0] == 200


async def test_time_does_not_run_while_the_server_does_not_read() -> None:
    answer = asyncio.Event()

    async def handle(request: Request, reply: Reply) -> None:
        await answer.wait()
        reply.send(200, request.body)

    limits = HttpLimits(head_seconds=SWEEP, body_seconds=SWEEP, sweep_seconds=SWEEP)
    async with serving(handle, limits=limits) as served:
        client = await served.connect()
        third = post(b"3")
        client.say(post(b"1") + post(b"2") + third[:20])
        other = await served.connect()
        other.say(HEAD % 10)
        assert (await other.error())[0] == 408
        client.say(third[20:])  # before time runs again, of which there is little
        answer.set()
        assert [(await client.hear())[2] for _ in range(3)] == [b"1", b"2", b"3"]


# --- connections


async def test_connections_beyond_the_limit_are_refused_and_counted() -> None:
    answer = asyncio.Event()

    async def handle(request: Request, reply: Reply) -> None:
        await answer.wait()
        reply.send(200, request.body)

    async with serving(handle, limits=HttpLimits(connections=3)) as served:
        clients = [await served.connect() for _ in range(3)]
        for client in clients:
            client.say(post(b"x"))
        await until(lambda: len(served.server._tasks) == 3, "the requests")
        for _ in range(2):
            one_more = await served.connect()
            status, headers, _ = await one_more.hear()
            assert (status, headers[b"connection"]) == (503, b"close")
            assert b"retry-after" in headers
            assert await one_more.ended()
        assert served.server.counters.refused_connections == 2
        assert served.server.counters.connections == 5
        clients.pop().writer.close()
        await until(lambda: served.server.connections == 2, "the end of a connection")
        again = await served.connect()
        again.say(post(b"x"))
        answer.set()
        assert (await again.hear())[0] == 200
        assert served.server.counters.evicted == 0


async def test_idle_connections_make_room_for_others_those_that_waited_longest_first() -> None:
    limits = HttpLimits(connections=3, idle_seconds=NEVER, sweep_seconds=NEVER)
    answer = asyncio.Event()

    async def handle(request: Request, reply: Reply) -> None:
        if request.path == "/slow":
            await answer.wait()
        reply.send(200, request.body)

    async with serving(handle, limits=limits) as served:
        busy, first, second = [await served.connect() for _ in range(3)]
        busy.say(post(b"b", b"/slow"))
        for client in (second, first):  # the first has been idle for less time then
            client.say(post(b"x"))
            assert (await client.hear())[0] == 200
            await asyncio.sleep(0.005)  # a loop's clock has milliseconds
        third = await served.connect()
        assert await second.ended()
        third.say(post(b"x")[:-1])  # is not idle
        fourth = await served.connect()
        assert await first.ended()
        fourth.say(post(b"y"))
        assert (await fourth.hear())[2] == b"y"
        assert served.server.counters.evicted == 2
        answer.set()
        third.say(b"x")
        assert (await busy.hear())[2] == b"b"
        assert (await third.hear())[2] == b"x"


async def test_connections_leave_descriptors_for_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def nothing(request: Request, reply: Reply) -> None: ...

    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    assert HttpServer(nothing, 1).limits.connections == 512
    assert HttpServer(nothing, 1, HttpLimits(connections=100)).limits.connections == 100


# --- memory


def _held(served: Served) -> int:
    return served.server.held_bytes


async def test_unfinished_bodies_have_a_limit_together() -> None:
    limits = HttpLimits(held_bytes=8 * MIB, small_body=64 * 1024)
    async with serving(limit=4 * MIB, limits=limits) as served:
        holding = [await served.connect() for _ in range(4)]
        for client in holding:
            client.say(HEAD % (3 * MIB) + b"x" * (2 * MIB))
        await until(lambda: _held(served) >= 8 * MIB, "the bodies")
        holding[0].say(b"x" * (MIB // 2))
        assert await holding[0].error() == (503, "too_many_bodies")
        assert _held(served) < 7 * MIB

        announced = await served.connect()  # refused before it is sent
        announced.say(HEAD.replace(b"content", b"expect: 100-continue\r\ncontent") % (4 * MIB))
        status, headers, _ = await announced.hear()
        assert (status, b"retry-after" in headers) == (503, True)
        small = await served.connect()  # goes on as before
        small.say(post(b"x" * 60_000))
        assert (await small.hear())[0] == 200
        assert served.server.counters.bodies_refused == 2

        for client in holding:
            client.writer.close()
        await until(lambda: _held(served) == 0, "nothing held")
        again = await served.connect()
        again.say(post(b"x" * 3 * MIB))
        assert (await again.hear())[0] == 200
        assert _held(served) == 0


def _only_alice(head: Request) -> ApiError | None:
    """Says whom to admit, as the gateway's door does."""
    assert (head.method, head.path, head.body) == ("POST", "/p", b"")
    if head.header(b"authorization") == b"Bearer alice":
        return None
    return ApiError(HTTPStatus.UNAUTHORIZED, "Who?", code="invalid_api_key", authenticate="Bearer")


CHUNKED = b"POST /p HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n"
ALICE = b"authorization: Bearer alice\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        HEAD % (3 * MIB) + b"x" * (2 * MIB),
        HEAD % (3 * MIB),
        HEAD % 9_000 + b"x" * 8_999,
        HEAD % 9_000 + b"x" * 9_000,
        HEAD.replace(b"content", b"expect: 100-continue\r\ncontent") % 9_000,
        HEAD.replace(b"content", b"connection: upgrade\r\nupgrade: h2c\r\ncontent") % 9_000,
        CHUNKED,
        CHUNKED + b"%x\r\n" % MIB + b"x" * MIB,
    ],
    ids=["large", "announced", "half", "whole", "expect", "upgrade", "chunked", "chunk"],
)
async def test_strangers_hold_no_memory_with_bodies(sent: bytes) -> None:
    limits = HttpLimits(held_bytes=8 * MIB)
    async with serving(limit=4 * MIB, limits=limits, admit=_only_alice) as served:
        clients = [await served.connect() for _ in range(12)]
        for client in clients:
            client.say(sent)
        for client in clients:
            status, headers, _ = await client.hear()
            assert (status, headers[b"www-authenticate"]) == (401, b"Bearer")
            assert await client.ended()
        assert _held(served) == 0
        assert served.server.counters.turned_away == len(clients)
        assert served.server.counters.malformed == 0
        alice = await served.connect()
        alice.say(sent.replace(b"host: h\r\n", b"host: h\r\n" + ALICE))
        alice.writer.close()
        body = b"x" * (4 * MIB)
        alice = await served.connect()
        for _ in range(2):
            alice.say(post(body, b"/p", ALICE.rstrip()))
            assert (await alice.hear())[::2] == (200, b"POST /p " + body)
        assert served.server.counters.turned_away == len(clients)


async def test_small_bodies_are_not_asked_about_and_refusals_wait_for_their_turn() -> None:
    answer = asyncio.Event()

    async def handle(request: Request, reply: Reply) -> None:
        await answer.wait()
        reply.send(200, request.body)

    async with serving(handle, limit=MIB, admit=_only_alice) as served:
        client = await served.connect()
        client.say(post(b"x" * 8_192), post(b"y" * 8_193), post(b"z"))
        await until(lambda: served.server.counters.turned_away == 1, "the refusal")
        answer.set()
        assert (await client.hear())[2] == b"x" * 8_192
        assert await client.error() == (401, "invalid_api_key")
        assert await client.ended()


async def test_what_waits_behind_an_answer_is_held_too() -> None:
    answer = asyncio.Event()

    async def handle(request: Request, reply: Reply) -> None:
        await answer.wait()
        reply.send(200, b"")

    async with serving(handle, limit=MIB) as served:
        client = await served.connect()
        client.say(post(b"1") + post(b"x" * 200_000) + post(b"3") * 1000)
        await until(lambda: _held(served) >= 200_000, "the second request")
        answer.set()
        for _ in range(1002):
            assert (await client.hear())[0] == 200
        await until(lambda: _held(served) == 0, "nothing held")


async def test_a_body_of_the_smallest_chunks_takes_its_size() -> None:
    begun = asyncio.Event()

    async def handle(request: Request, reply: Reply) -> None:
        reply.send(200, b"%d" % len(request.body))
        begun.set()

    size = MIB // 4
    async with serving(handle, limit=size) as served:
        client = await served.connect()
        client.say(b"POST /p HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n")
        part = b"2\r\nxy\r\n" * 1024
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            for _ in range(size // 2048 - 1):
                client.say(part)
                await client.writer.drain()
            await until(lambda: _held(served) >= size - 4096, "the body but for its end")
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        # The client's own buffers are in it; as a list of parts it would be 20 times its size.
        assert after - before < 4 * size
        client.say(part + b"0\r\n\r\n")
        assert (await client.hear())[2] == b"%d" % size


async def test_answers_that_nobody_reads_hold_up_what_is_pipelined() -> None:
    answers = 0

    async def handle(request: Request, reply: Reply) -> None:
        nonlocal answers
        answers += 1
        reply.send(200, b"x" * 32_000)

    async with serving(handle) as served:
        client = await served.connect()
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        request = b"GET / HTTP/1.1\r\nhost: h\r\n\r\n"
        client.say(request * 45_000)
        [connection] = served.server._connections
        await until(lambda: not connection._writable, "a full buffer")
        for _ in range(50):
            await asyncio.sleep(0)
        # What the two kernels' buffers take is a few megabytes; 45,000 are 1.4 GB.
        assert answers < 1000
        assert connection._transport.get_write_buffer_size() < 200_000
        assert len(connection._waiting) <= MAX_SLICE_BYTES // len(request) + 1
        assert len(connection._unread) <= 512 * 1024
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        for _ in range(2000):
            assert len((await client.hear())[2]) == 32_000
        client.writer.transport.abort()


async def test_all_that_was_pipelined_is_answered_in_order() -> None:
    async def handle(request: Request, reply: Reply) -> None:
        await asyncio.sleep(0)
        reply.send(200, request.body + b"y" * 2_000)

    async with serving(handle, limit=50_000) as served:
        client = await served.connect()
        bodies = [b"%d" % n + b"x" * (n * 7919 % 9000) for n in range(700)]

        async def say() -> None:
            for body in bodies:
                client.say(post(body))
                await client.writer.drain()

        saying = asyncio.create_task(say())
        for body in bodies:
            assert (await client.hear())[2] == body + b"y" * 2_000
        await saying


async def test_a_client_that_never_reads_the_end_is_given_up() -> None:
    """What waits for it is less than what stops its requests."""

    async def handle(request: Request, reply: Reply) -> None:
        reply.send(200, b"x" * 30_000)

    limits = HttpLimits(idle_seconds=SOON, stalled_seconds=SOON, sweep_seconds=SWEEP)
    async with serving(handle, limits=limits) as served:
        client, connection = await _tracked(served)
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        transport = connection()._transport  # type: ignore[union-attr]
        while not transport.get_write_buffer_size():
            client.say(post(b""))
            await client.writer.drain()
            await asyncio.sleep(0)
        assert connection()._writable  # type: ignore[union-attr]
        await until(lambda: served.server.connections == 0, "no connection")
        assert served.server.counters.stalled == 1


# --- what is left afterwards


async def _tracked(served: Served) -> tuple[Conversation, weakref.ref[Connection]]:
    client = await served.connect()
    await until(lambda: served.server.connections == 1, "a connection")
    [connection] = served.server._connections
    return client, weakref.ref(connection)


@pytest.mark.parametrize(
    ("said", "answered"),
    [
        (b"", False),
        (post(b"x" * 5000), True),
        (post(b"x" * 5000)[:-1], False),
        (post(b"x" * 5000) * 2, True),
        (b"nonsense\r\n\r\n", True),
        (post(b"x" * 20_000), True),
        (post(b"x", b"/p", b"upgrade: h2c", b"connection: upgrade"), True),
    ],
    ids=["nothing", "a request", "half", "two", "no request", "too much", "an offer"],
)
@pytest.mark.parametrize("clean", [True, False], ids=["close", "abort"])
async def test_a_closed_connection_leaves_nothing_to_a_collector(
    said: bytes, answered: bool, clean: bool, uncollected: None
) -> None:
    async def handle(request: Request, reply: Reply) -> None:
        reply.on_gone = lambda: None
        reply.send(200, b"")

    async with serving(handle, limit=10_000) as served:
        client, connection = await _tracked(served)
        client.say(said)
        await client.writer.drain()
        if answered:
            await client.hear()
        if clean:
            client.writer.close()
        else:
            client.writer.transport.abort()
        await until(lambda: served.server.connections == 0, "no connection")
        await until(lambda: connection() is None, "no reference")
        assert _held(served) == 0


async def test_a_client_that_leaves_within_its_answer_leaves_nothing(uncollected: None) -> None:
    async def handle(request: Request, reply: Reply) -> None:
        gone = asyncio.Event()
        reply.on_gone = gone.set
        reply.start(200, ())
        reply.write(b"x")
        await gone.wait()
        reply.end()

    async with serving(handle) as served:
        client, connection = await _tracked(served)
        client.say(post(b"x" * 500))
        await client.reader.readuntil(b"x\r\n")
        client.writer.close()
        await until(lambda: connection() is None, "no reference")


@pytest.mark.parametrize("leaves", [True, False])
async def test_a_half_closed_connection_leaves_nothing(leaves: bool, uncollected: None) -> None:
    answer = asyncio.Event()

    async def handle(request: Request, reply: Reply) -> None:
        reply.on_gone = answer.set
        await answer.wait()
        reply.send(200, b"")

    async with serving(handle) as served:
        client, connection = await _tracked(served)
        client.say(post(b"x" * 500))
        client.writer.write_eof()
        await until(lambda: served.server.counters.half_closed == 1, "the end")
        if leaves:
            client.writer.close()
        else:
            answer.set()
            assert await client.reader.read()
        await until(lambda: connection() is None, "no reference")
        assert served.server.counters.departed == leaves


async def test_an_idle_connection_keeps_no_body(uncollected: None) -> None:
    async def handle(request: Request, reply: Reply) -> None:
        reply.send(200, b"")

    async with serving(handle, limit=8 * MIB) as served:
        client = await served.connect()
        tracemalloc.start()
        try:
            client.say(HEAD % (8 * MIB))
            part = b"x" * MIB
            for _ in range(8):
                client.say(part)
                await client.writer.drain()
            assert (await client.hear())[0] == 200
            await until(lambda: tracemalloc.get_traced_memory()[0] < 2 * MIB, "freed memory")
        finally:
            tracemalloc.stop()


def test_a_server_may_open_what_its_connections_need(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: set_to.append(limits))
    for limits in (
        (1024, 4096),
        (1024, 1_000_000),
        (20_000, 20_000),
        (1024, resource.RLIM_INFINITY),
    ):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limits=limits: limits)
        allow_files(16_384)
    assert set_to == [(4096, 4096), (16_384, 1_000_000), (16_384, resource.RLIM_INFINITY)]
