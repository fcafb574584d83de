"""The shared-memory transport: what it refuses, and how tickets end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from memserve import KVLayout, Medium
from memserve.errors import LayoutMismatch, LengthMismatch, SegmentGone, UnknownBlock, UnknownPeer
from memserve.pool.pool import BlockPool
from memserve.transfer import shm
from memserve.transfer.base import Outcome, Region, WriteList, block_list
from memserve.transfer.host import host_id
from memserve.transfer.regions import local_regions, mappable, pool_regions
from memserve.transfer.shm import ShmTransport
from memserve.types import Epoch, Owner
from tests.copy_harness import connect, drain, fill, random_kv, write_list

LAYOUT = KVLayout(layers=2, kv_heads=2, head_dim=8, dtype="float32")


@pytest.fixture
def source() -> Iterator[BlockPool]:
    with BlockPool(LAYOUT, 8, 4, "source") as pool:
        yield pool


@pytest.fixture
def target() -> Iterator[BlockPool]:
    with BlockPool(LAYOUT, 8, 4, "target", dram_segment_blocks=2) as pool:
        yield pool


@pytest.fixture
def transport(source: BlockPool, target: BlockPool) -> Iterator[ShmTransport]:
    transport = ShmTransport(LAYOUT)
    connect(transport, source, target, ShmTransport(LAYOUT))
    yield transport
    transport.close()


def whole(blocks: int) -> WriteList:
    indices = list(range(blocks))
    return WriteList(block_list(Medium.HBM, indices), block_list(Medium.HBM, indices))


def test_blocks_of_both_media_arrive(
    transport: ShmTransport, source: BlockPool, target: BlockPool
) -> None:
    ours, theirs = fill(source, 1), fill(target, 2)
    refs = np.concatenate([ours[Medium.DRAM], ours[Medium.HBM]])
    onto = np.concatenate([theirs[Medium.HBM], theirs[Medium.DRAM]])
    ticket = transport.post(target.owner, write_list(refs, onto))
    assert drain(transport, [ticket])[ticket].outcome is Outcome.DONE
    assert torch.equal(target.read(onto), source.read(refs))


def test_neighbouring_blocks_are_copied_together(
    transport: ShmTransport, target: BlockPool
) -> None:
    drain(transport, [transport.post(target.owner, whole(8))])
    assert transport.counters.pieces == 1


def test_grown_memory_is_reached_once_described(
    transport: ShmTransport, source: BlockPool, target: BlockPool
) -> None:
    target.grow_dram(2)
    writes = WriteList(block_list(Medium.HBM, [0]), block_list(Medium.DRAM, [5]))
    with pytest.raises(UnknownBlock, match="block 5 of medium 1"):
        transport.post(target.owner, writes)
    memory = pool_regions(LAYOUT, local_regions(target))
    transport.add_peer(target.owner, memory, b"")
    ticket = transport.post(target.owner, writes)
    assert drain(transport, [ticket])[ticket].outcome is Outcome.DONE


@pytest.mark.parametrize("used_before", [False, True])
def test_memory_that_the_owner_gave_back_is_refused(
    transport: ShmTransport, target: BlockPool, used_before: bool
) -> None:
    writes = WriteList(block_list(Medium.HBM, [0]), block_list(Medium.DRAM, [3]))
    if used_before:
        drain(transport, [transport.post(target.owner, writes)])
    assert target.shrink_dram(2) == 2
    with pytest.raises(SegmentGone):
        transport.post(target.owner, writes)
    assert transport.in_flight == 0


def test_another_life_of_the_peer_is_another_peer(
    transport: ShmTransport, target: BlockPool
) -> None:
    ticket = transport.post(target.owner, whole(8))
    again = Owner(target.owner.instance, Epoch(target.owner.epoch + 1))
    transport.add_peer(again, pool_regions(LAYOUT, local_regions(target)), b"")
    assert drain(transport, [ticket])[ticket].outcome is Outcome.CANCELLED
    with pytest.raises(UnknownPeer):
        transport.post(target.owner, whole(1))
    transport.remove_peer(target.owner)  # is not the one that is connected
    assert drain(transport, [ticket := transport.post(again, whole(1))])[ticket].error is None


def test_cancelled_copies_stop_where_they_are(
    transport: ShmTransport, source: BlockPool, target: BlockPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shm, "POLL_BYTES", LAYOUT.block_bytes)
    monkeypatch.setattr(shm, "STEP_BYTES", LAYOUT.block_bytes)
    ours, theirs = fill(source, 1)[Medium.HBM], fill(target, 2)[Medium.HBM]
    before = target.read(theirs)
    ticket = transport.post(target.owner, write_list(ours, theirs))
    assert transport.poll() == []
    transport.cancel(ticket)
    transport.cancel(ticket)
    assert drain(transport, [ticket])[ticket].outcome is Outcome.CANCELLED
    source.write(ours, random_kv(LAYOUT, 8, 3))  # they are ours again
    assert transport.poll() == []
    assert torch.equal(target.read(theirs[1:]), before[1:])
    transport.cancel(ticket)  # long gone


def test_a_long_copy_leaves_room_between_polls(
    transport: ShmTransport, target: BlockPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shm, "POLL_BYTES", 2 * LAYOUT.block_bytes)
    monkeypatch.setattr(shm, "STEP_BYTES", LAYOUT.block_bytes)
    transport.post(target.owner, whole(8))
    copied = []
    while transport.in_flight:
        transport.poll()
        copied.append(transport.counters.bytes_copied // LAYOUT.block_bytes)
    assert copied == [2, 4, 6, 8]


def test_a_copy_that_fails_is_a_failed_one_and_nothing_more(
    transport: ShmTransport, target: BlockPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: object) -> None:
        raise RuntimeError("a device was lost")

    ticket = transport.post(target.owner, whole(8))
    with monkeypatch.context() as patch:
        patch.setattr(shm, "_copy_runs", failing)
        (ended,) = transport.poll()
    assert (ended.ticket, ended.outcome) == (ticket, Outcome.FAILED)
    assert "lost" in str(ended.error)
    again = transport.post(target.owner, whole(8))
    (ended,) = transport.poll()
    assert (ended.ticket, ended.outcome) == (again, Outcome.DONE)


def test_a_copy_that_an_exception_has_ended_is_not_done(
    transport: ShmTransport, target: BlockPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    ticket = transport.post(target.owner, whole(8))
    with monkeypatch.context() as patch:
        patch.setattr(shm, "_copy_runs", interrupted)
        with pytest.raises(KeyboardInterrupt):
            transport.poll()
    (ended,) = transport.poll()
    assert (ended.ticket, ended.outcome) == (ticket, Outcome.FAILED)


def test_nothing_to_copy_is_done_at_once(transport: ShmTransport, target: BlockPool) -> None:
    ticket = transport.post(target.owner, whole(0))
    assert [each.ticket for each in transport.poll()] == [ticket]


def test_other_layouts_are_refused(transport: ShmTransport, target: BlockPool) -> None:
    other = KVLayout(layers=2, kv_heads=2, head_dim=8, dtype="float32", model="another")
    with pytest.raises(LayoutMismatch):
        transport.add_peer(target.owner, pool_regions(other, local_regions(target)), b"")


def test_regions_that_contradict_their_layout_are_refused(
    transport: ShmTransport, target: BlockPool
) -> None:
    """They come over a wire, and say where this process writes."""
    memory = pool_regions(LAYOUT, local_regions(target))
    lies: list[Region] = [
        msgspec.structs.replace(memory.regions[0], blocks=9),
        msgspec.structs.replace(memory.regions[0], blocks=0, nbytes=0),
    ]
    for lie in lies:
        with pytest.raises(LayoutMismatch):
            transport.add_peer(target.owner, msgspec.structs.replace(memory, regions=(lie,)), b"")


@pytest.mark.parametrize(
    "change",
    [
        {"segment": None},
        {"segment": "../etc/passwd"},
        {"segment": "memserve-/../../etc/passwd"},
        {"segment": "memserve-0-0-0-0"},
        {"blocks": 16, "nbytes": 16 * LAYOUT.block_bytes},
    ],
)
def test_segments_that_are_not_what_was_said_are_refused(
    source: BlockPool, target: BlockPool, change: dict[str, object]
) -> None:
    memory = pool_regions(LAYOUT, local_regions(target))
    lie = msgspec.structs.replace(memory.regions[0], **change)
    transport = ShmTransport(LAYOUT)
    transport.register(local_regions(source))
    transport.add_peer(target.owner, msgspec.structs.replace(memory, regions=(lie,)), b"")
    with pytest.raises(SegmentGone):
        transport.post(target.owner, whole(1))


def test_write_lists_pair_blocks_up() -> None:
    with pytest.raises(LengthMismatch, match="2 source blocks for 1 target"):
        WriteList(block_list(Medium.HBM, [0, 1]), block_list(Medium.HBM, [0]))


def test_memory_is_mappable_on_this_host_while_it_exists(target: BlockPool) -> None:
    memory = pool_regions(LAYOUT, local_regions(target))
    assert mappable(memory)
    elsewhere = msgspec.structs.replace(host_id(), boot="another kernel")
    assert not mappable(msgspec.structs.replace(memory, host=elsewhere))
    target.shrink_dram(2)
    assert not mappable(memory)


CHILD = """
import sys
import msgspec, numpy as np
from memserve import KVLayout, Medium
from memserve.pool.pool import BlockPool
from memserve.transfer.base import PoolRegions, WriteList, block_list
from memserve.transfer.regions import local_regions
from memserve.transfer.shm import ShmTransport
from memserve.types import Owner
from tests.copy_harness import drain, fill, write_list

owner, memory = msgspec.json.decode(sys.stdin.read(), type=tuple[Owner, PoolRegions])
with BlockPool(memory.layout, 8, 0, "child") as pool:
    fill(pool, 7)
    transport = ShmTransport(pool.layout)
    transport.register(local_regions(pool))
    transport.add_peer(owner, memory, b"")
    order = [3, 1, 2, 0, 7, 6, 5, 4]
    writes = WriteList(block_list(Medium.HBM, order), block_list(Medium.HBM, order))
    drain(transport, [transport.post(owner, writes)])
"""


def test_another_process_writes_into_this_one(target: BlockPool) -> None:
    theirs = target.alloc_mem(8)
    memory = pool_regions(LAYOUT, local_regions(target))
    subprocess.run(
        [sys.executable, "-c", CHILD],
        input=msgspec.json.encode((target.owner, memory)),
        cwd=Path(__file__).parents[2],
        check=True,
        timeout=120,
    )
    with BlockPool(LAYOUT, 8) as same:
        assert torch.equal(target.read(theirs), same.read(fill(same, 7)[Medium.HBM]))
