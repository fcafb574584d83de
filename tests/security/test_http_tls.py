"""The HTTP server by TLS: the same limits, and who can have read a request."""

from __future__ import annotations

import asyncio
import socket
import ssl
import tempfile
from pathlib import Path

import pytest
import trustme

from memserve.api.http_limits import HttpLimits
from memserve.api.http_message import Reply, Request
from memserve.api.http_server import HttpServer
from memserve.api.serving import Shutdown, bind, serve_http, url_of
from tests.http_harness import LOOPS, Conversation, post, serving
from tests.waiting import until

pytestmark = pytest.mark.filterwarnings("ignore:Overriding the")


@pytest.fixture(params=LOOPS, scope="module")
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    policy: asyncio.AbstractEventLoopPolicy = request.param()
    return policy


@pytest.fixture(scope="module")
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The server's and a client's that trusts it."""
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", "localhost").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    return server, client


async def _say_private(request: Request, reply: Reply) -> None:
    reply.send(200, b"%r %b" % (request.private, request.body[:10]))


async def test_requests_and_refusals_are_those_of_plain_http(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    server, client = contexts
    async with serving(_say_private, limit=200_000, tls=server) as served:
        one = await served.connect(client)
        for _ in range(3):
            one.say(post(b"x" * 150_000))
            assert (await one.hear())[2] == b"True xxxxxxxxxx"
        one.say(post(b"1") * 50)
        for _ in range(50):
            assert (await one.hear())[2] == b"True 1"
        for bad, status in [
            (b"GET / HTTP/1.1\r\n\r\n", 400),
            (post(b"x" * 200_001), 413),
            (b"GET / HTTP/1.1\r\nx: " + b"x" * 100_000, 431),
        ]:
            another = await served.connect(client)
            another.say(bad)
            assert (await another.error())[0] == status
            another.writer.close()
        one.writer.close()


async def test_who_speaks_no_tls_gets_nothing(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    server, client = contexts
    async with serving(_say_private, tls=server) as served:
        plain = await served.connect()
        plain.say(post(b"x"))
        with pytest.raises(asyncio.IncompleteReadError):
            await plain.hear()
        stranger = ssl.create_default_context()
        with pytest.raises(ssl.SSLCertVerificationError):
            await served.connect(stranger)
        one = await served.connect(client)
        one.say(post(b"x"))
        assert (await one.hear())[0] == 200
        one.writer.close()


async def test_a_handshake_has_its_time(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    server, _ = contexts
    async with serving(tls=server, limits=HttpLimits(handshake_seconds=0.02)) as served:
        silent = await served.connect()
        assert await silent.ended()


async def test_limits_hold_by_tls_too(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    server, client = contexts
    limits = HttpLimits(connections=1, head_seconds=0.2, sweep_seconds=0.005)
    async with serving(tls=server, limits=limits) as served:
        one = await served.connect(client)
        one.say(b"GET / HT")
        await until(lambda: served.server.held_bytes > 0, "half a head")
        one_more = await served.connect(client)
        assert (await one_more.hear())[0] == 503
        assert await one.error() == (408, "request_timeout")
        one.writer.close()
        one_more.writer.close()


async def test_the_end_of_what_is_sent_is_the_end_of_the_connection(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    server, client = contexts
    gone, begun = asyncio.Event(), asyncio.Event()

    async def wait(request: Request, reply: Reply) -> None:
        reply.on_gone = gone.set
        begun.set()
        await gone.wait()
        reply.send(200, b"")

    async with serving(wait, tls=server) as served:
        one = await served.connect(client)
        one.say(post(b"x"))
        await begun.wait()
        one.writer.close()
        await gone.wait()
        await until(lambda: served.server.connections == 0, "the end")


async def test_serving_by_tls_says_so_in_the_address(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    server, client = contexts
    sock, shutdown = bind("127.0.0.1", 0), Shutdown()
    host, port = sock.getsockname()
    assert url_of(sock, tls=True) == f"https://127.0.0.1:{port}"
    assert url_of(sock) == f"http://127.0.0.1:{port}"

    async def drain() -> None: ...

    running = asyncio.create_task(serve_http(_say_private, sock, shutdown, drain, 1000, tls=server))
    one = Conversation(*await asyncio.open_connection(host, port, ssl=client))
    one.say(post(b"x"))
    assert (await one.hear())[2] == b"True x"
    shutdown.request()
    await running


# --- who else can have read a request


async def _private(sock: socket.socket, connect: tuple[str, int] | str) -> bytes:
    server = HttpServer(_say_private, 1000)
    await server.start(sock, 16)
    if isinstance(connect, str):
        client = Conversation(*await asyncio.open_unix_connection(connect))
    else:
        client = Conversation(*await asyncio.open_connection(*connect))
    client.say(post(b""))
    answer = (await client.hear())[2]
    client.writer.close()
    await server.close(1.0)
    return answer.strip()


async def test_requests_from_this_machine_are_private_and_others_are_not() -> None:
    sock = bind("127.0.0.1", 0)
    assert await _private(sock, sock.getsockname()) == b"True"
    sock = bind("0.0.0.0", 0)
    assert await _private(sock, ("127.0.0.1", sock.getsockname()[1])) == b"True"
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "s")
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(path)
        sock.listen()
        assert await _private(sock, path) == b"True"
    own = _own_address()
    if own is None:
        pytest.skip("this machine has no address but its loopback's: run it where it has one")
    sock = bind("0.0.0.0", 0)
    assert await _private(sock, (own, sock.getsockname()[1])) == b"False"


def _own_address() -> str | None:
    """Of an interface that is not the loopback's; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # TEST-NET-1, RFC 5737
        except OSError:
            return None
        address = str(probe.getsockname()[0])
    return None if address.startswith("127.") else address
