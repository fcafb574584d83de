"""The transport for tests keeps the contract of transports in everything that it breaks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from memserve import KVLayout, Medium
from memserve.clock import ManualClock
from memserve.errors import PeerLost, UnknownBlock, UnknownPeer
from memserve.pool.pool import BlockPool
from memserve.transfer.base import Completion, Outcome, Ticket, WriteList, block_list
from memserve.transfer.shm import ShmTransport
from memserve.types import RefArray
from tests.copy_harness import connect, fill, write_list
from tests.faulty_transport import (
    Delay,
    Drop,
    Duplicate,
    Fail,
    FaultyTransport,
    Mute,
    Plan,
    listed,
    seeded,
)

LAYOUT = KVLayout(layers=1, kv_heads=1, head_dim=4, dtype="float32", block_tokens=2)
BLOCKS = 4


class Bench:
    """Two pools, and what has ended between them."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.source = BlockPool(LAYOUT, BLOCKS, 0, "source")
        self.target = BlockPool(LAYOUT, BLOCKS, 0, "target")
        self.ours = fill(self.source, 1)[Medium.HBM]
        self.theirs = fill(self.target, 2)[Medium.HBM]

    def transport(self, plan: Plan) -> FaultyTransport:
        transport = FaultyTransport(ShmTransport(LAYOUT), plan, self.clock)
        connect(transport, self.source, self.target, ShmTransport(LAYOUT))
        return transport

    def post(self, transport: FaultyTransport, refs: RefArray | None = None) -> Ticket:
        ours = self.ours if refs is None else refs
        return transport.post(self.target.owner, write_list(ours, self.theirs[: len(ours)]))

    def poll(self, transport: FaultyTransport) -> list[Completion]:
        """All that ends without the clock moving."""
        return [end for _ in range(10) for end in transport.poll()]

    def arrived(self) -> list[bool]:
        there, sent = self.target.read(self.theirs), self.source.read(self.ours)
        return [torch.equal(there[at], sent[at]) for at in range(BLOCKS)]


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    with bench.source, bench.target:
        yield bench


def test_without_a_fault_it_is_the_other_transport(bench: Bench) -> None:
    transport = bench.transport(listed())
    ticket = bench.post(transport)
    assert bench.poll(transport) == [Completion(ticket, Outcome.DONE)]
    assert all(bench.arrived())


def test_delayed_writes_happen_later(bench: Bench) -> None:
    transport = bench.transport(listed(Delay(3.0)))
    ticket = bench.post(transport)
    bench.clock.advance(2.9)
    assert bench.poll(transport) == []
    assert not any(bench.arrived())
    bench.clock.advance(0.1)
    assert bench.poll(transport) == [Completion(ticket, Outcome.DONE)]
    assert all(bench.arrived())


@pytest.mark.parametrize("how", ["cancel", "remove"])
def test_dropped_writes_end_when_they_are_given_up(bench: Bench, how: str) -> None:
    transport = bench.transport(listed(Drop()))
    ticket = bench.post(transport)
    bench.clock.advance(1e6)
    assert bench.poll(transport) == []
    if how == "cancel":
        transport.cancel(ticket)
    else:
        transport.remove_peer(bench.target.owner)
    assert bench.poll(transport) == [Completion(ticket, Outcome.CANCELLED)]
    assert not any(bench.arrived())
    assert transport.in_flight == 0


def test_muted_writes_arrive_and_end_when_they_are_given_up(bench: Bench) -> None:
    transport = bench.transport(listed(Mute()))
    ticket = bench.post(transport)
    assert bench.poll(transport) == []
    assert all(bench.arrived())
    transport.cancel(ticket)
    assert bench.poll(transport) == [Completion(ticket, Outcome.CANCELLED)]
    assert transport.in_flight == 0


def test_duplicated_writes_end_once(bench: Bench) -> None:
    transport = bench.transport(listed(Duplicate()))
    ticket = bench.post(transport)
    assert bench.poll(transport) == [Completion(ticket, Outcome.DONE)]
    assert transport.counters.bytes_moved == 2 * BLOCKS * LAYOUT.block_bytes


def test_failed_writes_leave_a_part_behind(bench: Bench) -> None:
    transport = bench.transport(listed(Fail(part=0.5), None))
    ticket, other = bench.post(transport), bench.post(transport, bench.ours[:0])
    ends = {end.ticket: end for end in bench.poll(transport)}
    assert ends[ticket].outcome is Outcome.FAILED
    assert isinstance(ends[ticket].error, PeerLost)
    assert not ends[ticket].target_drained
    assert ends[other].outcome is Outcome.DONE
    assert bench.arrived() == [True, True, False, False]


def test_refusals_pass_through(bench: Bench) -> None:
    transport = bench.transport(listed(None, Delay(1.0)))
    beyond = WriteList(block_list(Medium.HBM, [0]), block_list(Medium.HBM, [99]))
    with pytest.raises(UnknownBlock):
        transport.post(bench.target.owner, beyond)
    assert transport.in_flight == 0
    transport.post(bench.target.owner, beyond)
    bench.clock.advance(1.0)
    (end,) = bench.poll(transport)
    assert isinstance(end.error, UnknownBlock)
    with pytest.raises(UnknownPeer):
        transport.post(bench.source.owner, beyond)


def test_seeded_plans_repeat(bench: Bench) -> None:
    choices = [None, Drop(), Fail(), Delay(1.0)]
    first, again = seeded(7, choices), seeded(7, choices)
    assert [first(at) for at in range(50)] == [again(at) for at in reversed(range(50))][::-1]
    assert {type(first(at)) for at in range(50)} == {type(each) for each in choices}
