"""Whatever the layouts, shards and block lists: the target holds what the source holds, and
nothing beside it changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memserve import KVLayout
from memserve.pool.pool import BlockPool
from memserve.transfer.base import Outcome, WriteList
from memserve.transfer.conversion import common_heads
from memserve.transfer.copy_plan import RegionTable, plan_copies, split_pieces
from memserve.transfer.regions import local_regions
from memserve.transfer.shm import ShmTransport
from memserve.types import RefArray
from tests.copy_harness import connect, drain, fill, write_list

TOTAL_HEADS = 4
LAYERS = 3


@dataclass
class Side:
    pool: BlockPool
    blocks: RefArray  # all of them
    chosen: list[int]  # positions in `blocks`

    @property
    def refs(self) -> RefArray:
        return self.blocks[self.chosen]


@st.composite
def layouts(draw: st.DrawFn) -> KVLayout:
    shards = draw(st.sampled_from([1, 2, 4]))
    heads = TOTAL_HEADS // shards
    return KVLayout(
        layers=LAYERS,
        kv_heads=heads,
        head_dim=2,
        dtype="float32",
        block_tokens=2,
        aggregated=draw(st.booleans()),
        head_start=draw(st.integers(0, shards - 1)) * heads,
        total_kv_heads=TOTAL_HEADS,
    )


@contextmanager
def two_sides(data: st.DataObject, source: KVLayout, target: KVLayout) -> Iterator[list[Side]]:
    """Full pools, of several DRAM segments each, and as many chosen blocks of either."""
    with ExitStack() as stack:
        sides = []
        for seed, (name, layout) in enumerate((("a", source), ("b", target))):
            hbm, dram = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 7))
            pool = stack.enter_context(BlockPool(layout, hbm, dram, name, dram_segment_blocks=3))
            refs = np.concatenate(list(fill(pool, 10 * seed).values()))
            # In order, so that runs of neighbours are common, or shuffled.
            order = list(range(len(refs)))
            sides.append(Side(pool, refs, data.draw(st.just(order) | st.permutations(order))))
        count = data.draw(st.integers(0, min(len(side.blocks) for side in sides)))
        for side in sides:
            del side.chosen[count:]
        yield sides


def subrange(data: st.DataObject, whole: range) -> range | None:
    if data.draw(st.booleans()):
        return None
    first = data.draw(st.integers(whole.start, whole.stop - 1))
    return range(first, data.draw(st.integers(first + 1, whole.stop)))


def expected(source: Side, target: Side, layers: range | None, heads: range | None) -> torch.Tensor:
    """All of the target pool after the copy, said with plain indexing."""
    ours, theirs = source.pool.layout, target.pool.layout
    kv, result = source.pool.read(source.blocks), target.pool.read(target.blocks)
    for layer in layers or range(LAYERS):
        for head in heads or common_heads(ours, theirs):
            for at, to in zip(source.chosen, target.chosen, strict=True):
                copied = kv[at, layer, :, :, head - ours.head_start]
                result[to, layer, :, :, head - theirs.head_start] = copied
    return result


def by_shm(source: BlockPool, target: BlockPool, writes: WriteList) -> None:
    transport = ShmTransport(source.layout)
    connect(transport, source, target, ShmTransport(target.layout))
    ticket = transport.post(target.owner, writes)
    assert drain(transport, [ticket])[ticket].outcome is Outcome.DONE
    # One copy of each byte: nothing is gathered into a buffer first.
    assert transport.counters.bytes_copied == transport.counters.bytes_moved
    transport.close()


def by_pieces(source: BlockPool, target: BlockPool, writes: WriteList) -> None:
    """As a network would: runs of bytes, whatever they mean."""
    memory = {each.region: each.memory for pool in (source, target) for each in local_regions(pool)}
    tables = [
        RegionTable(pool.layout, [each.region for each in local_regions(pool)])
        for pool in (source, target)
    ]
    chunk_bytes = 3 * source.layout.block_bytes
    for chunk in chain.from_iterable(
        copy.chunks(chunk_bytes) for copy in plan_copies(*tables, writes)
    ):
        assert chunk.nbytes <= chunk_bytes
        for at, to, nbytes in split_pieces(chunk, limit=24):
            memory[chunk.target][to : to + nbytes] = memory[chunk.source][at : at + nbytes]


@pytest.mark.parametrize("move", [by_shm, by_pieces])
@given(source=layouts(), target=layouts(), data=st.data())
def test_the_target_holds_exactly_what_it_should(
    move: Callable[[BlockPool, BlockPool, WriteList], None],
    source: KVLayout,
    target: KVLayout,
    data: st.DataObject,
) -> None:
    if not common_heads(source, target):
        shared = source.head_start // target.kv_heads * target.kv_heads
        target = replace(target, head_start=shared)
    with two_sides(data, source, target) as (ours, theirs):
        layers = subrange(data, range(LAYERS))
        heads = subrange(data, common_heads(source, target))
        wanted = expected(ours, theirs, layers, heads)
        move(ours.pool, theirs.pool, write_list(ours.refs, theirs.refs, layers, heads))
        assert torch.equal(theirs.pool.read(theirs.blocks), wanted)
