"""Who gets KV published in a pool, or blocks of it freed: only who may write to its memory, and
only blocks that are its own. Each test speaks as an attacker does: plain messages over a socket, or
a source whose writes do not arrive."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from itertools import count

import numpy as np
import pytest
import torch
import zmq

from memserve import KVLayout, Medium, MemPool
from memserve.clock import MonotonicClock
from memserve.errors import NotOwned, TransferError, UnwrittenBlocks
from memserve.tokens import to_wire
from memserve.transfer import wire
from memserve.transfer.base import BlockList, PoolRegions, Ticket, Transport, WriteList
from memserve.transfer.canary import Canaries
from memserve.transfer.conversion import meaning
from memserve.transfer.host import host_id, own_process
from memserve.transfer.messages import (
    Aborted,
    Commit,
    Committed,
    Prepare,
    Prepared,
    Refused,
    SessionMessage,
    to_wire_refs,
)
from memserve.transfer.secret import cluster_keys
from memserve.transfer.shm import ShmTransport
from memserve.types import Epoch, InstanceId, Owner, RefArray
from tests.faulty_transport import Duplicate, FaultyTransport, listed
from tests.transfer_harness import (
    LAYOUT,
    LOCAL,
    PATIENCE,
    eventually,
    filled,
    kv_blocks,
    quiet,
    tokens_of,
    two_pools,
)

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

HEADER = wire.header(LAYOUT)
TOKENS = np.array(tokens_of(3), dtype=np.int32)


class Stranger:
    """Says what it likes to a pool, over a socket, in the name of a life that it makes up."""

    def __init__(self, pool: MemPool, socket: zmq.Socket[bytes], name: str, epoch: int = 1) -> None:
        self.owner = Owner(InstanceId(name), Epoch(epoch))
        self._pool = pool
        self._socket = socket
        self._numbers = count(1)

    def say(self, message: wire.Message, receiver: int | None = None) -> None:
        to = Epoch(self._pool.owner.epoch if receiver is None else receiver)
        self._socket.send_multipart([HEADER, wire.encode(self.owner, to, message)])

    def introduce(self) -> None:
        memory = PoolRegions(LAYOUT, host_id(), ())
        self.say(wire.Hello(True, own_process(), memory, ()), receiver=0)
        assert isinstance(self.hear(), wire.Hello)

    def hear(self) -> wire.Message:
        """The next answer; heartbeats are none."""
        while True:
            message = wire.decode(self._socket.recv_multipart(), meaning(LAYOUT)).message
            if not isinstance(message, wire.Beat):
                return message

    def ask(self, message: SessionMessage | wire.FreeBlocks) -> wire.Message:
        self.say(message)
        return self.hear()

    def prepare(self, target: RefArray | None = None, tokens: bool = True) -> Prepare:
        return Prepare(
            next(self._numbers),
            3 if target is None else len(target),
            Medium.HBM,
            tokens=to_wire(TOKENS[: 4 * (3 if target is None else len(target))])
            if tokens
            else None,
            target=None if target is None else to_wire_refs(target),
        )


@contextlib.contextmanager
def stranger_of(pool: MemPool, name: str = "stranger") -> Iterator[Stranger]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        cluster_keys().secure_client(socket)
        socket.linger = 1000
        socket.rcvtimeo = int(PATIENCE * 1000)
        socket.connect(pool.serve(LOCAL))
        stranger = Stranger(pool, socket, name)
        stranger.introduce()
        yield stranger


def has_nothing(pool: MemPool) -> bool:
    with pool.match(TOKENS) as match:
        return match.tokens == 0


def test_three_messages_publish_nothing() -> None:
    with MemPool(LAYOUT, 8, instance="b") as b, stranger_of(b) as stranger:
        secret = filled(b, 8, seed=7)  # what lies in those blocks
        b.free_mem(secret)
        prepare = stranger.prepare()
        prepared = stranger.ask(prepare)
        assert isinstance(prepared, Prepared)
        answer = stranger.ask(Commit(prepare.number, prepared.attempt))
        assert isinstance(answer, Aborted)
        assert answer.failure is not None
        assert answer.failure.kind == "UnwrittenBlocks"
        assert has_nothing(b)
        assert b.stats().hbm.active == 0
        assert b.peer_stats().unwritten == 1
        again = stranger.ask(Commit(prepare.number, prepared.attempt))
        assert isinstance(again, Aborted)
        assert has_nothing(b)
        quiet(b)


def test_blocks_of_the_engine_are_no_ones_target() -> None:
    """Named as a target they would be written to, or published as the KV of other tokens."""
    with MemPool(LAYOUT, 8, instance="b") as b, stranger_of(b) as stranger:
        refs = b.alloc_mem(3, private=True)
        b.write(refs, kv_blocks(3))
        for tokens in (True, False):
            answer = stranger.ask(stranger.prepare(refs, tokens))
            assert isinstance(answer, Refused)
            assert answer.failure.kind == "NotOwned"
        assert torch.equal(b.read(refs), kv_blocks(3))
        assert has_nothing(b)
        b.free_mem(refs)


def test_what_was_given_to_one_peer_is_not_anothers_target() -> None:
    with MemPool(LAYOUT, 8, instance="b") as b, stranger_of(b) as stranger:
        with MemPool(LAYOUT, 8, instance="a") as a:
            a.connect("b", stranger_address(b))
            refs = a.transfer("b", filled(a, 3)).result(PATIENCE)
            assert isinstance(stranger.ask(stranger.prepare(refs)), Refused)
            assert torch.equal(b.read(refs), kv_blocks(3))
            a.transfer("b", filled(a, 3, seed=1), refs).result(PATIENCE)  # but still its own
            assert torch.equal(b.read(refs), kv_blocks(3, seed=1))
            a.free_mem(refs)
        quiet(b)


def stranger_address(pool: MemPool) -> str:
    """Where a pool that is served already listens."""
    router = pool._require_service()._sockets._router
    assert router is not None
    return router.getsockopt_string(zmq.LAST_ENDPOINT)


def test_a_target_that_is_not_written_is_not_published() -> None:
    with MemPool(LAYOUT, 8, instance="b") as b, stranger_of(b) as stranger:
        target = b.alloc_mem(3)
        prepare = stranger.prepare(target)
        prepared = stranger.ask(prepare)
        assert isinstance(prepared, Prepared)
        assert isinstance(stranger.ask(Commit(prepare.number, prepared.attempt)), Aborted)
        assert has_nothing(b)
        b.free_mem(target)
        quiet(b)


def test_only_what_was_given_to_a_peer_is_its_to_free() -> None:
    with MemPool(LAYOUT, 8, instance="b") as b, stranger_of(b) as stranger:
        engines, public = b.alloc_mem(2, private=True), b.alloc_mem(1)
        for number, refs in enumerate((engines, public)):
            answer = stranger.ask(wire.FreeBlocks(number, to_wire_refs(refs)))
            assert isinstance(answer, wire.FreedBlocks)
            assert answer.failure is not None
            assert answer.failure.kind == "NotOwned"
        assert b.stats().hbm.active == 3
        own = stranger.prepare(tokens=False)
        prepared = stranger.ask(own)
        assert isinstance(prepared, Prepared)
        committed = stranger.ask(Commit(own.number, prepared.attempt))
        assert isinstance(committed, Committed)
        answer = stranger.ask(wire.FreeBlocks(9, committed.wire_refs))
        assert answer == wire.FreedBlocks(9)
        assert b.stats().hbm.active == 3
        b.free_mem(np.concatenate((engines, public)))


class Leaky:
    """A transport that says of all that it is given that it is written, and writes a part."""

    def __init__(self, layout: KVLayout, layers: range, blocks: int) -> None:
        self._inner = ShmTransport(layout)
        self._layers = layers
        self._blocks = blocks

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def post(self, peer: Owner, writes: WriteList) -> Ticket:
        source, target = (
            BlockList(each.medium[: self._blocks], each.index[: self._blocks])
            for each in (writes.source, writes.target)
        )
        return self._inner.post(peer, WriteList(source, target, self._layers, writes.heads))


@pytest.mark.parametrize(
    ("layers", "blocks"), [(range(1), 3), (range(1, 3), 3), (range(3), 2), (range(2), 1)]
)
@pytest.mark.parametrize("aggregated", [True, False])
def test_a_source_that_leaves_out_blocks_or_layers_publishes_nothing(
    layers: range, blocks: int, aggregated: bool
) -> None:
    def leaky(owner: Owner, layout: KVLayout) -> list[Transport]:
        return [Leaky(layout, layers, blocks)]  # type: ignore[list-item]

    other = dataclasses.replace(LAYOUT, aggregated=aggregated)
    with (
        MemPool(LAYOUT, 8, instance="a", transports=leaky) as a,
        MemPool(other, 8, instance="b") as b,
    ):
        a.connect("b", b.serve(LOCAL))
        with pytest.raises(UnwrittenBlocks):
            a.transfer_with_insert("b", TOKENS, filled(a, 3)).result(PATIENCE)
        assert has_nothing(b)
        target = b.alloc_mem(3)
        with pytest.raises(UnwrittenBlocks):
            a.transfer("b", filled(a, 3), target).result(PATIENCE)
        b.free_mem(target)
        quiet(b)


def test_what_was_written_twice_is_written() -> None:
    def twice(owner: Owner, layout: KVLayout) -> list[Transport]:
        return [FaultyTransport(ShmTransport(layout), listed(Duplicate()), MonotonicClock())]

    with two_pools(transports=twice) as (a, b):
        refs = a.transfer_with_insert("b", TOKENS, filled(a, 3)).result(PATIENCE)
        assert torch.equal(b.read(refs), kv_blocks(3))


@pytest.mark.parametrize("heads", [range(2), range(1), range(1, 2)])
@pytest.mark.parametrize("aggregated", [True, False])
def test_a_canary_touches_only_the_heads_that_are_written(heads: range, aggregated: bool) -> None:
    layout = KVLayout(3, 2, 1, "float16", 8, aggregated, model="thin")
    with MemPool(layout, 8, 4, instance="b", dram_segment_blocks=2) as b:
        refs = np.concatenate((b.alloc_mem(3), b.alloc_mem(4, Medium.DRAM)))
        before = kv_blocks(7, layout=layout).to(torch.float16)
        b.write(refs, before)
        canaries = Canaries(b)
        canary = canaries.plant(refs[1:], heads)
        assert canary.left() == 6 * layout.layers
        after = b.read(refs)
        others = [head for head in range(2) if head not in heads]
        assert torch.equal(after[..., others, :], before[..., others, :])
        assert torch.equal(after[:1], before[:1])
        b.write(refs[1:3], before[1:3])
        assert canary.left() == 4 * layout.layers
        b.write(refs[3:], before[3:])
        assert canary.left() == 0
        b.free_mem(refs)
        assert b.shrink_dram(4) == 4
        b.grow_dram(4)  # other memory in the same place
        again = b.alloc_mem(4, Medium.DRAM)
        canary = canaries.plant(again, heads)
        assert canary.left() == 4 * layout.layers
        b.write(again, before[:4])
        assert canary.left() == 0


def test_a_peer_is_refused_what_a_local_owner_is_refused() -> None:
    with two_pools() as (a, b):
        target = b.alloc_mem(2, private=True)
        with pytest.raises((NotOwned, TransferError)):
            a.transfer("b", filled(a, 2), target).result(PATIENCE)
        b.claim(target)  # what a local caller claims, it may have written to
        a.transfer("b", filled(a, 2), target).result(PATIENCE)
        eventually(lambda: b.peer_stats().quarantined == 0, "the end of the guard")
        b.free_mem(target)
