"""Transfers over a network and a transport that do their worst, hosts that die and clocks that
jump. Protects: no block is leaked, freed twice, published before it is whole, or written to
after it was given to somebody else; and when all heals, all ends."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from memserve.transfer.messages import Drained, Failure, Query
from memserve.transfer.session import DEADLINE, LEASE, REMEMBER, RETRY_FIRST, Round
from tests.protocol.transfer_model import TOKEN_BYTES, Copy, Outgoing, World

BLOCKS = 6
prompts = st.lists(st.sampled_from([b"aaaa", b"bbbb"]), min_size=1, max_size=4).map(b"".join)
hosts = st.sampled_from([0, 1])
seconds = st.sampled_from([RETRY_FIRST, 2.5, LEASE, DEADLINE, REMEMBER])


class TransferMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World(BLOCKS)
        # Transfers whose caller still writes, with what is left to write.
        self.open: list[tuple[int, Outgoing, int]] = []

    @rule(at=hosts, tokens=prompts)
    def transfer_with_insert(self, at: int, tokens: bytes) -> None:
        self._begin(at, len(tokens) // TOKEN_BYTES, tokens)

    @rule(at=hosts, blocks=st.integers(0, 4))
    def transfer(self, at: int, blocks: int) -> None:
        self._begin(at, blocks, None)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def write_a_round(self, data: st.DataObject) -> None:
        """Blocks are ready one by one; after the last one the caller seals."""
        which = data.draw(st.integers(0, len(self.open) - 1))
        at, outgoing, first = self.open.pop(which)
        life = self.world.hosts[at]
        if outgoing not in life.outgoing.values():
            return  # its host has died since
        session, now = outgoing.session, self.world.now
        if first < session.prepare.blocks:
            actions = session.write(Round(first, first + 1, None), now)
            self.open.append((at, outgoing, first + 1))
        else:
            actions = session.seal(now)
        if actions:
            self.world.act(life, life.table.peer_of(session), session, actions)

    @rule(at=hosts, data=st.data())
    def cancel(self, at: int, data: st.DataObject) -> None:
        life = self.world.hosts[at]
        running = [each for each in life.outgoing.values() if each.finished is None]
        if running:
            session = data.draw(st.sampled_from(running)).session
            actions = session.cancel(self.world.now)
            if actions:
                self.world.act(life, life.table.peer_of(session), session, actions)

    @precondition(lambda self: self.world.wire)
    @rule(data=st.data(), what=st.sampled_from(["deliver", "deliver", "repeat", "drop"]))
    def network(self, data: st.DataObject, what: str) -> None:
        at = data.draw(st.integers(0, len(self.world.wire) - 1))
        if what == "drop":
            del self.world.wire[at]
        else:
            self.world.deliver(at, keep=what == "repeat")

    @rule()
    def network_works(self) -> None:
        for _ in range(len(self.world.wire)):
            self.world.deliver(0)

    @precondition(lambda self: self.world.copies)
    @rule(data=st.data(), what=st.sampled_from(["done", "done", "part", "failed", "severed"]))
    def transport(self, data: st.DataObject, what: str) -> None:
        copy = self._a_copy(data)
        if what in ("done", "part"):
            self.world.land(copy)
        if what == "done":
            self.world.end_copy(copy, None, Drained.YES)
        if what in ("failed", "severed"):
            drained = Drained.YES if what == "failed" else Drained.SEVERED
            self.world.end_copy(copy, Failure("TransferError", what), drained)

    @rule(at=hosts)
    def buffers_land(self, at: int) -> None:
        for copy in self.world.hosts[at].severed:
            self.world.land(copy)

    @rule(at=hosts, last_gasp=st.booleans())
    def die(self, at: int, last_gasp: bool) -> None:
        if last_gasp:
            for copy in self.world.copies:
                if copy.life is self.world.hosts[at]:
                    self.world.land(copy)
        self.world.kill(at)

    @rule(at=hosts)
    def discover(self, at: int) -> None:
        self.world.discover(at)

    @rule(at=hosts)
    def evict(self, at: int) -> None:
        self.world.hosts[at].memory.evict()

    @rule(at=hosts)
    def heartbeat(self, at: int) -> None:
        self.world.heartbeat(at)

    @rule(by=seconds)
    def clock_jumps(self, by: float) -> None:
        self.world.now += by

    @rule(at=hosts)
    def tick(self, at: int) -> None:
        self.world.tick(at)

    def teardown(self) -> None:
        """The network heals. Callers finish what they began."""
        world = self.world
        for at, outgoing, first in self.open:
            life, session = world.hosts[at], outgoing.session
            if outgoing in life.outgoing.values():
                actions = [
                    *session.write(Round(first, session.prepare.blocks, None), world.now),
                    *session.seal(world.now),
                ]
                if actions:
                    world.act(life, life.table.peer_of(session), session, actions)
        self._run(2 * DEADLINE)
        for life in world.hosts:
            assert life.table.sources == 0
            for outgoing in life.outgoing.values():
                assert outgoing.finished is not None
                assert outgoing.released
            assert not life.memory.held, "blocks of transfers that have ended"
            self._check_blocks(at=world.hosts.index(life))
        self._run(REMEMBER)
        assert all(life.table.destinations == 0 for life in world.hosts)

    def _begin(self, at: int, blocks: int, tokens: bytes | None) -> None:
        outgoing = self.world.begin(at, blocks, tokens)
        if outgoing is not None:
            self.open.append((at, outgoing, 0))

    def _a_copy(self, data: st.DataObject) -> Copy:
        return self.world.copies[data.draw(st.integers(0, len(self.world.copies) - 1))]

    def _run(self, seconds: float) -> None:
        world = self.world
        end = world.now + seconds
        while world.now < end:
            for at in (0, 1):
                world.discover(at)
                world.heartbeat(at)
                world.tick(at)
            self.network_works()
            for copy in list(world.copies):
                world.land(copy)
                world.end_copy(copy, None, Drained.YES)
            world.now += 1.0

    def _check_blocks(self, at: int) -> None:
        memory = self.world.hosts[at].memory
        peer = self.world.hosts[1 - at]
        indexed = set(memory.index.values())
        granted = {block for blocks in memory.grants.values() for block in blocks}
        for index, block in enumerate(memory.blocks):
            assert block.pins == 0
            assert (block.holder == "index") == (index in indexed)
            assert block.holder is None or index in indexed or index in granted, "leaked"
        for owner, number in memory.grants:
            assert owner == peer.owner
            finished = peer.outgoing[number].finished
            assert finished is not None
            assert finished.failure is None, "the caller does not know that it has these"


TransferMachine.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestTransferMachine = TransferMachine.TestCase


def test_an_old_answer_does_not_take_back_what_was_committed() -> None:
    """D asks, then the commit arrives; S, done by then, answers that it knows nothing."""
    world = World(BLOCKS)
    outgoing = world.begin(0, 2, None)
    assert outgoing is not None
    session, source = outgoing.session, world.hosts[0]
    (prepare,) = world.wire
    world.deliver(0)
    world.deliver(0)
    peer = source.table.peer_of(session)
    world.now += LEASE
    for at in (0, 1):
        world.heartbeat(at)
    world.tick(1)
    (query,) = world.wire
    assert isinstance(query[2], Query)
    world.wire.clear()
    world.act(source, peer, session, session.write(Round(0, 2, None), world.now))
    (copy,) = world.copies
    world.land(copy)
    world.end_copy(copy, None, Drained.YES)
    world.act(source, peer, session, session.seal(world.now))
    world.deliver(0)
    world.deliver(0)
    assert outgoing.finished is not None
    world.wire.append(query)
    world.wire.append(prepare)
    for _ in range(4):
        world.deliver(0)
    assert list(world.hosts[1].memory.grants.values()) == [[0, 1]]


def test_a_cancel_that_crosses_the_last_word_ends_both_sides() -> None:
    """D has all of it and has said so, the answer gets lost, and S has been told to stop."""
    world = World(BLOCKS)
    tokens = bytes(2 * TOKEN_BYTES)
    for cancelled in (False, True):
        outgoing = world.begin(0, 2, tokens)
        assert outgoing is not None
        session, source = outgoing.session, world.hosts[0]
        peer = source.table.peer_of(session)
        if cancelled:
            world.deliver(0)
            world.wire.clear()  # AlreadyHave
            world.act(source, peer, session, session.cancel(world.now))
        else:
            world.deliver(0)
            world.deliver(0)
            world.act(source, peer, session, session.write(Round(0, 2, None), world.now))
            for copy in list(world.copies):
                world.land(copy)
                world.end_copy(copy, None, Drained.YES)
            world.act(source, peer, session, session.seal(world.now))
        for _ in range(6):
            if world.wire:
                world.deliver(0)
        assert source.table.sources == 0, session.state
