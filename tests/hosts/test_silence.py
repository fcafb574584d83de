"""A client whose host is lost ends no connection; the server stops computing for it regardless."""

from __future__ import annotations

import asyncio
import socket

import uvloop

from memserve.api.http_limits import HttpLimits
from memserve.api.http_message import Reply, Request
from memserve.api.http_server import HttpServer
from tests.hosts_harness import Host, Hosts
from tests.waiting import PATIENCE

PORT = 7000
# Some of TCP's retransmissions: a cable that is mended in time is none.
LIMITS = HttpLimits(silent_seconds=2.0, sweep_seconds=0.05)


async def stream_to(client: Host, server: Host, lost: bool) -> tuple[bool, int]:
    """Whether the server gave up a client whose link was cut, for a while or for good; and how
    many it has counted."""
    ended, gone = asyncio.Event(), asyncio.Event()

    async def answer(request: Request, reply: Reply) -> None:
        reply.on_gone = gone.set
        reply.start(200, ())
        while not gone.is_set() and not ended.is_set():
            reply.write(b"a token\n")
            await asyncio.sleep(0.01)
        reply.end()

    serving = HttpServer(answer, max_body_bytes=1024, limits=LIMITS)
    with server.entered():  # a socket stays in the network in which it was made
        await serving.start(socket.create_server((server.address, PORT)), 16)
    with client.entered():
        sock = socket.create_connection((server.address, PORT))
    sock.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=sock)
    writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    await reader.readuntil(b"a token")
    client.cut()
    if lost:
        await asyncio.wait_for(gone.wait(), PATIENCE)
    else:
        await asyncio.sleep(LIMITS.silent_seconds / 4)
        client.mend()
        for _ in range(100):
            await asyncio.wait_for(reader.readuntil(b"a token"), PATIENCE)
    found = gone.is_set(), serving.counters.silent
    ended.set()
    writer.close()
    await serving.close(0.1)
    return found


def test_a_lost_client_is_given_up(hosts: Hosts) -> None:
    assert uvloop.run(stream_to(hosts["A"], hosts["B"], lost=True)) == (True, 1)


def test_a_client_behind_a_mended_link_is_not(hosts: Hosts) -> None:
    assert uvloop.run(stream_to(hosts["A"], hosts["B"], lost=False)) == (False, 0)
