"""Endpoints of an instance as handlers: methods, bodies that are too large, slow readers."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
from starlette.requests import Request as StarletteRequest

from memserve.api.control import MAX_CONTROL_BYTES, ROLE_PATH
from memserve.api.errors import ApiError
from memserve.api.handoff import MEET_PATH
from memserve.api.http_message import Request
from memserve.clock import MonotonicClock
from memserve.gateway.asgi import read_body
from memserve.instance.app import InstanceApp, _stream
from memserve.instance.dispatcher import Run
from memserve.instance.instance import Instance
from memserve.instance.parts import Identity
from memserve.types import Epoch, InstanceId, Role
from tests.gateway_harness import Client


@pytest.fixture
async def app() -> InstanceApp:
    identity = Identity(InstanceId("i"), Epoch(1), Role.COLOCATED, "tiny")
    return InstanceApp(Instance(identity, MonotonicClock()))


async def ask(app: InstanceApp, method: str, path: str, body: bytes = b"") -> Client:
    headers = [(b"content-type", b"application/msgpack")]
    request = Request(method, path, b"", headers, body, False, True, path.encode())
    client = Client(request)
    await app.handle(request, client.reply)
    assert client.reply.ended
    return client


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/live", 200),
        ("HEAD", "/live", 200),
        ("POST", "/live", 405),
        ("GET", ROLE_PATH, 405),
        ("HEAD", ROLE_PATH, 405),
        ("GET", "/nowhere", 404),
    ],
)
async def test_each_path_has_its_method(
    app: InstanceApp, method: str, path: str, status: int
) -> None:
    client = await ask(app, method, path)
    assert client.reply.status == status
    if method == "HEAD":
        assert all(data.endswith(b"\r\n\r\n") for data in client.writes)  # no body


@pytest.mark.parametrize("path", [ROLE_PATH, MEET_PATH])
async def test_a_call_that_is_too_large_is_refused_undecoded(app: InstanceApp, path: str) -> None:
    client = await ask(app, "POST", path, b"x" * (MAX_CONTROL_BYTES + 1))
    assert (client.reply.status, b"request_too_large" in client.body) == (413, True)
    client = await ask(app, "POST", path, b"x" * MAX_CONTROL_BYTES)
    assert client.reply.status == 400


@pytest.mark.parametrize(("size", "fits"), [(3, True), (4, False)])
async def test_a_route_of_a_gateway_reads_bodies_up_to_its_limit(size: int, fits: bool) -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"x" * size, "more_body": False}

    request = StarletteRequest({"type": "http", "headers": []}, cast(Any, receive))
    if fits:
        assert await read_body(request, 3) == b"xxx"
    else:
        with pytest.raises(ApiError) as refused:
            await read_body(request, 3)
        assert refused.value.status == 413


@dataclass
class ScriptedRun:
    """A run whose steps give one event each."""

    events: list[bytes]
    generation: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(finished=False))

    async def step(self) -> bytes:
        event = self.events.pop(0)
        self.generation.finished = not self.events
        return event


async def test_a_stream_waits_for_a_client_that_reads_slowly() -> None:
    client, run = Client(), ScriptedRun([b"data: 1\n\n", b"data: 2\n\n", b"data: 3\n\n"])
    client.reply.writable = False
    stream = asyncio.create_task(_stream(cast(Run, run), client.reply))
    for _ in range(5):
        await asyncio.sleep(0)
    assert client.events == [b"1"]
    assert len(run.events) == 2
    assert client.reply.on_flow is not None
    client.reply.writable = True
    client.reply.on_flow(False)
    await asyncio.wait_for(stream, 10)
    assert client.events == [b"1", b"2", b"3"]
    assert client.complete
