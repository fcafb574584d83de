"""The benchmark's own two ends, against each other and without a gateway."""

from __future__ import annotations

import asyncio
import os
import sys
from subprocess import PIPE, Popen
from urllib.parse import urlsplit

import pytest

from memserve.api.audience import Audience
from memserve.api.serving import bind, url_of
from memserve.api.signatures import Verifier
from memserve.bench.gateway import FEW, MANY, GatewayRun, _cpu_seconds, _figures
from memserve.bench.gateway_process import Backend, LoadConfig, LoadSeen, _Load, _relay
from memserve.secrets import cluster_secret


async def seen(gap: float, chunks: int, texts: bool = False) -> LoadSeen:
    loop = asyncio.get_running_loop()
    sock = bind("127.0.0.1", 0)
    audience = Audience()
    audience.add_socket(sock)
    verifier = Verifier(cluster_secret(), audience)
    server = await loop.create_server(lambda: Backend(loop, gap, verifier), sock=sock)
    try:
        host, port = sock.getsockname()
        return await _Load(LoadConfig(host, port, 4, chunks, 0.05, 20, texts)).run()
    finally:
        server.close()


async def test_every_stream_gets_the_chunks_that_it_asked_for() -> None:
    for texts in (False, True):
        answered = await seen(0.0, 8, texts)
        assert answered.requests >= 4
        assert answered.failed == 0


async def test_paced_chunks_arrive_one_by_one() -> None:
    answered = await seen(0.002, 8)
    assert answered.failed == 0
    # Seven gaps to a stream; [DONE] may come with the last chunk or behind it.
    assert 7 <= len(answered.gaps) / answered.requests <= 8
    assert sorted(answered.gaps)[len(answered.gaps) // 2] >= 0.001


async def test_the_relay_passes_on_what_both_sides_say(capsys: pytest.CaptureFixture[str]) -> None:
    loop = asyncio.get_running_loop()
    sock = bind("127.0.0.1", 0)
    backend = await loop.create_server(lambda: Backend(loop, 0.0), sock=sock)
    relay = asyncio.create_task(_relay(url_of(sock)))
    printed = ""
    while not printed:
        await asyncio.sleep(0.001)
        printed = capsys.readouterr().out
    parts = urlsplit(printed.strip())
    assert parts.port not in (None, sock.getsockname()[1])
    try:
        answered = await _Load(LoadConfig("127.0.0.1", parts.port or 0, 4, 8, 0.05, 20)).run()
    finally:
        relay.cancel()
        backend.close()
    assert answered.requests >= 4
    assert answered.failed == 0


def test_a_chunk_costs_what_more_of_them_cost_more() -> None:
    def run(cpu: float) -> GatewayRun:
        return GatewayRun(1, 1.0, cpu, 1.0, 1.0)

    figures = _figures("x", [(run(50.0), run(100.0), run(100.0 + 3.0 * (MANY - FEW)))])
    assert figures.cpu_us_per_request == 50.0
    assert figures.paced_cpu_us_per_request == 100.0
    assert figures.cpu_us_per_chunk == 3.0


_BUSY = """
import sys, time
while time.process_time() < 0.3: pass
print(flush=True)
sys.stdin.read()
"""


def test_the_time_of_a_process_and_its_workers_is_read() -> None:
    me = os.getpid()
    before = _cpu_seconds(me)
    with Popen([sys.executable, "-S", "-c", _BUSY], stdin=PIPE, stdout=PIPE) as worker:
        assert worker.stdout is not None
        worker.stdout.readline()
        assert 0.25 <= _cpu_seconds(worker.pid) < 2.0
        assert _cpu_seconds(me) >= before + 0.25
    assert _cpu_seconds(me) >= before + 0.25  # and it has not forgotten those that have ended
