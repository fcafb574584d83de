"""The HTTP server, fed byte by byte and badly, by clients that are slow or gone."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from memserve.api.http_limits import HttpLimits
from memserve.api.http_message import Reply, Request
from memserve.api.http_parser import MAX_HEAD_BYTES
from tests.http_harness import LIMIT, LOOPS, Conversation, post, serving

MANY = 16 * MAX_HEAD_BYTES  # several reads of any loop's
pytestmark = pytest.mark.filterwarnings("ignore:Overriding the")  # works with what is pinned


@pytest.fixture(params=LOOPS, scope="module")
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    policy: asyncio.AbstractEventLoopPolicy = request.param()
    return policy


async def test_a_connection_is_kept_and_requests_may_come_in_any_pieces() -> None:
    async with serving() as served:
        client = await served.connect()
        for _ in range(3):
            client.say(post(b"hello", b"/a%20b?q=1"))
            assert await client.hear() == (200, *(await same_headers(client, b"POST /a b hello")))
        for byte in post(b"slow"):
            client.say(bytes([byte]))
            await client.writer.drain()
        assert (await client.hear())[2] == b"POST /p slow"


async def same_headers(client: Conversation, body: bytes) -> tuple[object, bytes]:
    class Any:
        def __eq__(self, other: object) -> bool:
            return isinstance(other, dict) and b"connection" not in other and b"date" in other

    return Any(), body


async def test_chunked_bodies_are_put_together() -> None:
    async with serving() as served:
        client = await served.connect()
        head = b"POST /p HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n"
        client.say(head, b"3\r\nabc\r\n", b"5;x=y\r\ndefgh\r\n", b"0\r\nx-trailer: t\r\n\r\n")
        client.say(post(b"next"))
        assert (await client.hear())[2] == b"POST /p abcdefgh"
        assert (await client.hear())[2] == b"POST /p next"


async def test_pipelined_requests_are_answered_in_order_one_at_a_time() -> None:
    running = 0

    async def slowly(request: Request, reply: Reply) -> None:
        nonlocal running
        running += 1
        assert running == 1
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        running -= 1
        reply.send(200, request.body)

    async with serving(slowly) as served:
        client = await served.connect()
        client.say(b"".join(post(b"%d" % number) for number in range(50)))
        assert [(await client.hear())[2] for _ in range(50)] == [b"%d" % n for n in range(50)]


async def test_what_is_pipelined_behind_a_stream_waits_and_is_not_read_on_for_ever() -> None:
    go_on = asyncio.Event()

    async def stream(request: Request, reply: Reply) -> None:
        reply.start(200, ())
        reply.write(b"first")
        await go_on.wait()
        reply.end(b"last")

    async with serving(stream) as served:
        client = await served.connect()
        client.say(post(b"1"))
        await client.reader.readuntil(b"first\r\n")
        body = b"x" * (LIMIT - 1)
        sent = 0
        # Until the kernel's buffers are full: the drain never ends.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.3):
                while sent < 100_000_000:
                    client.say(post(body) * 100)
                    sent += 100 * LIMIT
                    await client.writer.drain()
        assert sent < 100_000_000
        go_on.set()
        assert await client.reader.readuntil(b"last\r\n0\r\n\r\n")
        assert (await client.hear())[2] == b"firstlast"
        client.writer.transport.abort()


@pytest.mark.parametrize(
    "garbage",
    [
        b"hello\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
async def test_what_is_not_http_is_refused_and_hung_up_on(garbage: bytes) -> None:
    async with serving() as served:
        client = await served.connect()
        client.say(post(b"good"), garbage)
        assert (await client.hear())[2] == b"POST /p good"
        assert (await client.error())[0] == 400
        assert await client.ended()


async def test_bodies_have_a_limit_announced_or_not() -> None:
    async with serving() as served:
        client = await served.connect()
        client.say(post(b"x" * LIMIT))
        assert (await client.hear())[0] == 200
        client.say(post(b"x" * (LIMIT + 1)))
        assert await client.error() == (413, "request_too_large")
        assert await client.ended()

        client = await served.connect()
        client.say(b"POST /p HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(LIMIT // 100 + 1):
            client.say(b"64\r\n" + b"x" * 100 + b"\r\n")
        assert await client.error() == (413, "request_too_large")


async def test_a_client_that_is_still_sending_finds_its_refusal() -> None:
    async with serving() as served:
        client = await served.connect()
        client.say(post(b"x" * 50_000_000))  # more than any buffer holds
        await client.writer.drain()
        assert await client.error() == (413, "request_too_large")


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"x" * MANY,
        b"GET / HTTP/1.1\r\nx-long: " + b"x" * MANY,
        b"GET / HTTP/1.1\r\n" + b"x-many: x\r\n" * (MANY // 10),
        b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx: " + b"x" * MANY,
    ],
    ids=["url", "one header", "many headers", "trailer"],
)
async def test_heads_have_a_limit(head: bytes) -> None:
    async with serving() as served:
        client = await served.connect()
        client.say(head)
        assert await client.error() == (431, "headers_too_large")
        assert await client.ended()


async def test_a_client_may_ask_before_it_sends() -> None:
    async with serving() as served:
        client = await served.connect()
        head = b"POST /p HTTP/1.1\r\nhost: h\r\nexpect: 100-continue\r\ncontent-length: %d\r\n\r\n"
        client.say(head % 3)
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.say(b"abc")
        assert (await client.hear())[2] == b"POST /p abc"
        client.say(head % (LIMIT + 1))
        assert await client.error() == (413, "request_too_large")


async def test_old_clients_and_those_that_want_no_more_get_a_close() -> None:
    async with serving() as served:
        client = await served.connect()
        client.say(post(b"x", b"/p", b"connection: close"))
        status, headers, _ = await client.hear()
        assert (status, headers[b"connection"]) == (200, b"close")
        assert await client.ended()

        client = await served.connect()
        client.say(b"GET /p HTTP/1.0\r\n\r\n")
        assert (await client.hear())[1][b"connection"] == b"close"
        assert await client.ended()


async def test_a_stream_to_an_old_client_ends_with_its_connection() -> None:
    async def stream(request: Request, reply: Reply) -> None:
        reply.start(200, ())
        reply.write(b"a")
        reply.end(b"b")

    async with serving(stream) as served:
        client = await served.connect()
        client.say(b"GET /p HTTP/1.0\r\nconnection: keep-alive\r\n\r\n")
        status, headers, body = await client.hear()
        assert (status, headers[b"connection"], body) == (200, b"close", b"ab")


async def test_a_request_to_upgrade_is_a_request() -> None:
    async with serving() as served:
        client = await served.connect()
        client.say(b"GET /p HTTP/1.1\r\nhost: h\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n")
        assert (await client.hear())[2] == b"GET /p "
        client = await served.connect()
        client.say(b"HEAD http://h/p HTTP/1.1\r\nhost: h\r\n\r\n" + post(b"x"))
        head = await client.reader.readuntil(b"\r\n\r\n")
        assert b"content-length: 8" in head
        assert (await client.hear())[2] == b"POST /p x"


async def test_a_slow_reader_stops_who_writes_and_is_told_when_to_go_on() -> None:
    flow: list[bool] = []
    full, caught_up = asyncio.Event(), asyncio.Event()
    written = 0

    async def flood(request: Request, reply: Reply) -> None:
        nonlocal written

        def tell(paused: bool) -> None:
            flow.append(paused)
            (full if paused else caught_up).set()

        reply.on_flow = tell
        reply.start(200, ())
        while reply.writable:
            reply.write(b"x" * 10_000)
            written += 10_000
            await asyncio.sleep(0)
        await caught_up.wait()
        reply.end()

    async with serving(flood) as served:
        client = await served.connect()
        client.say(post(b""))
        await full.wait()
        assert flow == [True]
        _, _, body = await client.hear()
        assert len(body) == written
        assert flow == [True, False]


async def test_a_client_that_never_reads_is_given_up() -> None:
    given_up = asyncio.Event()

    async def flood(request: Request, reply: Reply) -> None:
        reply.on_gone = given_up.set
        reply.start(200, ())
        while reply.writable:
            reply.write(b"x" * 10_000)
            await asyncio.sleep(0)
        await given_up.wait()
        reply.end()

    limits = HttpLimits(stalled_seconds=0.01, sweep_seconds=0.01)
    async with serving(flood, limits=limits) as served:
        client = await served.connect()
        client.say(post(b""))
        await given_up.wait()
        assert served.server.counters.stalled == 1
        client.writer.close()


async def test_a_client_that_reads_late_is_not_taken_for_silent() -> None:
    """Its kernel acknowledges what it has, and says that there is no room for more."""
    full = asyncio.Event()

    async def flood(request: Request, reply: Reply) -> None:
        caught_up = asyncio.Event()

        def tell(paused: bool) -> None:
            if not paused:
                caught_up.set()

        reply.on_flow = tell
        reply.start(200, ())
        while reply.writable:
            reply.write(b"x" * 10_000)
            await asyncio.sleep(0)
        full.set()
        await caught_up.wait()
        reply.end()

    limits = HttpLimits(silent_seconds=0.1, sweep_seconds=0.01)
    async with serving(flood, limits=limits) as served:
        client = await served.connect()
        client.say(post(b""))
        await full.wait()
        await asyncio.sleep(0.5)  # it reads nothing meanwhile
        status, _, body = await client.hear()
        assert (status, set(body)) == (200, {ord("x")})
        assert served.server.counters.silent == 0


async def test_a_client_that_hangs_up_is_noticed_at_once() -> None:
    gone = asyncio.Event()
    tried = asyncio.Event()

    async def wait(request: Request, reply: Reply) -> None:
        reply.on_gone = gone.set
        reply.start(200, ())
        reply.write(b"x")
        await gone.wait()
        assert reply.gone
        reply.write(b"nobody reads this")
        reply.end()
        tried.set()

    async with serving(wait) as served:
        client = await served.connect()
        client.say(post(b""))
        await client.reader.readuntil(b"x\r\n")
        client.writer.close()
        await tried.wait()


async def test_a_handler_that_fails_costs_its_request_and_no_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail(request: Request, reply: Reply) -> None:
        if request.path == "/late":
            reply.start(200, ())
            reply.write(b"x")
        raise ValueError("on purpose")

    async with serving(fail) as served:
        client = await served.connect()
        client.say(post(b""))
        assert await client.error() == (500, "internal_error")
        client.say(post(b"", b"/late"))
        with pytest.raises(asyncio.IncompleteReadError):  # not taken for a whole answer
            await client.reader.readuntil(b"0\r\n\r\n")
    assert "on purpose" in caplog.text


async def test_a_client_that_says_nothing_is_hung_up_on() -> None:
    answer = asyncio.Event()

    async def wait(request: Request, reply: Reply) -> None:
        await answer.wait()
        reply.send(200, b"late")

    limits = HttpLimits(idle_seconds=0.01, body_seconds=0.01, sweep_seconds=0.01)
    async with serving(wait, limits=limits) as served:
        busy, idle, half = [await served.connect() for _ in range(3)]
        busy.say(post(b""))
        half.say(post(b"x")[:-1])
        assert await idle.ended()
        assert await half.error() == (408, "request_timeout")
        assert await half.ended()
        answer.set()  # the server's own time does not count
        assert (await busy.hear())[2] == b"late"


async def test_an_end_waits_for_what_runs() -> None:
    begun, answer = asyncio.Event(), asyncio.Event()

    async def wait(request: Request, reply: Reply) -> None:
        begun.set()
        await answer.wait()
        reply.send(200, b"done")

    async with serving(wait) as served:
        idle, busy = await served.connect(), await served.connect()
        busy.say(post(b""))
        await begun.wait()
        closing = asyncio.create_task(served.server.close(10.0))
        assert await idle.ended()
        answer.set()
        assert (await busy.hear())[2] == b"done"
        await closing
        assert await busy.ended()
