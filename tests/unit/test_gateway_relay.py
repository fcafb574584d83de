"""What a client sees of instances that refuse, break off, or are not there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from memserve.api.asgi import HangUp
from memserve.api.errors import ApiError
from memserve.api.generate import CallKind, GenerateCall
from memserve.api.http_client import instance_session
from memserve.api.status import InstanceInfo, InstanceState
from memserve.clock import MonotonicClock
from memserve.cluster.membership import Membership
from memserve.gateway.relay import MAX_ATTEMPTS, Answer, Relay
from memserve.gateway.router import RoundRobin
from memserve.types import Epoch, InstanceId, Role

STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
WHOLE = (
    b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 14\r\n\r\n{"whole":true'
)
END = b"0\r\n\r\n"
Parts = Sequence[bytes]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def refusal(status: int) -> bytes:
    return b"HTTP/1.1 %d No\r\nretry-after: 7\r\ncontent-length: 2\r\n\r\n{}" % status


@asynccontextmanager
async def impostor(parts: Parts, pause: float = 0.02) -> AsyncIterator[str]:
    """An instance's address; each connection is answered with `parts` and then closed."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for part in parts:
            writer.write(part)
            await asyncio.sleep(pause)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.close()


def ready_members(*addresses: str) -> Membership:
    membership = Membership(lambda member: None)
    for number, address in enumerate(addresses):
        name, role = InstanceId(f"i{number}"), Role.COLOCATED
        info = InstanceInfo(name, Epoch(1), role, InstanceState.READY, 1, "m")
        membership.answered(membership.join(address), info, None)
    return membership


class Client:
    """What the relay sends."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.bodies: list[bytes] = []
        self.complete = False

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            assert not self.status
            self.status, self.headers = message["status"], dict(message["headers"])
        else:
            self.bodies.append(message["body"])
            self.complete = not message.get("more_body", False)


Ask = Callable[..., Awaitable[Client]]


@pytest.fixture
async def ask() -> AsyncIterator[Ask]:
    """Relay a call to impostors with these answers, in this order."""
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(instance_session())

        async def run(*answers: Parts | str, stream: bool = True) -> Client:
            addresses = [
                parts
                if isinstance(parts, str)
                else await stack.enter_async_context(impostor(parts))
                for parts in answers
            ]
            membership = ready_members(*addresses)
            relay = Relay(session, membership, RoundRobin(), MonotonicClock())
            call = GenerateCall("c", CallKind.CHAT, "m", 1, ((1,),), stream=stream)
            client = Client()
            await relay.run(call, client.send, (), Answer())
            return client

        yield run


async def test_events_are_relayed_whole_however_they_arrive(ask: Ask) -> None:
    events = [b"data: 1\n\n", b"data: 22\n\n", b"data: [DONE]\n\n"]
    text = b"".join(events)
    pieces = [text[:4], text[4:9], text[9:15], text[15:]]
    client = await ask([STREAM, *map(chunk, pieces), END])
    assert (client.status, client.complete) == (200, True)
    assert b"".join(client.bodies) == text
    assert all(body.endswith(b"\n\n") for body in client.bodies if body)


async def test_a_stream_that_breaks_off_ends_with_an_error_event_of_its_own(ask: Ask) -> None:
    client = await ask([STREAM, chunk(b"data: 1\n\n"), chunk(b"data: {half")])
    first, error = b"".join(client.bodies).split(b"\n\n")[:2]
    assert first == b"data: 1"
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "instance_lost"
    assert client.complete


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param([], id="closed without an answer"),
        pytest.param([STREAM], id="closed after the headers"),
        pytest.param([STREAM, chunk(b"data: ha")], id="closed within the first event"),
        pytest.param([refusal(503)], id="refused: draining"),
        pytest.param([refusal(429)], id="refused: full"),
        pytest.param("http://127.0.0.1:9", id="not there"),
    ],
)
async def test_another_instance_answers_where_nothing_was_sent_yet(
    ask: Ask, broken: Parts | str
) -> None:
    client = await ask(broken, [STREAM, chunk(b"data: 1\n\n"), END])
    assert (client.status, b"".join(client.bodies)) == (200, b"data: 1\n\n")


async def test_a_body_is_sent_when_it_is_whole(ask: Ask) -> None:
    client = await ask([WHOLE], [WHOLE + b"}"], stream=False)
    assert (client.status, client.bodies) == (200, [b'{"whole":true}'])


async def test_a_full_queue_says_more_than_an_instance_that_leaves(ask: Ask) -> None:
    client = await ask([refusal(429)], [refusal(503)])
    assert (client.status, client.headers[b"retry-after"]) == (429, b"7")


async def test_a_call_is_not_tried_everywhere(ask: Ask) -> None:
    good = [STREAM, chunk(b"data: 1\n\n"), END]
    with pytest.raises(ApiError) as lost:
        await ask(*[[]] * MAX_ATTEMPTS, good)
    assert (lost.value.status, lost.value.detail.code) == (503, "instance_lost")
    assert lost.value.retry_after is not None


async def test_a_client_that_hangs_up_closes_the_connection_to_the_instance() -> None:
    closed = asyncio.Event()
    gone = asyncio.Event()

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(STREAM + chunk(b"data: 1\n\n"))
        while await reader.read(65536):
            pass
        closed.set()

    async def receive() -> dict[str, Any]:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message.get("body"):
            gone.set()

    server = await asyncio.start_server(endless, "127.0.0.1", 0)
    membership = ready_members(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    async with instance_session() as session:
        relay = Relay(session, membership, RoundRobin(), MonotonicClock())
        call = GenerateCall("c", CallKind.CHAT, "m", 1, ((1,),), stream=True)
        with HangUp(receive) as hang_up:
            await relay.run(call, send, (), Answer())
        assert hang_up.happened
        await closed.wait()
    server.close()
