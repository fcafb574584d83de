"""A gateway of several processes, in front of backends that echo."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import pytest

from memserve.api.audience import Audience
from memserve.api.serving import Shutdown, bind, url_of
from memserve.api.signatures import Verifier
from memserve.bench.gateway_process import MODULE, Backend
from memserve.config import GatewayConfig
from memserve.errors import ClusterError
from memserve.gateway.workers import Workers
from memserve.secrets import cluster_secret
from tests.insider import peers

MANY = 40  # connections: that all of them come to one worker is as good as impossible
LONGEST = 60.0  # seconds for a process to start on a busy machine
_served = re.compile(
    r'memserve_requests_total\{endpoint="/v1/completions",status="200",worker="(\d)"\} (\d+)'
)


@asynccontextmanager
async def backend(gap: float = 0.0) -> AsyncIterator[str]:
    loop = asyncio.get_running_loop()
    sock = bind("127.0.0.1", 0)
    audience = Audience()
    audience.add_socket(sock)
    verifier = Verifier(cluster_secret(), audience)
    server = await loop.create_server(lambda: Backend(loop, gap, verifier), sock=sock)
    try:
        yield url_of(sock)
    finally:
        server.close()


class Gateway:
    """Two workers, and a client that opens a connection for each request."""

    def __init__(self, workers: Workers, client: aiohttp.ClientSession) -> None:
        self.workers = workers
        self._client = client

    async def ask(self, method: str, path: str, **body: Any) -> tuple[int, str]:
        url = self.workers.url + path
        if path.startswith("/cluster"):
            # A client of its own each time: each connection comes to one of the workers.
            async with peers() as client:
                answer = await client.ask(method, url, json.dumps(body).encode() if body else b"")
                return answer.status, answer.body.decode()
        async with self._client.request(method, url, json=body or None) as response:
            return response.status, await response.text()

    async def generate(self, chunks: int = 2) -> str:
        """An answer whose last word is DONE."""
        asked = {"prompt": [1, 2, 3], "max_tokens": chunks, "stream": True}
        status, text = await self.ask("POST", "/v1/completions", **asked)
        assert status == 200, text
        assert text.endswith("data: [DONE]\n\n")
        return text

    async def members(self) -> list[set[str]]:
        """Addresses, as both workers know them, each several times."""
        found = await asyncio.gather(*(self.ask("GET", "/cluster") for _ in range(MANY)))
        return [set(re.findall(r'"address":"([^"]+)"', text)) for _, text in found]

    async def served(self) -> dict[str, int]:
        """Requests answered, by worker."""
        _, text = await self.ask("GET", "/metrics")
        return {worker: int(float(count)) for worker, count in _served.findall(text)}


@asynccontextmanager
async def running(*members: str) -> AsyncIterator[Gateway]:
    config = GatewayConfig(port=0, workers=2)
    command = ["gateway", "prompt-tree", "2", *members]
    workers = Workers(config, command, Shutdown(), module=MODULE)
    connector = aiohttp.TCPConnector(force_close=True, limit=0)
    async with aiohttp.ClientSession(connector=connector) as client:
        try:
            async with asyncio.timeout(LONGEST):
                await workers.start()
            yield Gateway(workers, client)
        finally:
            await workers.stop()


async def test_the_load_is_that_of_all_workers() -> None:
    async with AsyncExitStack() as stack:
        member = await stack.enter_async_context(backend(gap=0.05))
        gateway = await stack.enter_async_context(running(member))
        highest = 0
        async with asyncio.TaskGroup() as group:
            for _ in range(MANY):
                group.create_task(gateway.generate(chunks=200))
            for _ in range(200):
                _, text = await gateway.ask("GET", "/load")
                highest = max(highest, json.loads(text)["server_load"])
                if highest == MANY:
                    break
        assert highest == MANY
        assert await gateway.ask("GET", "/load") == (200, '{"server_load":0}')


async def test_workers_are_one_gateway() -> None:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(backend())
        second = await stack.enter_async_context(backend())
        gateway = await stack.enter_async_context(running(first))
        # Each takes a part of the requests, and any of them tells of all.
        async with asyncio.TaskGroup() as group:
            for _ in range(MANY):
                group.create_task(gateway.generate())
        served = await gateway.served()
        assert set(served) == {"0", "1"}
        assert sum(served.values()) == MANY
        _, decisions = await gateway.ask("GET", f"/cluster/decisions?n={MANY + 1}")
        times = [float(at) for at in re.findall(r'"at":([0-9.]+)', decisions)]
        assert len(times) == MANY
        assert times == sorted(times, reverse=True)
        _, figures = await gateway.ask("GET", "/cluster/stats")
        answered = [int(count) for count in re.findall(r'"answered":([0-9]+)', figures)]
        assert (len(answered), sum(answered)) == (2, MANY)
        _, metrics = await gateway.ask("GET", "/metrics")
        assert metrics.count('memserve_instance_running_sequences{instance_id="echo"}') == 1
        # What one is told of members, all know.
        assert await gateway.members() == [{first}] * MANY
        assert (await gateway.ask("POST", "/cluster/members", address=second))[0] == 200
        assert await gateway.members() == [{first, second}] * MANY
        assert (await gateway.ask("DELETE", "/cluster/members", address=second))[0] == 200
        assert await gateway.members() == [{first}] * MANY
        assert (await gateway.ask("DELETE", "/cluster/members", address=second))[0] == 404


async def test_a_killed_worker_comes_back_and_knows_the_members() -> None:
    async with backend() as address, running() as gateway:
        supervising = asyncio.ensure_future(gateway.workers.supervise())
        # Once, as people do it: nobody says it again.
        assert (await gateway.ask("POST", "/cluster/members", address=address))[0] == 200
        before = gateway.workers.pids()
        killed = gateway.workers._workers[0].child
        os.kill(killed.pid, signal.SIGKILL)
        await asyncio.shield(killed.ended)  # and with it its socket
        served: dict[str, int] = {}
        async with asyncio.timeout(LONGEST):
            while "0" not in served:  # none that reaches either of them fails
                await gateway.generate()
                served = await gateway.served()
        assert await gateway.members() == [{address}] * MANY
        after = gateway.workers.pids()
        assert (after[0] != before[0], after[1]) == (True, before[1])
        supervising.cancel()


async def test_workers_end_when_their_requests_have() -> None:
    async with backend(gap=0.05) as address, running(address) as gateway:
        supervising = asyncio.ensure_future(gateway.workers.supervise())
        running_requests = [asyncio.ensure_future(gateway.generate(chunks=100)) for _ in range(8)]
        async with asyncio.timeout(LONGEST):
            while json.loads((await gateway.ask("GET", "/load"))[1])["server_load"] < 8:
                pass  # a worker refuses what comes after it was asked to end
        await gateway.workers.stop()
        for request in running_requests:
            assert (await request).count('"text":" word"') == 100
        await supervising  # they have ended as they were asked to


async def test_a_port_that_is_taken_is_named() -> None:
    with bind("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        workers = Workers(GatewayConfig(port=port, workers=2), [], Shutdown(), module=MODULE)
        with pytest.raises(ClusterError, match=f"{port}: Address already in use"):
            await workers.start()
        await workers.stop()
