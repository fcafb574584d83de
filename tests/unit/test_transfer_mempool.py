"""Transfers between two pools of one process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from memserve import KVLayout, Medium, MemPool
from memserve.api.status import LinkTotals
from memserve.clock import MonotonicClock
from memserve.config import TransferMode
from memserve.errors import (
    DoubleFree,
    LengthMismatch,
    NotOwned,
    OutOfBlocks,
    PeerLost,
    StaleBlock,
    TransferCancelled,
    TransferError,
    TransferTimeout,
    UnknownPeer,
)
from memserve.transfer.base import PoolRegions, Region, Transport
from memserve.transfer.conversion import meaning
from memserve.transfer.host import host_id, own_process
from memserve.transfer.kv_link import totals_of
from memserve.transfer.mempool import MakeTransports
from memserve.transfer.peers import Peers
from memserve.transfer.shm import ShmTransport
from memserve.transfer.sockets import PoolSockets, Way
from memserve.transfer.unix_socket import DATAGRAM_BYTES, UnixAddress, is_unix_socket
from memserve.transfer.wire import Hello, decode
from memserve.types import Epoch, InstanceId, Owner
from tests.faulty_transport import Delay, Drop, Fail, Fault, FaultyTransport, listed
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

Pools = tuple[MemPool, MemPool]
MODES: list[TransferMode] = ["by-layer", "by-request", "by-request-agg"]


@pytest.fixture
def pools() -> Iterator[Pools]:
    with two_pools() as both:
        yield both


def faults(*plan: Fault | None) -> MakeTransports:
    """Shared memory whose writes meet these faults, one after the other."""

    def make(owner: Owner, layout: KVLayout) -> list[Transport]:
        return [FaultyTransport(ShmTransport(layout), listed(*plan), MonotonicClock())]

    return make


@pytest.mark.parametrize("mode", MODES)
def test_bytes_arrive_in_new_blocks_that_the_sender_frees(pools: Pools, mode: TransferMode) -> None:
    a, b = pools
    source = filled(a, 5)
    refs = a.transfer("b", source, mode=mode).result(PATIENCE)
    assert torch.equal(b.read(refs), kv_blocks(5))
    a.free_mem(refs)
    assert b.stats().hbm.active == 0
    with pytest.raises(DoubleFree):
        a.free_mem(refs)


def test_bytes_arrive_in_blocks_that_the_receiver_allocated(pools: Pools) -> None:
    a, b = pools
    target = b.alloc_mem(3)
    transfer = a.transfer("b", filled(a, 3), target)
    assert np.array_equal(transfer.result(PATIENCE), target)
    assert torch.equal(b.read(target), kv_blocks(3))
    b.free_mem(target)


def test_a_pool_counts_what_it_wrote_into_others_and_how_long_that_took(pools: Pools) -> None:
    a, b = pools
    assert totals_of(b).links["shm"] == LinkTotals()
    before = totals_of(a).links["shm"]
    begin = time.monotonic()
    a.free_mem(a.transfer("b", filled(a, 5)).result(PATIENCE))
    whole = time.monotonic() - begin
    after = totals_of(a).links["shm"]
    block = kv_blocks(5).nbytes // 5
    assert after.bytes - before.bytes == 5 * block
    assert after.transfers > before.transfers
    assert after.pieces > before.pieces
    assert 0 < after.seconds - before.seconds <= whole
    assert totals_of(b).links["shm"].bytes == 0


def test_blocks_are_allocated_at_a_peer_and_come_back(pools: Pools) -> None:
    a, b = pools
    refs = a.alloc_mem(4, Medium.DRAM, instance="b")
    assert b.stats().dram.active == 4
    a.transfer("b", filled(a, 4), refs).result(PATIENCE)
    assert torch.equal(b.read(refs), kv_blocks(4))
    a.free_mem(refs)
    assert b.stats().dram.active == 0
    with pytest.raises(OutOfBlocks) as error:
        a.alloc_mem(100, instance="b")
    assert error.value.total == 32


def test_only_what_the_receiver_lacks_is_sent(pools: Pools) -> None:
    a, b = pools
    source = filled(a, 6)
    assert a.transfer_with_insert("b", tokens_of(2), source[:2]).result(PATIENCE).shape == (2,)
    transfer = a.transfer_with_insert("b", tokens_of(6), source)
    transfer.result(PATIENCE)
    assert transfer.sent == 4
    again = a.transfer_with_insert("b", tokens_of(6), source)
    again.result(PATIENCE)
    assert again.sent == 0
    assert np.array_equal(again.refs, transfer.refs)
    with b.match(tokens_of(6)) as match:
        assert np.array_equal(match.refs, transfer.refs)
        assert torch.equal(b.read(match.refs), kv_blocks(6))
    assert b.stats().hbm.active == 0


def test_namespaces_are_kept_apart(pools: Pools) -> None:
    a, b = pools
    a.transfer_with_insert("b", tokens_of(2), filled(a, 2), namespace="x").result(PATIENCE)
    with b.match(tokens_of(2)) as here, b.match(tokens_of(2), "x") as there:
        assert (here.tokens, there.tokens) == (0, 2 * LAYOUT.block_tokens)


def test_insert_into_blocks_of_the_receiver_leaves_it_the_duplicates(pools: Pools) -> None:
    a, b = pools
    a.transfer_with_insert("b", tokens_of(1), filled(a, 1)).result(PATIENCE)
    target = b.alloc_mem(3)
    refs = a.transfer_with_insert("b", tokens_of(3), filled(a, 3), target).result(PATIENCE)
    assert np.array_equal(refs[1:], target[1:])
    b.free_mem(target[:1])
    assert b.stats().hbm.active == 0


def test_cached_blocks_are_sent_and_cannot_be_evicted_meanwhile() -> None:
    with two_pools(8, transports=faults(Delay(0.3))) as (a, b):
        a.insert(tokens_of(6), filled(a, 6))
        with a.match(tokens_of(6)) as match:
            source = match.refs
        transfer = a.transfer_with_insert("b", tokens_of(6)[-8:], source[4:])
        with pytest.raises(OutOfBlocks):
            a.alloc_mem(8)  # the whole prefix is pinned
        transfer.result(PATIENCE)
        with b.match(tokens_of(6)[-8:]) as there:
            assert torch.equal(b.read(there.refs), kv_blocks(6)[4:])
        eventually(lambda: a.stats().matches == 0, "the pins' release")
        a.free_mem(a.alloc_mem(8))


def test_a_block_freed_and_reused_during_the_copy_is_never_published() -> None:
    with two_pools(transports=faults(Delay(0.2))) as (a, b):
        source = filled(a, 2)
        transfer = a.transfer_with_insert("b", tokens_of(2), source)
        a.free_mem(source)
        filled(a, 32, seed=1)
        with pytest.raises(StaleBlock):
            transfer.result(PATIENCE)
        with b.match(tokens_of(2)) as match:
            assert match.tokens == 0
        eventually(lambda: b.stats().hbm.active == 0, "the blocks of the aborted transfer")


@pytest.mark.parametrize("mode", MODES)
def test_layers_are_written_as_they_get_ready(pools: Pools, mode: TransferMode) -> None:
    a, b = pools
    source = filled(a, 3)
    transfer = a.open_transfer("b", source, tokens=tokens_of(3))
    for layer in range(LAYOUT.layers):
        transfer.write(range(layer, layer + 1))
        with b.match(tokens_of(3)) as match:
            assert match.tokens == 0  # not before it is whole
    transfer.commit()
    assert torch.equal(b.read(transfer.result(PATIENCE)), kv_blocks(3))
    with pytest.raises(TransferError):
        transfer.write()


def test_cancel_before_during_and_after_the_copy() -> None:
    with two_pools(transports=faults(Drop())) as (a, b):
        source = filled(a, 4)
        waiting = a.open_transfer("b", source)  # nothing to write yet
        waiting.cancel()
        with pytest.raises(TransferCancelled):
            waiting.result(PATIENCE)
        stuck = a.transfer("b", source)  # the write does not end by itself
        with pytest.raises(TransferTimeout):
            stuck.result(0.05)
        assert not stuck.done
        stuck.cancel()
        with pytest.raises(TransferCancelled):
            stuck.result(PATIENCE)
        eventually(lambda: b.stats().hbm.active == 0, "the blocks of cancelled transfers")
        whole = a.transfer("b", source)
        refs = whole.result(PATIENCE)
        whole.cancel()
        assert torch.equal(b.read(refs), kv_blocks(4))
        a.free_mem(refs)


def test_a_failed_write_gives_the_blocks_back_and_the_next_one_works() -> None:
    with two_pools(transports=faults(Fail())) as (a, b):
        source = filled(a, 4)
        with pytest.raises(PeerLost, match="by plan"):
            a.transfer_with_insert("b", tokens_of(4), source).result(PATIENCE)
        eventually(lambda: b.stats().hbm.active == 0, "the blocks of the failed transfer")
        a.transfer_with_insert("b", tokens_of(4), source).result(PATIENCE)


def test_what_a_peer_writes_to_is_neither_reused_nor_published_by_its_owner() -> None:
    with two_pools(transports=faults(Drop())) as (a, b):
        target = b.alloc_mem(2)
        transfer = a.transfer("b", filled(a, 2), target)
        eventually(lambda: b.peer_stats().incoming == 1, "the peer's Prepare")
        with pytest.raises(NotOwned):
            b.insert(tokens_of(2), target)
        b.free_mem(target)
        with pytest.raises(DoubleFree):
            b.free_mem(target)
        assert b.peer_stats().quarantined == 2
        assert totals_of(b).quarantined == 2
        with pytest.raises(OutOfBlocks):
            b.alloc_mem(32)
        transfer.cancel()
        eventually(lambda: b.peer_stats().quarantined == 0, "the end of the quarantine")
        b.free_mem(b.alloc_mem(32))


def test_blocks_in_memory_added_later_are_reached(pools: Pools) -> None:
    a, b = pools
    b.grow_dram(64)
    source = filled(a, 32)
    held = b.alloc_mem(8, Medium.DRAM)
    refs = a.transfer("b", source, medium=Medium.DRAM).result(PATIENCE)
    assert torch.equal(b.read(refs), kv_blocks(32))
    a.free_mem(refs)
    b.free_mem(held)
    assert b.shrink_dram(64) == 64


def test_memory_added_later_is_known_before_what_is_said_of_it(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What says it over TCP is overtaken by what goes the short way."""
    a, b = pools
    send, held_up = PoolSockets.send, []

    def slow(links: PoolSockets, path: Way, header: bytes, body: bytes) -> bool:
        message = decode([header, body], meaning(LAYOUT)).message
        if isinstance(message, Hello) and not isinstance(path, UnixAddress):
            held_up.append(message)
            return True
        return send(links, path, header, body)

    monkeypatch.setattr(PoolSockets, "send", slow)
    b.grow_dram(64)
    refs = a.transfer("b", filled(a, 32), medium=Medium.DRAM).result(PATIENCE)
    assert torch.equal(b.read(refs), kv_blocks(32))
    assert held_up
    a.free_mem(refs)


def test_an_introduction_that_comes_late_does_not_undo_a_later_one() -> None:
    peers = Peers([], "auto")
    owner = Owner(InstanceId("a"), Epoch(1))
    small, large = (
        PoolRegions(LAYOUT, host_id(), (Region(Medium.DRAM, 0, blocks, 0, 1, None, None),))
        for blocks in (4, 8)
    )
    for memory, edition in ((small, 1), (large, 2), (small, 1)):
        hello = Hello(False, own_process(), memory, (), "", edition)
        assert peers.introduce(owner, hello, b"route", silent=False) == []
    assert peers.current(owner.instance).memory is large
    large_again = Hello(False, own_process(), large, (), "", 2)
    assert peers.introduce(owner, large_again, b"route", silent=False) == []
    assert peers.current(owner.instance).hello is large_again


def test_both_ways_at_once(pools: Pools) -> None:
    a, b = pools
    b.connect("a", a.serve(LOCAL))
    there = [a.transfer("b", filled(a, 2, seed)) for seed in range(8)]
    back = [b.transfer("a", filled(b, 1, seed)) for seed in range(8)]
    for seed in range(8):
        assert torch.equal(b.read(there[seed].result(PATIENCE)), kv_blocks(2, seed))
        assert torch.equal(a.read(back[seed].result(PATIENCE)), kv_blocks(1, seed))


def test_a_claimed_block_stays_when_its_sender_leaves() -> None:
    with MemPool(LAYOUT, 8, instance="b") as b:
        address = b.serve(LOCAL)
        with MemPool(LAYOUT, 8, instance="a") as a:
            a.connect("b", address)
            refs = a.transfer("b", filled(a, 4)).result(PATIENCE)
            b.claim(refs[:1])
        eventually(lambda: b.stats().hbm.active == 1, "the blocks that were not claimed")
        assert torch.equal(b.read(refs[:1]), kv_blocks(1))
        with pytest.raises(StaleBlock):
            b.claim(refs[1:])
        quiet(b)


def test_what_cannot_work_is_refused_at_once(pools: Pools) -> None:
    a, b = pools
    source = filled(a, 2)
    with pytest.raises(UnknownPeer, match="connected: b"):
        a.transfer("c", source)
    with pytest.raises(LengthMismatch):
        a.transfer("b", source, b.alloc_mem(3))
    with pytest.raises(LengthMismatch):
        a.transfer_with_insert("b", tokens_of(3), source)
    with pytest.raises(StaleBlock):
        a.transfer("b", source, source)  # not the peer's
    gone = b.alloc_mem(2)
    b.free_mem(gone)
    with pytest.raises((StaleBlock, DoubleFree)):
        a.transfer("b", source, gone).result(PATIENCE)
    a.free_mem(source)
    with pytest.raises(StaleBlock):
        a.transfer("b", source)


def test_closing_a_pool_fails_its_transfers_and_frees_the_peers_blocks() -> None:
    with MemPool(LAYOUT, 8, instance="b") as b:
        address = b.serve(LOCAL)
        with MemPool(LAYOUT, 8, instance="a", transports=faults(Drop())) as a:
            a.connect("b", address)
            transfer = a.transfer("b", filled(a, 4))
            eventually(lambda: b.stats().hbm.active == 4, "the peer's Prepare")
        with pytest.raises(TransferError):
            transfer.result(0)
        eventually(lambda: b.stats().hbm.active == 0, "the blocks of the closed pool")
        quiet(b)


def test_a_restarted_instance_is_met_again_behind_its_address() -> None:
    with MemPool(LAYOUT, 8, instance="a") as a:
        with MemPool(LAYOUT, 8, instance="b") as first:
            address = first.serve(LOCAL)
            a.connect("b", address)
            old = a.alloc_mem(2, instance="b")
        eventually(lambda: not _reachable(a), "the Bye")
        with MemPool(LAYOUT, 8, instance="b") as second:
            second.serve(address)
            eventually(lambda: _reachable(a), "the new life's Hello")
            with pytest.raises(StaleBlock):
                a.transfer("b", filled(a, 2), old)
            with pytest.raises(StaleBlock):
                a.free_mem(old)
            refs = a.transfer("b", filled(a, 2)).result(PATIENCE)
            assert torch.equal(second.read(refs), kv_blocks(2))


def test_peers_of_one_host_leave_tcp_for_a_shorter_way(pools: Pools) -> None:
    a, b = pools
    life = a._require_service().life(b.owner.instance)
    assert life.unix_route is not None
    assert is_unix_socket(life.unix_route.address)
    for _ in range(3):
        a.transfer_with_insert("b", tokens_of(2), filled(a, 2)).result(PATIENCE)


def test_a_message_too_long_for_the_shorter_way_takes_the_other() -> None:
    layout = replace(LAYOUT, block_tokens=4096)
    tokens = np.arange(16 * layout.block_tokens)
    assert tokens.astype(np.int32).nbytes > DATAGRAM_BYTES
    with MemPool(layout, 16, instance="a") as a, MemPool(layout, 16, instance="b") as b:
        a.connect("b", b.serve(LOCAL))
        a.transfer_with_insert("b", tokens, a.alloc_mem(16)).result(PATIENCE)
        with b.match(tokens) as match:
            assert match.tokens == len(tokens)


def _reachable(pool: MemPool) -> bool:
    try:
        pool.alloc_mem(0, instance="b")
    except (UnknownPeer, PeerLost):
        return False
    return True
