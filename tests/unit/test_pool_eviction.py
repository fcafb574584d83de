"""What goes first, and that finding it never scans the tree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import pytest

from memserve import KVLayout, Medium
from memserve.errors import StaleBlock
from memserve.pool.eviction import CostAware, LeastRecentlyUsed
from memserve.pool.pool import BlockPool
from tests.pool_harness import BLOCK, LAYOUT, TickingClock, cached_blocks, prompt, store


@pytest.fixture
def small() -> Iterator[BlockPool]:
    """Six blocks of HBM and nothing to swap to."""
    with BlockPool(LAYOUT, 6, 0, clock=TickingClock()) as pool:
        yield pool
        pool.check_integrity()


def test_the_longest_unused_goes_first(small: BlockPool) -> None:
    for block in (1, 2, 3):
        store(small, prompt(block, 10 + block))
    cached_blocks(small, prompt(1, 11))  # used again
    small.alloc_mem(2)
    assert cached_blocks(small, prompt(2, 12)) == 0
    assert cached_blocks(small, prompt(3, 13)) == 2
    assert cached_blocks(small, prompt(1, 11)) == 2


def test_prompts_go_from_their_end(small: BlockPool) -> None:
    store(small, prompt(1, 2, 3, 4, 5, 6))
    small.alloc_mem(2)
    assert cached_blocks(small, prompt(1, 2, 3, 4, 5, 6)) == 4


def test_shared_prefixes_outlive_what_hangs_on_them(small: BlockPool) -> None:
    store(small, prompt(1, 2, 3))
    store(small, prompt(1, 2, 4))
    small.alloc_mem(4)  # two are free
    assert cached_blocks(small, prompt(1, 2, 3)) == 2
    assert cached_blocks(small, prompt(1, 2, 4)) == 2


def test_no_more_goes_than_is_needed(small: BlockPool) -> None:
    store(small, prompt(1, 2, 3))
    store(small, prompt(4, 5, 6))
    small.alloc_mem(1)
    assert small.stats().evictions == 1


def test_a_pinned_prompt_is_evictable_again_after_its_release(small: BlockPool) -> None:
    store(small, prompt(1, 2, 3))
    store(small, prompt(4, 5, 6))
    match = small.match(prompt(1, 2, 3))
    refs = small.alloc_mem(3)  # finds the pinned one first
    assert cached_blocks(small, prompt(4, 5, 6)) == 0
    small.free_mem(refs)
    match.release()
    small.alloc_mem(6)
    assert small.stats().hbm.cached == 0


def test_splitting_keeps_recency() -> None:
    with BlockPool(LAYOUT, 8, 3, clock=TickingClock()) as pool:
        nine = store(pool, prompt(9))
        prefix = store(pool, prompt(1, 2, 3))[:2]
        with pool.match(prompt(9)):
            store(pool, prompt(1, 2, 4))
            pool.alloc_mem(5)  # 3 and 4 go to DRAM
        pool.alloc_mem(1)
        with pytest.raises(StaleBlock):
            pool.read(nine)
        pool.read(prefix)


def test_merging_keeps_the_later_use() -> None:
    with BlockPool(LAYOUT, 8, 0, clock=TickingClock()) as pool:
        store(pool, prompt(1, 2, 3))
        store(pool, prompt(1, 2, 4))
        store(pool, prompt(9))
        cached_blocks(pool, prompt(1, 2))
        pool.delete(prompt(1, 2, 4))
        pool.alloc_mem(5)
        assert cached_blocks(pool, prompt(9)) == 0
        assert cached_blocks(pool, prompt(1, 2, 3)) == 3


def test_hbm_pressure_moves_to_dram_before_it_drops() -> None:
    with BlockPool(LAYOUT, 4, 4, clock=TickingClock()) as pool:
        store(pool, prompt(1, 2, 3, 4))
        pool.alloc_mem(4)
        assert pool.stats().dram.cached == 4
        assert pool.stats().evictions == 0
        assert cached_blocks(pool, prompt(1, 2, 3, 4)) == 4


def test_dram_pressure_drops_the_coldest() -> None:
    with BlockPool(LAYOUT, 4, 4, clock=TickingClock()) as pool:
        for block in (1, 2, 3):
            store(pool, prompt(block, 10 + block))
        pool.alloc_mem(2)  # 1 to DRAM was the first; 2 joins it
        store_room = pool.stats().dram
        assert (store_room.free, store_room.cached) == (0, 4)
        pool.alloc_mem(2)
        assert cached_blocks(pool, prompt(1, 11)) == 0
        assert cached_blocks(pool, prompt(2, 12)) == 2
        assert cached_blocks(pool, prompt(3, 13)) == 2
        pool.check_integrity()


def test_what_dram_cannot_hold_is_dropped_coldest_first() -> None:
    with BlockPool(LAYOUT, 6, 2, clock=TickingClock()) as pool:
        for block in (1, 2, 3):
            store(pool, prompt(block, 10 + block))
        pool.alloc_mem(4)
        assert cached_blocks(pool, prompt(1, 11)) == 0
        assert cached_blocks(pool, prompt(2, 12)) == 2
        assert pool.stats().dram.cached == 2
        assert pool.stats().swapped_out == 2  # nothing was moved to be dropped then
        pool.check_integrity()


def test_dropping_dram_leaves_spares_hbm() -> None:
    """A DRAM block that HBM blocks continue is not dropped to make room for a swap."""
    with BlockPool(LAYOUT, 3, 1, clock=TickingClock()) as pool:
        store(pool, prompt(1), medium=Medium.DRAM)
        with pool.match(prompt(1)) as match:
            rest = pool.alloc_mem(3)
            pool.insert(prompt(1, 2, 3, 4), np.concatenate((match.refs, rest)))
        pool.alloc_mem(1)
        assert pool.stats().evictions == 1
        assert pool.match(prompt(1, 2, 3, 4)).tokens == 3 * BLOCK
        pool.check_integrity()


def test_dram_blocks_below_hbm_ones_can_be_had_at_last() -> None:
    with BlockPool(LAYOUT, 3, 1) as pool:
        store(pool, prompt(1), medium=Medium.DRAM)
        with pool.match(prompt(1)) as match:
            rest = pool.alloc_mem(2)
            pool.insert(prompt(1, 2, 3), np.concatenate((match.refs, rest)))
        assert len(pool.alloc_mem(1, Medium.DRAM)) == 1
        assert pool.stats().hbm.free == 3  # unreachable without the first block
        pool.check_integrity()


def test_the_cost_policy_keeps_what_is_expensive() -> None:
    with BlockPool(LAYOUT, 5, 0, eviction=CostAware(lambda depth: float(depth))) as pool:
        store(pool, prompt(1, 2, 3))  # its last block ends at depth 3
        store(pool, prompt(4))
        store(pool, prompt(5))
        cached_blocks(pool, prompt(4))
        cached_blocks(pool, prompt(5))
        pool.alloc_mem(2)
        assert cached_blocks(pool, prompt(1, 2, 3)) == 3
        assert cached_blocks(pool, prompt(4)) == 0


def test_the_cost_policy_forgets_what_is_never_used() -> None:
    with BlockPool(LAYOUT, 5, 0, eviction=CostAware(lambda depth: float(depth))) as pool:
        store(pool, prompt(1, 2, 3))
        for block in range(10, 40):
            store(pool, prompt(block))
        assert cached_blocks(pool, prompt(1, 2, 3)) < 3


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="'fifo'"):
        BlockPool(LAYOUT, 1, eviction="fifo")  # type: ignore[arg-type]


def test_what_waits_for_a_reader_goes_once_the_reader_holds_a_copy() -> None:
    with BlockPool(LAYOUT, 3, 5, clock=TickingClock()) as pool:
        store(pool, prompt(1, 2), medium=Medium.DRAM)
        store(pool, prompt(1, 3), medium=Medium.DRAM)
        spare = pool.alloc_mem(2, Medium.DRAM)  # no room to swap to
        readers = [pool.match(prompt(1, 2)), pool.match(prompt(1, 3))]
        pool.swap_in(readers[0].refs[:1])  # block 1: unpinned now, above pinned ones
        assert pool.evictable() == 0
        store(pool, prompt(4))
        held = pool.alloc_mem(2)  # passes over block 1, which waits now, and drops block 4
        assert cached_blocks(pool, prompt(4)) == 0
        pool.free_mem(np.concatenate((held, spare)))
        pool.swap_in(readers[1].refs[1:])
        pool.alloc_mem(2)  # block 3 goes to DRAM again: the reader has a copy of its own
        readers[0].release()
        assert pool.evictable() == 1
        assert len(pool.alloc_mem(1)) == 1
        readers[1].release()
        pool.check_integrity()


def test_the_queues_forget_what_is_gone() -> None:
    with BlockPool(LAYOUT, 4, 0) as pool:
        for block in range(1000):
            store(pool, prompt(block))
            pool.delete([])
        assert sum(len(queue._heap) for queue in pool._tiers.queues) < 100


class CountingLru(LeastRecentlyUsed):
    """Counts how often the order of two candidates could have been looked at."""

    def __init__(self) -> None:
        super().__init__(TickingClock())
        self.looks = 0

    def priority(self, stamp: float, depth: int) -> float:
        self.looks += 1
        return super().priority(stamp, depth)


def looks_per_eviction(prompts: int, blocked: Literal["none", "pinned", "used"]) -> float:
    policy = CountingLru()
    layout = KVLayout(1, 1, 1, "int8", BLOCK)
    with BlockPool(layout, prompts, 0, eviction=policy) as pool:
        rng = np.random.default_rng(0)
        stored = [rng.integers(0, 2**31 - 1, BLOCK, dtype=np.int32) for _ in range(prompts)]
        for tokens in stored:
            pool.insert(tokens, pool.alloc_mem(1))
        readers = [pool.match(tokens) for tokens in stored[:-20] if blocked != "none"]
        if blocked == "used":
            for reader in readers:
                reader.release()
        pool.alloc_mem(1)  # puts the used ones into their new places, the pinned ones aside
        policy.looks = 0
        for _ in range(10):
            pool.alloc_mem(1)
        return policy.looks / 10


@pytest.mark.parametrize("blocked", ["none", "pinned", "used"])
def test_eviction_never_scans(blocked: Literal["none", "pinned", "used"]) -> None:
    assert looks_per_eviction(2000, blocked) < looks_per_eviction(100, blocked) + 5
