"""Transfers between processes, of which one is killed or stopped in the middle. Protects: the
survivor gets every block back, and none before the other can no longer write to it."""

from __future__ import annotations

import pytest
import torch
import zmq

from memserve import Medium, MemPool
from memserve.clock import ManualClock
from memserve.errors import OutOfBlocks, PeerLost, StaleBlock, TransferError
from memserve.transfer.base import HostId, PoolRegions
from memserve.transfer.host import ProcessTag
from memserve.transfer.messages import Prepare
from memserve.transfer.secret import cluster_keys
from memserve.transfer.session import LEASE, QUARANTINE_TIMEOUT
from memserve.transfer.wire import Hello, encode, header
from memserve.types import Epoch, InstanceId, Owner, RefArray
from tests.transfer_child import BLOCKS, Child
from tests.transfer_harness import (
    LAYOUT,
    LOCAL,
    PATIENCE,
    eventually,
    filled,
    kv_blocks,
    quiet,
    tokens_of,
)

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


def test_bytes_go_from_process_to_process() -> None:
    with MemPool(LAYOUT, BLOCKS, instance="b") as b, Child("a") as child:
        child.ask(f"connect b {b.serve(LOCAL)}")
        child.ask("send b 5")
        eventually(lambda: b.stats().hbm.cached == 5, "the commit")
        with b.match(tokens_of(5)) as match:
            assert torch.equal(b.read(match.refs), kv_blocks(5))
        quiet(b)


def test_a_source_that_is_killed_leaves_nothing() -> None:
    with MemPool(LAYOUT, BLOCKS, instance="b") as b, Child("a", "stuck") as child:
        child.ask(f"connect b {b.serve(LOCAL)}")
        child.ask("hold b 2")
        child.ask("send b 5")
        eventually(lambda: b.stats().hbm.active == 7, "the Prepare")
        child.kill()
        eventually(lambda: b.stats().hbm.active == 0, "the blocks of the dead")
        quiet(b)
        assert b.peer_stats().incoming == 0


def test_a_source_that_stops_keeps_what_it_may_write_to_until_it_is_back() -> None:
    with MemPool(LAYOUT, BLOCKS, instance="b") as b, Child("a", "stuck") as child:
        child.ask(f"connect b {b.serve(LOCAL)}")
        child.ask("hold b 2")
        child.ask("send b 5")
        eventually(lambda: b.stats().hbm.active == 7, "the Prepare")
        child.stop()
        eventually(lambda: b.peer_stats().quarantined == 5, "the end of the lease")
        assert b.quarantined_blocks == 5
        eventually(lambda: b.stats().hbm.active == 5, "what it cannot write to")
        with pytest.raises(OutOfBlocks):
            b.alloc_mem(BLOCKS)
        child.go_on()
        eventually(lambda: b.stats().hbm.active == 0, "that it has drained")
        quiet(b)


def test_a_source_that_is_killed_while_stopped_leaves_nothing() -> None:
    with MemPool(LAYOUT, BLOCKS, instance="b") as b, Child("a", "stuck") as child:
        child.ask(f"connect b {b.serve(LOCAL)}")
        child.ask("send b 5")
        eventually(lambda: b.stats().hbm.active == 5, "the Prepare")
        child.stop()
        eventually(lambda: b.peer_stats().quarantined == 5, "the end of the lease")
        child.kill()
        eventually(lambda: b.stats().hbm.active == 0, "the blocks of the dead")
        quiet(b)


def test_a_destination_that_stops_fails_the_transfer_and_frees_its_blocks_later() -> None:
    with MemPool(LAYOUT, BLOCKS, instance="a") as a, Child("b") as child:
        a.connect("b", child.address)
        a.insert(tokens_of(4), filled(a, 4))
        transfer = a.open_transfer("b", filled(a, 2))
        eventually(lambda: child.ask("active") == "2", "the Prepare")
        child.stop()
        with a.match(tokens_of(4)) as match:
            second = a.transfer_with_insert("b", tokens_of(4), match.refs)
        for each in (transfer, second):
            with pytest.raises(PeerLost):
                each.result(PATIENCE)
        quiet(a)
        child.go_on()
        eventually(lambda: child.ask("active") == "0", "that the source has given up")
        a.transfer_with_insert("b", tokens_of(4), match.refs).result(PATIENCE)
        quiet(a)


def test_a_destination_that_is_killed_and_restarted_behind_its_address() -> None:
    with MemPool(LAYOUT, BLOCKS, instance="a") as a:
        with Child("b") as first:
            address = first.address
            a.connect("b", address)
            held = a.alloc_mem(2, instance="b")
            transfer = a.open_transfer("b", filled(a, 2))
            eventually(lambda: first.ask("active") == "4", "the Prepare")
            first.kill()
            with pytest.raises(PeerLost):
                transfer.result(PATIENCE)
        with Child("b", address=address) as second:
            source = filled(a, 3)
            eventually(lambda: _sent(a, source), "the new life")
            assert second.ask("active") == "0"
            with pytest.raises(StaleBlock):
                a.free_mem(held)
        quiet(a)


def _sent(pool: MemPool, source: RefArray) -> bool:
    try:
        pool.transfer_with_insert("b", tokens_of(3), source).result(PATIENCE)
    except TransferError:
        return False
    return True


def test_blocks_of_a_host_that_is_never_heard_of_again_come_back() -> None:
    """Nobody says that it has died. Protects: not sooner than TCP has given it up."""
    clock = ManualClock()
    lost = Owner(InstanceId("lost"), Epoch(1))
    elsewhere = ProcessTag("another kernel", 0, 1, 1)
    memory = PoolRegions(LAYOUT, HostId("another kernel", 0), ())
    prepare = Prepare(1, 5, Medium.HBM)
    with (
        MemPool(LAYOUT, BLOCKS, instance="b", clock=clock) as b,
        zmq.Context() as context,
        context.socket(zmq.DEALER) as socket,
    ):
        cluster_keys().secure_client(socket)
        socket.connect(b.serve(LOCAL))
        for message, receiver in (
            (Hello(False, elsewhere, memory, ()), 0),
            (prepare, b.owner.epoch),
        ):
            body = encode(lost, Epoch(receiver), message)
            socket.send_multipart([header(LAYOUT), body])
        eventually(lambda: b.stats().hbm.active == 5, "the Prepare")
        clock.advance(LEASE)
        eventually(lambda: b.peer_stats().quarantined == 5, "the end of the lease")
        clock.advance(QUARANTINE_TIMEOUT - 2 * LEASE)
        b.peer_stats()  # answered by the thread that looks at its clock
        assert b.peer_stats().quarantined == 5
        clock.advance(2 * LEASE)
        eventually(lambda: b.stats().hbm.active == 0, "that it is abandoned")
        quiet(b)
