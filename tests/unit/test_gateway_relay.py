"""What a client sees of instances that refuse, break off, or are not there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress

import pytest

from memserve.api.errors import ApiError
from memserve.api.forward import Forward, ForwardPath
from memserve.api.generate import CallKind, GenerateCall
from memserve.api.status import InstanceInfo, InstanceState, MemberKind
from memserve.clock import MonotonicClock
from memserve.cluster.member import Member
from memserve.cluster.membership import Membership
from memserve.gateway.relay import MAX_ATTEMPTS, Answer, Relay
from memserve.gateway.route import Route
from memserve.gateway.upstream import Upstream
from memserve.tokens import from_ids
from memserve.types import Epoch, Role
from tests.gateway_harness import (
    END,
    STREAM,
    Client,
    Parts,
    Script,
    answer_to,
    chunk,
    impostor,
    ready_members,
)
from tests.packed import listed
from tests.waiting import until

WHOLE = (
    b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 14\r\n\r\n{"whole":true'
)
ONE_EVENT = [STREAM, chunk(b"data: 1\n\n"), END]

ONE = from_ids((1,))


def refusal(status: int) -> bytes:
    return b"HTTP/1.1 %d No\r\nretry-after: 7\r\ncontent-length: 2\r\n\r\n{}" % status


def good(call: GenerateCall) -> Parts:
    return [STREAM, *map(chunk, answer_to(call)), END]


def lost_after(events: int, more: bytes = b"") -> Script:
    """An instance that is gone after so many events, and a few bytes."""

    def script(call: GenerateCall) -> Parts:
        parts = [STREAM, *map(chunk, answer_to(call)[:events])]
        return [*parts, chunk(more)] if more else parts

    return script


class Heard(Route):
    """Tells what becomes of it."""

    heard: list[str]

    def first_token(self) -> None:
        self.heard.append("first token")

    def ended(self) -> None:
        self.heard.append("ended")


class Router:
    """Routes to the first member."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.prefill: tuple[Member, ...] = ()

    def plan(self, call: GenerateCall, members: Sequence[Member]) -> Route:
        self.heard.append(f"{members[0].id} of {len(members)}")
        route = Heard(members[0], self.prefill)
        route.heard = self.heard
        return route


class Cluster:
    """A relay in front of impostors, asked in order."""

    def __init__(self, upstream: Upstream, stack: AsyncExitStack) -> None:
        self.router = Router()
        self.calls: list[GenerateCall] = []  # as the instances got them
        self.answer = Answer()
        self.membership = Membership()
        self.instance_wait = 0.0  # seconds
        self._upstream = upstream
        self._stack = stack

    async def start(self, *instances: Parts | Script | str) -> Relay:
        self.membership = ready_members(*[await self.address(it) for it in instances])
        return Relay(
            self._upstream, self.membership, self.router.plan, MonotonicClock(), self.instance_wait
        )

    async def address(self, instance: Parts | Script | str) -> str:
        if isinstance(instance, str):
            return instance
        return await self._stack.enter_async_context(impostor(instance, self.calls))

    async def restart(self, instance: Parts | Script) -> None:
        """The first member dies, and comes back in a new life after a while."""
        (first, *_) = self.membership.members
        self.membership.refused(first)
        assert first.state is InstanceState.DEAD
        await asyncio.sleep(0.3)
        back = self.membership.join(await self.address(instance))
        life = InstanceInfo(first.id, Epoch(2), first.role, InstanceState.READY, 2, "m")
        self.membership.answered(back, life, None)

    async def ask(
        self,
        *instances: Parts | Script | str,
        stream: bool = True,
        kind: CallKind = CallKind.CHAT,
        n: int = 1,
        usage: bool = False,
    ) -> Client:
        relay = await self.start(*instances)
        call = GenerateCall("c", kind, "m", 1, (ONE,), n=n, stream=stream, include_usage=usage)
        client, self.answer = Client(), Answer()
        await relay.run(call, client.reply, (), self.answer)
        assert self.router.heard.count("ended") == sum("of" in h for h in self.router.heard)
        return client


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with AsyncExitStack() as stack:
        upstream = Upstream(None)
        stack.callback(upstream.close)
        yield Cluster(upstream, stack)


Ask = Callable[..., Awaitable[Client]]


async def test_events_are_relayed_whole_however_they_arrive(cluster: Cluster) -> None:
    events = [b"data: 1\n\n", b"data: 22\n\n", b"data: [DONE]\n\n"]
    text = b"".join(events)
    client = await cluster.ask(
        [STREAM, *map(chunk, [text[:4], text[4:9], text[9:15], text[15:]]), END]
    )
    assert (client.status, client.complete) == (200, True)
    assert client.body == text


async def test_a_stream_that_cannot_be_resumed_ends_with_an_error_event(cluster: Cluster) -> None:
    broken = [STREAM, chunk(b"data: 1\n\n"), chunk(b"data: {half")]
    client = await cluster.ask(broken, ONE_EVENT)
    first, error = client.events
    assert first == b"1"
    assert json.loads(error)["error"]["code"] == "instance_lost"
    assert client.complete
    assert cluster.answer.broken


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param([], id="closed without an answer"),
        pytest.param([STREAM], id="closed after the headers"),
        pytest.param([STREAM, chunk(b"data: ha")], id="closed within the first event"),
        pytest.param([b"HTTP/1.1 200 OK\r\nwhat: is"], id="closed within the headers"),
        pytest.param([b"SSH-2.0-OpenSSH_9.2\r\n"], id="not HTTP"),
        pytest.param([refusal(503)], id="refused: draining"),
        pytest.param([refusal(429)], id="refused: full"),
        pytest.param("http://127.0.0.1:9", id="not there"),
    ],
)
async def test_another_instance_answers_where_nothing_was_sent_yet(
    cluster: Cluster, broken: Parts | str
) -> None:
    client = await cluster.ask(broken, ONE_EVENT)
    assert (client.status, client.body) == (200, b"data: 1\n\n")
    assert cluster.answer.failovers == 0
    assert not cluster.answer.pauses


async def test_a_body_is_sent_when_it_is_whole(cluster: Cluster) -> None:
    client = await cluster.ask([WHOLE], [WHOLE + b"}"], stream=False)
    assert (client.status, client.body) == (200, b'{"whole":true}')


async def test_a_full_queue_says_more_than_an_instance_that_leaves(cluster: Cluster) -> None:
    client = await cluster.ask([refusal(429)], [refusal(503)])
    assert (client.status, client.headers[b"retry-after"]) == (429, b"7")


async def test_a_call_is_not_tried_everywhere(cluster: Cluster) -> None:
    with pytest.raises(ApiError) as lost:
        await cluster.ask(*[[]] * MAX_ATTEMPTS, ONE_EVENT)
    assert (lost.value.status, lost.value.detail.code) == (503, "instance_lost")
    assert lost.value.retry_after is not None


@pytest.mark.parametrize("kind", list(CallKind))
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    ("events", "more"),
    [
        pytest.param(1, b"", id="after the first event"),
        pytest.param(4, b"", id="between events"),
        pytest.param(4, b':0 5\ndata: {"id', id="within an event"),
        pytest.param(5, b":0", id="within a comment"),
        pytest.param(-1, b"", id="before [DONE]"),
    ],
)
async def test_another_instance_goes_on(
    cluster: Cluster, kind: CallKind, n: int, events: int, more: bytes
) -> None:
    client = await cluster.ask(lost_after(events, more), good, kind=kind, n=n, usage=True)
    answer, heard = cluster.answer, list(cluster.router.heard)
    undisturbed = await cluster.ask(good, kind=kind, n=n, usage=True)
    assert client.complete
    assert [client.text(c) for c in range(n)] == [undisturbed.text(c) for c in range(n)]
    # What was held back at the loss may come in chunks of another size, and nothing else may.
    assert client.events[-2:] == undisturbed.events[-2:]
    roles = [event for event in client.events if b'"role"' in event]
    assert len(roles) == (n if kind is CallKind.CHAT else 0)
    if events < 0:  # the client had all that matters
        assert len(cluster.calls) == 2
        return
    assert answer.failovers == len(answer.pauses) == 1
    assert sum(map(len, cluster.calls[1].resumed)) == events
    assert heard == ["i0 of 2", "first token", "ended", "i1 of 1", "first token", "ended"]


async def test_a_stream_survives_instances_that_fall_one_after_the_other(cluster: Cluster) -> None:
    client = await cluster.ask(lost_after(2), lost_after(2), good)
    assert client.text() == "".join(f"<{i}>" for i in range(6))
    assert [listed(call.resumed) for call in cluster.calls] == [[], [[0, 1]], [[0, 1, 2, 3]]]
    assert len(cluster.answer.pauses) == 2


async def test_with_nobody_left_the_client_is_told(cluster: Cluster) -> None:
    client = await cluster.ask(lost_after(1), lost_after(1), lost_after(1), good)
    assert len(cluster.calls) == MAX_ATTEMPTS
    assert json.loads(client.events[-1])["error"]["code"] == "instance_lost"
    assert client.complete
    assert cluster.answer.broken


async def test_an_instance_that_fails_in_order_is_replaced_too(cluster: Cluster) -> None:
    error = b'data: {"error":{"message":"stopped"}}\n\n'
    fails = lambda call: [STREAM, chunk(answer_to(call)[0]), chunk(error), END]  # noqa: E731
    client = await cluster.ask(fails, good)
    assert client.text() == "".join(f"<{i}>" for i in range(6))
    alone = await cluster.ask(fails)
    assert alone.events[-1] == error.strip().removeprefix(b"data: ")


async def test_an_instance_that_refuses_to_go_on_is_passed_over(cluster: Cluster) -> None:
    client = await cluster.ask(lost_after(3), [refusal(503)], good)
    assert client.text() == "".join(f"<{i}>" for i in range(6))
    assert len(cluster.answer.pauses) == 1


async def test_an_instance_that_is_silent_is_left_when_it_is_declared_dead(
    cluster: Cluster,
) -> None:
    hangs = asyncio.Event()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(STREAM + chunk(answer_to(call)[0]))
        with suppress(ConnectionError):
            while await reader.read(65536):
                pass
        hangs.set()

    call = GenerateCall("c", CallKind.CHAT, "m", 1, (ONE,), stream=True)
    server = await asyncio.start_server(hang, "127.0.0.1", 0)
    relay = await cluster.start(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", good)
    client = Client()
    running = asyncio.create_task(relay.run(call, client.reply, (), cluster.answer))
    await client.begun.wait()
    relay.instance_lost(cluster.membership.members[0])
    await running
    await hangs.wait()  # it is told, should it still be there
    assert client.text() == "".join(f"<{i}>" for i in range(6))
    server.close()


async def test_a_client_that_hangs_up_closes_the_connection_to_the_instance(
    cluster: Cluster,
) -> None:
    closed = asyncio.Event()

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(STREAM + chunk(b"data: 1\n\n"))
        with suppress(ConnectionError):
            while await reader.read(65536):
                pass
        closed.set()

    server = await asyncio.start_server(endless, "127.0.0.1", 0)
    relay = await cluster.start(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    call = GenerateCall("c", CallKind.CHAT, "m", 1, (ONE,), stream=True)
    client = Client()
    running = asyncio.create_task(relay.run(call, client.reply, (), Answer()))
    await client.begun.wait()
    client.reply.hung_up()
    await running
    await closed.wait()
    assert cluster.router.heard[-1] == "ended"
    server.close()


async def test_connections_are_kept_and_a_dead_one_costs_no_attempt(cluster: Cluster) -> None:
    connections = 0
    answered = 0

    async def twice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers two calls on each connection, and closes it when the third one comes."""
        nonlocal connections, answered
        connections += 1
        for _ in range(2):
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.split(b"content-length: ")[1]))
            answered += 1
            writer.write(b"".join(ONE_EVENT))
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(twice, "127.0.0.1", 0)
    relay = await cluster.start(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    call = GenerateCall("c", CallKind.CHAT, "m", 1, (ONE,), stream=True)
    for _ in range(6):
        client = Client()
        await relay.run(call, client.reply, (), Answer())
        assert client.body == b"data: 1\n\n"
    assert (connections, answered) == (3, 6)
    assert cluster.router.heard.count("ended") == 6
    server.close()


async def test_a_slow_client_stops_the_instance_and_not_the_gateway_s_memory(
    cluster: Cluster,
) -> None:
    stuck = asyncio.Event()
    event = b"data: %b\n\n" % (b"x" * 100_000)
    sent = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(STREAM)
        while not stuck.is_set():
            writer.write(chunk(event))
            sent += 1
            try:
                async with asyncio.timeout(0.3):
                    await writer.drain()
            except TimeoutError:
                stuck.set()
        writer.write(END)
        writer.close()

    server = await asyncio.start_server(flood, "127.0.0.1", 0)
    relay = await cluster.start(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    call = GenerateCall("c", CallKind.CHAT, "m", 1, (ONE,), stream=True)
    client = Client()
    running = asyncio.create_task(relay.run(call, client.reply, (), Answer()))
    await client.begun.wait()
    assert client.reply.on_flow is not None
    client.reply.on_flow(True)
    had = len(client.body)
    await stuck.wait()
    assert len(client.body) <= had + len(event)  # what was being read
    assert not running.done()
    client.reply.on_flow(False)
    await running
    assert client.body == event * sent
    server.close()


async def test_a_stream_waits_for_the_instance_that_comes_back(cluster: Cluster) -> None:
    undisturbed = await cluster.ask(good)
    cluster.instance_wait = 30.0
    asking = asyncio.create_task(cluster.ask(lost_after(3)))
    await until(lambda: len(cluster.calls) == 2, "the call")
    await cluster.restart(good)
    client = await asking
    assert (client.status, client.complete) == (200, True)
    assert client.text() == undisturbed.text()
    assert cluster.calls[-1].resumed is not None
    assert (cluster.answer.failovers, len(cluster.answer.pauses)) == (1, 1)
    assert not cluster.answer.broken


@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_waits_for_the_instance_that_comes_back(
    cluster: Cluster, stream: bool
) -> None:
    cluster.instance_wait = 30.0
    relay = await cluster.start(good)
    back = asyncio.create_task(cluster.restart(good if stream else [WHOLE + b"}"]))
    await asyncio.sleep(0)  # it is dead by now
    call = GenerateCall("c", CallKind.CHAT, "m", 1, (ONE,), stream=stream)
    client = Client()
    await relay.run(call, client.reply, (), Answer())
    await back
    assert (client.status, client.complete) == (200, True)


async def test_who_leaves_meanwhile_is_not_waited_for(cluster: Cluster) -> None:
    cluster.instance_wait = 30.0
    relay = await cluster.start(good)
    cluster.membership.refused(cluster.membership.members[0])
    client = Client()
    call = GenerateCall("c", CallKind.CHAT, "m", 1, (ONE,), stream=True)
    waiting = asyncio.create_task(relay.run(call, client.reply, (), Answer()))
    await asyncio.sleep(0.05)
    client.reply.hung_up()
    await asyncio.wait_for(waiting, 10)
    assert cluster.calls == []


async def test_nobody_waits_for_ever(cluster: Cluster) -> None:
    cluster.instance_wait = 0.3
    relay = await cluster.start(good)
    cluster.membership.leave(cluster.membership.members[0].address)
    call = GenerateCall("c", CallKind.CHAT, "m", 1, (ONE,), stream=True)
    with pytest.raises(ApiError) as refused:
        await asyncio.wait_for(relay.run(call, Client().reply, (), Answer()), 10)
    assert b'"no_instance"' in refused.value.body()


async def test_an_instance_that_fails_and_stays_is_not_waited_for(cluster: Cluster) -> None:
    cluster.instance_wait = 30.0
    relay = await cluster.start([b"nonsense"])
    (only,) = cluster.membership.members
    call = GenerateCall("c", CallKind.CHAT, "m", 1, (ONE,), stream=True)
    asking = asyncio.create_task(relay.run(call, Client().reply, (), Answer()))
    await until(lambda: only.misses > 0, "the doubt")
    alive = InstanceInfo(only.id, Epoch(1), only.role, InstanceState.READY, 1, "m")
    cluster.membership.answered(only, alive, None)
    with pytest.raises(ApiError) as refused:
        await asyncio.wait_for(asking, 10)
    assert b'"instance_lost"' in refused.value.body()


async def test_a_full_queue_is_told_at_once_whoever_else_is_dead(cluster: Cluster) -> None:
    cluster.instance_wait = 30.0
    relay = await cluster.start(good, [refusal(429)])
    cluster.membership.refused(cluster.membership.members[0])
    call, client = GenerateCall("c", CallKind.CHAT, "m", 1, (ONE,), stream=True), Client()
    await asyncio.wait_for(relay.run(call, client.reply, (), Answer()), 10)
    assert (client.status, client.headers[b"retry-after"]) == (429, b"7")


@pytest.mark.parametrize("renders", [False, True])
async def test_what_is_passed_on_goes_to_servers(cluster: Cluster, renders: bool) -> None:
    """To those that answer, unless KV of its prompt can be moved."""
    said = [STREAM, chunk(b"data: 1\n\n"), chunk(b":0 5\ndata: 2\n\n"), END]
    relay = await cluster.start(said, said, said)
    kinds = (MemberKind.MEMSERVE, Role.COLOCATED), (MemberKind.VLLM, Role.PREFILL)
    for member, (kind, role) in zip(
        cluster.membership.members, (*kinds, (MemberKind.VLLM, Role.DECODE)), strict=True
    ):
        assert member.epoch is not None
        state = InstanceState.READY
        info = InstanceInfo(member.id, member.epoch, role, state, 1, "m", kind=kind)
        cluster.membership.answered(member, info, None)
    forward = Forward(ForwardPath.CHAT, b'{"tools":[]}', renders)
    *_, prefill, _ = cluster.membership.members
    if renders:
        cluster.router.prefill = (prefill,)
    call = GenerateCall(
        "c", CallKind.CHAT, "m", 1, (from_ids((1, 2)),), stream=True, forward=forward
    )
    client, answer = Client(), Answer()
    await relay.run(call, client.reply, (), answer)
    assert cluster.router.heard[0] == ("i1 of 2" if renders else "i2 of 1")
    (told,) = cluster.calls
    assert told.forward is not None
    assert told.forward.body == b'{"tools":[]}'
    if renders:
        assert listed(told.prompts) == [[1, 2]]
        assert [peer.id for peer in told.prefill] == [prefill.id]
    else:
        assert listed(told.prompts) == [[0]]  # the server makes its own
        assert not told.prefill
    assert client.body == b"data: 1\n\n:0 5\ndata: 2\n\n"  # and nothing is taken out
