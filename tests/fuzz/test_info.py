"""What members say of themselves, damaged: `/info`, `/stats`, `/profile`, what a gateway says of
its cluster. Whoever reads it knows one error, and goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
import pytest

from memserve.api.errors import ErrorBody, ErrorDetail
from memserve.api.kv_events import KVEventsInfo
from memserve.api.peer_client import PeerClient, PeerError, decoded
from memserve.api.status import (
    REPORT_PATH,
    EngineTotals,
    InstanceInfo,
    InstanceReport,
    InstanceState,
    InstanceStats,
    Latencies,
    Limits,
    MediumTotals,
    PoolTotals,
)
from memserve.cluster.member import ClusterView, MemberView
from memserve.cluster.membership import Membership
from memserve.cluster.poller import Poller
from memserve.scheduler.contract import Costs
from memserve.scheduler.profiles import ProfileError, decode_profile
from memserve.scheduler.refined_costs import RefinedCosts
from memserve.types import Epoch, InstanceId, Role
from tests.fuzz.mutate import Mutator, mutators
from tests.router_harness import profile_of

A = InstanceId("decode-1")
BLOCKS = MediumTotals(total=512, free=200, active=12, cached=300, pinned=4)
INFO = InstanceInfo(
    id=A,
    epoch=Epoch(1_764_123_456_789_000_000),
    role=Role.DECODE,
    state=InstanceState.READY,
    pid=4711,
    model="tiny",
    limits=Limits(32_000, 4096, 8192, 4096, 16, "float32", "cpu", 2),
    kv_events=KVEventsInfo("tcp://127.0.0.1:5557", "tcp://127.0.0.1:5558", "kv", 16, True),
)
STATS = InstanceStats(
    engine=EngineTotals(1, 2, 300, 4000, 500, 600, 7, 80, 9, 1.25),
    pool=PoolTotals(BLOCKS, BLOCKS, namespaces=2, nodes=30, matches=1, evictions=40),
    latencies=Latencies(),
)
CLUSTER = ClusterView(
    Epoch(7),
    (MemberView(A, Role.DECODE, InstanceState.READY, "http://127.0.0.1:9", 5, BLOCKS, BLOCKS),),
)
ERROR = ErrorBody(ErrorDetail("no", "invalid_request_error", "prompt", "too_long"))
DECODERS: dict[str, tuple[msgspec.Struct, Callable[[bytes], object]]] = {
    "info": (INFO, msgspec.json.Decoder(InstanceInfo).decode),
    "stats": (STATS, msgspec.json.Decoder(InstanceStats).decode),
    "cluster": (CLUSTER, msgspec.json.Decoder(ClusterView).decode),
    "error": (ERROR, msgspec.json.Decoder(ErrorBody).decode),
}


@pytest.mark.parametrize("name", DECODERS)
def test_what_is_said_is_read_or_refused_with_one_error(name: str) -> None:
    valid, decode = DECODERS[name]
    body = msgspec.json.encode(valid)
    assert decoded(decode, body, "the test") == valid
    fine = 0
    for mutator in mutators(f"info {name}", 500):
        mutant = mutator.json(body)
        try:
            decoded(decode, mutant, "the test")
        except PeerError as error:
            assert len(str(error)) < 1_000, f"{mutator!r}"  # noqa: PT017 - it goes into a log
            continue
        except Exception as error:  # noqa: BLE001 - whatever comes out is what is sought
            pytest.fail(f"{mutator!r}: {error!r:.300} for {mutant[:300]!r}")
        fine += 1
    assert fine > 0


def test_profiles_are_read_or_refused_with_one_error() -> None:
    body = profile_of("h100")
    fine = 0
    for mutator in mutators("profile", 1_000):
        mutant = mutator.json(body)
        try:
            decode_profile(mutant)
        except ProfileError:
            continue
        except Exception as error:  # noqa: BLE001 - whatever comes out is what is sought
            pytest.fail(f"{mutator!r}: {error!r:.300} for {mutant[:300]!r}")
        fine += 1
    assert fine > 0


def test_costs_that_could_be_read_can_be_used() -> None:
    """A member's numbers may be absurd; decisions about everybody are made with them."""
    body = profile_of("h100")
    for mutator in mutators("costs", 500):
        try:
            costs = decode_profile(mutator.json(body)).costs
        except Exception:  # noqa: BLE001 - another test's affair
            continue
        try:
            use(RefinedCosts(costs))
        except Exception as error:  # noqa: BLE001 - whatever comes out is what is sought
            pytest.fail(f"{mutator!r}: {error!r:.300} with {costs!r:.1000}")


def use(costs: Costs) -> None:
    """As the scheduler does. Raises whatever comes of it."""
    for tokens in (1, 100, 4096):
        assert float(costs.prefill_seconds(tokens, tokens // 2)) >= 0
        assert float(costs.decode_step_seconds(3, tokens)) >= 0


class Told:
    """A server of answers that it is told, whatever it is asked; heads and all."""

    def __init__(self) -> None:
        self.answers: dict[bytes, bytes] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                writer.write(self.answers[head.split(b" ")[1]])
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def answer(body: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % len(body) + body


@asynccontextmanager
async def told() -> AsyncIterator[tuple[Told, str]]:
    server = Told()
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    async with listening:
        yield server, f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"


def damaged(mutator: Mutator, body: bytes) -> bytes:
    if mutator.random.random() < 0.2:
        mutant = mutator.bytes(answer(body))
        # Nothing is longer than it says: what does not come is waited for, in other tests.
        return mutant + b"\r\n\r\n"
    return answer(mutator.json(body))


async def test_a_poll_of_a_member_that_says_anything_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a poll that it answers as it should finds it."""
    monkeypatch.setattr("memserve.cluster.poller.POLL_TIMEOUT_SECONDS", 0.2)
    info, stats = msgspec.json.encode(INFO), msgspec.json.encode(STATS)
    report = msgspec.json.encode(InstanceReport(**msgspec.structs.asdict(INFO), stats=STATS))
    target = REPORT_PATH.encode()
    async with told() as (server, url), PeerClient(None) as peers:
        for mutator in mutators("poll", 500):
            membership = Membership()
            poller = Poller(membership, peers)
            member = membership.join(url, lasting=True)
            said = info if mutator.random.random() < 0.5 else report  # without: then `/stats`
            server.answers = {target: damaged(mutator, said), b"/stats": damaged(mutator, stats)}
            try:
                await poller.poll(member)
                membership.view()
            except Exception as error:  # noqa: BLE001 - whatever comes out is what is sought
                pytest.fail(f"{mutator!r}: {error!r:.300} for {server.answers!r:.1000}")
        membership = Membership()
        member = membership.join(url, lasting=True)
        # Both a member that tells all at once, and an earlier version's, that is asked twice.
        for said in (report, info):
            server.answers = {target: answer(said), b"/stats": answer(stats)}
            await Poller(membership, peers).poll(member)
            # A connection that is still full of the last mutant is one miss.
            await Poller(membership, peers).poll(member)
            assert (member.id, member.state) == (A, InstanceState.READY)
            assert member.stats == STATS
            member.stats = None
