"""Moving blocks between HBM and DRAM, and DRAM that grows and shrinks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from memserve import KVLayout, Medium
from memserve.errors import NotOwned, OutOfBlocks
from memserve.pool.pool import BlockPool
from memserve.types import ref_medium
from tests.device import DEVICE
from tests.pool_harness import (
    BLOCK,
    LAYOUT,
    TickingClock,
    cached_blocks,
    keys_of,
    kv_of,
    prompt,
    store,
)


@pytest.fixture(params=[True, False], ids=["aggregated", "discrete"])
def pool(request: pytest.FixtureRequest) -> Iterator[BlockPool]:
    layout = KVLayout(2, 1, 3, "float32", BLOCK, aggregated=request.param)
    with BlockPool(
        layout, 8, 6, device=DEVICE, clock=TickingClock(), dram_segment_blocks=2
    ) as pool:
        yield pool
        pool.check_integrity()


def in_hbm(refs: np.ndarray) -> list[bool]:
    return [bool(m == Medium.HBM) for m in ref_medium(refs)]


def test_swapped_kv_comes_back_unchanged(pool: BlockPool) -> None:
    tokens = prompt(1, 2, 3, 4)
    store(pool, tokens)
    assert pool.swap_out(3) == 3
    with pool.match(tokens) as match:
        assert in_hbm(match.refs) == [True, False, False, False]
    assert cached_blocks(pool, tokens) == 4
    with pool.match(tokens, in_hbm=True) as match:
        assert all(in_hbm(match.refs))
        assert torch.equal(pool.read(match.refs).cpu(), kv_of(keys_of("", tokens)))
    stats = pool.stats()
    assert (stats.swapped_out, stats.swapped_in, stats.evictions) == (3, 3, 0)


def test_swap_out_takes_what_there_is(pool: BlockPool) -> None:
    store(pool, prompt(1, 2))
    with pool.match(prompt(1)):
        assert pool.swap_out(5) == 1
    assert pool.swap_out(5) == 1
    assert pool.swap_out(5) == 0


def test_swap_in_keeps_order_and_passes_hbm_through(pool: BlockPool) -> None:
    refs = np.concatenate((pool.alloc_mem(1, Medium.DRAM), pool.alloc_mem(1)))
    refs = np.concatenate((refs, pool.alloc_mem(1, Medium.DRAM)))
    kv = torch.randn(3, *pool.layout.block_shape)
    pool.write(refs, kv)
    moved = pool.swap_in(refs)
    assert moved[1] == refs[1]
    assert all(in_hbm(moved))
    assert torch.equal(pool.read(moved).cpu(), kv)
    pool.free_mem(moved)
    assert pool.stats().dram.free == 6


def test_readers_keep_a_block_that_is_swapped_in(pool: BlockPool) -> None:
    store(pool, prompt(1, 2))
    pool.swap_out(2)
    with pool.match(prompt(1, 2)) as reader:
        moved = pool.swap_in(reader.refs)
        assert pool.stats().dram.detached == 2
        assert torch.equal(pool.read(reader.refs).cpu(), pool.read(moved).cpu())
        with pool.match(prompt(1, 2)) as second:
            assert second.refs.tolist() == moved.tolist()
        with pytest.raises(NotOwned, match="left the index"):
            pool.swap_in(reader.refs)
    assert pool.stats().dram.free == 6


def test_swap_in_without_room_changes_nothing(pool: BlockPool) -> None:
    store(pool, prompt(1, 2))
    pool.swap_out(2)
    pool.alloc_mem(7)
    before = pool.stats()
    with (
        pool.match(prompt(1, 2)) as match,
        pytest.raises(OutOfBlocks, match="2 HBM blocks asked, 1 free and 0 evictable of 8"),
    ):
        pool.swap_in(match.refs)
    assert pool.stats() == before


def test_a_match_in_hbm_is_as_long_as_there_is_room(pool: BlockPool) -> None:
    store(pool, prompt(1, 2, 3))
    pool.swap_out(3)
    pool.alloc_mem(6)
    with pool.match(prompt(1, 2, 3), in_hbm=True) as match:
        assert match.tokens == 2 * BLOCK
        assert torch.equal(pool.read(match.refs).cpu(), kv_of(keys_of("", prompt(1, 2))))


def test_swapping_in_makes_room_without_dropping_its_own_source(pool: BlockPool) -> None:
    store(pool, prompt(1, 2, 3))
    pool.swap_out(3)
    store(pool, prompt(4, 5, 6, 7, 8, 9, 10, 11))  # fills HBM
    with pool.match(prompt(1, 2, 3), in_hbm=True) as match:
        assert torch.equal(pool.read(match.refs).cpu(), kv_of(keys_of("", prompt(1, 2, 3))))


def test_layer_views_show_the_blocks(pool: BlockPool) -> None:
    refs = pool.alloc_mem(3)
    kv = torch.randn(3, *pool.layout.block_shape)
    pool.write(refs, kv)
    at = torch.from_numpy(pool.hbm_indices(refs))
    views = pool.layer_views()
    assert [tuple(view.shape) for view in views] == [(8, 2, BLOCK, 1, 3)] * 2
    for layer, view in enumerate(views):
        assert torch.equal(view[at].cpu(), kv[:, layer])
        view[at[0]] = float(layer)
    assert torch.equal(pool.read(refs)[0, 1].cpu(), torch.ones(2, BLOCK, 1, 3))


def test_dram_grows_at_run_time(pool: BlockPool) -> None:
    pool.grow_dram(5)
    refs = pool.alloc_mem(11, Medium.DRAM)
    kv = torch.randn(11, *pool.layout.block_shape)
    pool.write(refs, kv)
    assert torch.equal(pool.read(refs).cpu(), kv)
    pool.free_mem(refs)


def test_dram_shrinks_in_whole_segments(pool: BlockPool) -> None:
    assert pool.shrink_dram(1) == 0
    assert pool.shrink_dram(5) == 4
    assert pool.stats().dram.total == 2
    assert pool.shrink_dram(100) == 2
    assert pool.stats().dram.total == 0


def test_shrinking_moves_historical_blocks(pool: BlockPool) -> None:
    keep = pool.alloc_mem(4, Medium.DRAM)
    store(pool, prompt(1, 2), medium=Medium.DRAM)  # in the last segment
    pool.free_mem(keep)
    assert pool.shrink_dram(4) == 4
    assert pool.stats().evictions == 0
    assert cached_blocks(pool, prompt(1, 2)) == 2


def test_shrinking_drops_what_has_no_place(pool: BlockPool) -> None:
    for block in (1, 2, 3):
        store(pool, prompt(block, 10 + block), medium=Medium.DRAM)
    assert pool.shrink_dram(4) == 4
    assert [cached_blocks(pool, prompt(block, 10 + block)) for block in (1, 2, 3)] == [0, 0, 2]


@pytest.mark.parametrize("use", ["active", "pinned"])
def test_shrinking_stops_at_blocks_in_use(pool: BlockPool, use: str) -> None:
    refs = pool.alloc_mem(6, Medium.DRAM)
    pool.free_mem(np.concatenate((refs[:2], refs[4:])))
    match = None
    if use == "pinned":
        pool.insert(prompt(1, 2), refs[2:4])
        match = pool.match(prompt(1, 2))
    assert pool.shrink_dram(6) == 2
    assert pool.stats().dram.total == 4
    if match is not None:
        match.release()


def test_references_survive_neither_shrinking_nor_growing_again(pool: BlockPool) -> None:
    refs = pool.alloc_mem(6, Medium.DRAM)
    pool.free_mem(refs)
    pool.shrink_dram(6)
    pool.grow_dram(6)
    again = pool.alloc_mem(6, Medium.DRAM)
    assert not set(again.tolist()) & set(refs.tolist())
    pool.free_mem(again)


def test_a_pool_may_have_dram_alone() -> None:
    with BlockPool(LAYOUT, 0, 4) as pool:
        store(pool, prompt(1, 2), medium=Medium.DRAM)
        assert cached_blocks(pool, prompt(1, 2)) == 2
        with pytest.raises(OutOfBlocks, match="1 HBM blocks asked, 0 free"):
            pool.alloc_mem(1)
        pool.check_integrity()
