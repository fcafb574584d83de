"""Requests that other servers and clients would read differently, and those that have to work."""

from __future__ import annotations

import asyncio
import json

import pytest

from memserve.api.http_message import Reply, Request
from memserve.api.http_parser import MAX_HEAD_BYTES, MAX_HEADERS
from tests.http_harness import LOOPS, Conversation, post, serving

pytestmark = pytest.mark.filterwarnings("ignore:Overriding the")
# What Java's HttpClient sends with every request to an http:// address, POST included.
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"
CHUNKED = (
    b"POST /p HTTP/1.1\r\nhost: h\r\n%btransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
)
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nhost: h\r\n\r\n"


@pytest.fixture(params=LOOPS, scope="module")
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    policy: asyncio.AbstractEventLoopPolicy = request.param()
    return policy


def _offering(body: bytes) -> bytes:
    return b"POST /p HTTP/1.1\r\nHost: h\r\n%bContent-Length: %d\r\n\r\n%b" % (H2C, len(body), body)


# --- upgrades


@pytest.mark.parametrize("pieces", [1, 2, 3, 1000], ids=["whole", "halves", "thirds", "bytes"])
@pytest.mark.parametrize("request_", [_offering(b"abc"), CHUNKED % H2C], ids=["length", "chunked"])
async def test_an_offer_to_upgrade_is_ignored_and_the_request_served(
    request_: bytes, pieces: int
) -> None:
    size = -(-len(request_) // pieces)
    async with serving() as served:
        client = await served.connect()
        for _ in range(2):  # the connection goes on as HTTP/1.1
            for at in range(0, len(request_), size):
                client.say(request_[at : at + size])
                await client.writer.drain()
                await asyncio.sleep(0)
            status, headers, body = await client.hear()
            assert (status, body) == (200, b"POST /p abc")
            assert b"upgrade" not in headers
            assert b"connection" not in headers


async def test_offers_may_be_pipelined() -> None:
    async with serving() as served:
        client = await served.connect()
        client.say(b"".join(_offering(b"%d" % n) + post(b"plain") for n in range(100)))
        for number in range(100):
            assert (await client.hear())[2] == b"POST /p %d" % number
            assert (await client.hear())[2] == b"POST /p plain"


async def test_an_offer_hides_no_error_behind_it() -> None:
    async with serving() as served:
        for bad, status in [
            (_offering(b"x" * 1001), 413),
            (_offering(b"abc").replace(b"Content-Length: 3", b"Content-Length: x"), 400),
            (_offering(b"abc").replace(b"Host: h\r\n", b""), 400),
            (CHUNKED.replace(b"chunked\r\n\r\n3", b"gzip, chunked\r\n\r\n3") % H2C, 501),
            (CHUNKED.replace(b"3\r\nabc", b"z\r\nabc") % H2C, 400),
        ]:
            client = await served.connect()
            client.say(bad)
            assert (await client.error())[0] == status
            assert await client.ended()


async def test_a_client_that_offers_may_ask_before_it_sends() -> None:
    async with serving() as served:
        client = await served.connect()
        head, body = _offering(b"abc").replace(b"Host", b"Expect: 100-continue\r\nHost"), b"abc"
        client.say(head.removesuffix(body))
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.say(body)
        assert (await client.hear())[2] == b"POST /p abc"


async def test_nobody_gets_a_tunnel() -> None:
    async with serving() as served:
        client = await served.connect()
        client.say(b"CONNECT h:443 HTTP/1.1\r\nhost: h\r\n\r\n" + SMUGGLED)
        assert await client.error() == (405, "method_not_allowed")
        assert await client.ended()


# --- what is not one request to everybody


@pytest.mark.parametrize(
    ("bad", "status"),
    [
        (b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd", 400),
        (b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 3\r\ncontent-length: 3\r\n\r\nabc", 400),
        (b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 3, 3\r\n\r\nabc", 400),
        (b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: +3\r\n\r\nabc", 400),
        (b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length:\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 99999999999999999999\r\n\r\n", 400),
        (CHUNKED % b"content-length: 3\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked, gzip\r\n\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: gzip\r\n\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: xchunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding:\r\n\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
        (CHUNKED % b"transfer-encoding: gzip\r\n", 501),
        (b"POST / HTTP/1.0\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"GET / HTTP/1.1\nhost: h\n\n", 400),
        (b"GET / HTTP/1.1\r\nhost: h\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: h\rx: y\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: h\r\nx: a\r\n b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost : h\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n host: h\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: h\r\nx: \x00\r\n\r\n", 400),
        ((CHUNKED % b"").replace(b"3\r\nabc", b"3\nabc"), 400),
        ((CHUNKED % b"").replace(b"3\r\nabc", b"3\r\nabcd"), 400),
        ((CHUNKED % b"").replace(b"3\r\nabc", b"-3\r\nabc"), 400),
        ((CHUNKED % b"").replace(b"3\r\nabc", b"fffffffffffffffff\r\nabc"), 400),
        (b"GET /\r\n\r\n", 505),
        (b"GET / HTTP/0.9\r\nhost: h\r\n\r\n", 505),
        (b"GET / HTTP/2.0\r\nhost: h\r\n\r\n", 505),
        (b"GET / HTTP/1.2\r\nhost: h\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: h\r\nhost: h\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: a b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: a/b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: u@h\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: h:port\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: [::1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: ::1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: h\xc3\xa9\r\n\r\n", 400),
        (b"GET / HTTP/1.0\r\nhost: a b\r\n\r\n", 400),
    ],
)
async def test_what_is_ambiguous_or_wrong_is_refused_with_all_behind_it(
    bad: bytes, status: int
) -> None:
    seen: list[str] = []

    async def handle(request: Request, reply: Reply) -> None:
        seen.append(request.path)
        reply.send(200, b"")

    async with serving(handle) as served:
        for parts in ([bad + SMUGGLED], [bad, SMUGGLED], [bad[:-2], bad[-2:] + SMUGGLED]):
            client = await served.connect()
            for part in parts:
                client.say(part)
                await asyncio.sleep(0)
            assert (await client.error())[0] == status
            assert await client.ended()
    assert seen == []
    assert served.server.counters.malformed == 3


@pytest.mark.parametrize(
    "host", [b"h", b"h:8000", b"", b"127.0.0.1", b"[::1]:80", b"a_b.local", b"h:", b"%41", b"h \t"]
)
async def test_hosts_that_are_valid_are_taken(host: bytes) -> None:
    async with serving() as served:
        client = await served.connect()
        client.say(b"GET /p HTTP/1.1\r\nHost: %b\r\n\r\n" % host)
        assert (await client.hear())[0] == 200
        client.say(b"GET http://other/p HTTP/1.1\r\nHost: %b\r\n\r\n" % host)
        assert (await client.hear())[2] == b"GET /p "


async def test_old_clients_need_no_host_and_get_no_interim_answer() -> None:
    async with serving() as served:
        client = await served.connect()
        client.say(b"POST /p HTTP/1.0\r\nexpect: 100-continue\r\ncontent-length: 3\r\n\r\n", b"abc")
        assert (await client.hear())[2] == b"POST /p abc"


# --- white space, and sizes


async def test_white_space_around_a_value_is_no_part_of_it() -> None:
    seen: list[tuple[bytes, bytes]] = []

    async def handle(request: Request, reply: Reply) -> None:
        seen.extend(request.headers)
        reply.send(200, request.body)

    async with serving(handle) as served:
        client = await served.connect()
        client.say(
            b"POST / HTTP/1.1\r\nHost: h \r\nX-Session-Id: \t s s \t \r\nX-Empty: \t\r\n"
            b"Content-Length: 3 \r\nExpect: 100-continue \r\n\r\n"
        )
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.say(b"abc")
        assert (await client.hear())[2] == b"abc"
        client.say(b"POST / HTTP/1.1\r\nhost:h\r\ntransfer-encoding: chunked \r\n\r\n0\r\n\r\n")
        assert (await client.hear())[0] == 200
    assert (b"x-session-id", b"s s") in seen
    assert (b"x-empty", b"") in seen


async def _refused_head(client: Conversation, head: bytes) -> None:
    client.say(head)
    assert await client.error() == (431, "headers_too_large")
    assert await client.ended()


def _head(headers: int, size: int) -> bytes:
    """A head of exactly so many bytes, with so many headers and Host."""
    line = b"GET / HTTP/1.1\r\nhost: h\r\n"
    rest = b"".join(b"a:\r\n" for _ in range(headers - 1))
    return b"%b%bb: %b\r\n\r\n" % (line, rest, b"x" * (size - len(line) - len(rest) - 7))


async def test_what_separates_headers_counts_and_so_do_they() -> None:
    async with serving() as served:
        client = await served.connect()
        for fits in (_head(MAX_HEADERS - 1, 5000), _head(1, MAX_HEAD_BYTES)):
            client.say(fits)
            assert (await client.hear())[0] == 200
        await _refused_head(client, _head(1, MAX_HEAD_BYTES + 1))
        await _refused_head(await served.connect(), _head(MAX_HEADERS, 5000))
        # Never complete: nothing waits for the end.
        many = b"GET / HTTP/1.1\r\nhost: h\r\n" + b"a:\r\n" * (MAX_HEAD_BYTES // 2)
        await _refused_head(await served.connect(), many)


async def test_what_an_answer_repeats_is_bounded() -> None:
    async def not_found(request: Request, reply: Reply) -> None:
        from memserve.api.errors import path_not_found

        reply.send_error(path_not_found(request.path))

    async with serving(not_found) as served:
        client = await served.connect()
        for bad in (
            b"GET /%b HTTP/1.1\r\nhost: h\r\n\r\n" % (b"y" * 60_000),
            b"GET / HTTP/1.1\r\nhost: %b/\r\n\r\n" % (b"y" * 60_000),
        ):
            client.say(bad)
            _, _, body = await client.hear()
            assert len(json.loads(body)["error"]["message"]) <= 256
