"""Copies between HBM and DRAM, without the pool's lock. Protects: nobody waits for one, what others
do meanwhile is not undone, and one that fails leaves nothing behind."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch

from memserve import Medium
from memserve.errors import NotOwned, OutOfBlocks, StaleBlock
from memserve.pool.pool import BlockPool
from memserve.pool.storage import BlockStore
from memserve.types import IndexArray, RefArray, ref_medium
from tests.pool_harness import LAYOUT, cached_blocks, keys_of, kv_of, prompt, store

PATIENCE = 30.0
SHORT, OTHER, LONG = prompt(1, 2, 3), prompt(7, 8, 9), prompt(1, 2, 3, 4, 5)


class Copies:
    """Stands between a pool and the copies that it makes."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.error: Exception | None = None
        self.count = 0
        copy_from = BlockStore.copy_from

        def held_up(
            target: BlockStore, source: BlockStore, source_index: IndexArray, index: IndexArray
        ) -> None:
            self.count += 1
            copy_from(target, source, source_index[::2], index[::2])  # half of it
            self.begun.set()
            assert self.go_on.wait(PATIENCE)
            if self.error is not None:
                raise self.error
            copy_from(target, source, source_index, index)

        patch.setattr(BlockStore, "copy_from", held_up)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Copies:
    return Copies(monkeypatch)


@pytest.fixture
def pool() -> Iterator[BlockPool]:
    with BlockPool(LAYOUT, 8, 8, dram_segment_blocks=4) as pool:
        yield pool
        assert_quiet(pool)


def assert_quiet(pool: BlockPool) -> None:
    pool.check_integrity()
    stats = pool.stats()
    assert stats.matches == 0
    for each in (stats.hbm, stats.dram):
        assert (each.pinned, each.active, each.detached) == (0, 0, 0)


@contextmanager
def while_moving(copies: Copies, move: Callable[[], object]) -> Iterator[Future[object]]:
    """The body runs while the copy of `move` does not end."""
    with ThreadPoolExecutor(1) as thread:
        moving = thread.submit(move)
        try:
            assert copies.begun.wait(PATIENCE)
            yield moving
        finally:
            copies.go_on.set()
        moving.exception(PATIENCE)


def in_dram(pool: BlockPool, tokens: list[int]) -> RefArray:
    return store(pool, tokens, medium=Medium.DRAM)


def media(pool: BlockPool, tokens: list[int]) -> list[int]:
    with pool.match(tokens) as match:
        return ref_medium(match.refs).tolist()


def test_nobody_waits_for_a_swap_in(pool: BlockPool, copies: Copies) -> None:
    refs = in_dram(pool, SHORT)
    store(pool, OTHER)
    with while_moving(copies, lambda: pool.swap_in(refs)) as moving:
        assert cached_blocks(pool, OTHER) == 3
        assert cached_blocks(pool, SHORT) == 3  # from where it still is
        pool.free_mem(pool.alloc_mem(2))
        pool.check_integrity()
        assert not moving.done()
    assert media(pool, SHORT) == [0, 0, 0]
    assert np.array_equal(moving.result(), pool.swap_in(refs_of(pool, SHORT)))
    assert cached_blocks(pool, SHORT) == 3


def refs_of(pool: BlockPool, tokens: list[int]) -> RefArray:
    with pool.match(tokens) as match:
        return match.refs


def test_nobody_waits_for_an_allocation_that_swaps_out(pool: BlockPool, copies: Copies) -> None:
    for tokens in (SHORT, OTHER):
        store(pool, tokens)
    with while_moving(copies, lambda: pool.alloc_mem(5)) as moving:
        assert cached_blocks(pool, OTHER) == 3
        pool.check_integrity()
    refs = moving.result()
    assert isinstance(refs, np.ndarray)
    assert cached_blocks(pool, SHORT) == 3
    pool.free_mem(refs)


def test_what_is_matched_while_it_is_swapped_out_stays(pool: BlockPool, copies: Copies) -> None:
    store(pool, SHORT)
    with while_moving(copies, lambda: pool.swap_out(3)) as moving:
        match = pool.match(SHORT)
    assert moving.result() == 0
    assert ref_medium(match.refs).tolist() == [0, 0, 0]
    assert torch.equal(pool.read(match.refs), kv_of(keys_of("", SHORT)))
    match.release()
    assert pool.swap_out(3) == 3


def test_a_better_copy_that_comes_while_one_is_made_is_kept(
    pool: BlockPool, copies: Copies
) -> None:
    """An insertion gives the index blocks in HBM while others are on their way there."""
    in_dram(pool, SHORT)
    for move in (MOVES["swap in"], MOVES["match"]):
        copies.begun.clear()
        copies.go_on.clear()
        with while_moving(copies, partial(move, pool)) as moving:
            mine = pool.alloc_mem(2)
            pool.write(mine, kv_of(keys_of("", SHORT)[:2]))
            result = pool.insert(SHORT[:8], mine, pin=True)
            assert np.array_equal(result.new, mine)
            assert result.match is not None
            result.match.release()
        moved = moving.result()
        if not isinstance(moved, np.ndarray):
            moved.release()  # type: ignore[attr-defined]
            moved = moved.refs  # type: ignore[attr-defined]
        assert np.array_equal(moved[:2], mine)
        assert np.array_equal(moved, refs_of(pool, SHORT))
        assert ref_medium(moved).tolist() == [0, 0, 0]
        assert cached_blocks(pool, SHORT) == 3
        assert_quiet(pool)
        pool.swap_out(3)


def test_what_leads_to_a_moving_block_is_not_deleted(pool: BlockPool, copies: Copies) -> None:
    refs = in_dram(pool, SHORT)
    with while_moving(copies, lambda: pool.swap_in(refs[2:])):
        assert pool.delete(SHORT) == 0
    assert cached_blocks(pool, SHORT) == 3
    assert pool.delete(SHORT) == 3


def test_allocated_blocks_that_their_owner_frees_meanwhile(pool: BlockPool, copies: Copies) -> None:
    mine = pool.alloc_mem(2, Medium.DRAM)
    with while_moving(copies, lambda: pool.swap_in(mine)) as moving:
        pool.free_mem(mine[:1])
    assert isinstance(moving.exception(), StaleBlock)
    assert pool.stats().dram.active + pool.stats().hbm.active == 0


def test_a_segment_that_is_matched_while_it_is_emptied_stays(
    pool: BlockPool, copies: Copies
) -> None:
    held = pool.alloc_mem(4, Medium.DRAM)
    in_dram(pool, SHORT)  # in the second segment
    pool.free_mem(held)
    with while_moving(copies, lambda: pool.shrink_dram(4)) as moving:
        match = pool.match(SHORT)
    assert moving.result() == 0
    assert torch.equal(pool.read(match.refs), kv_of(keys_of("", SHORT)))
    match.release()
    assert_quiet(pool)
    assert pool.shrink_dram(4) == 4
    assert cached_blocks(pool, SHORT) == 3


def test_closing_a_pool_waits_for_its_copies(copies: Copies) -> None:
    pool = BlockPool(LAYOUT, 8, 8)
    refs = in_dram(pool, SHORT)
    with ThreadPoolExecutor(1) as thread:
        with while_moving(copies, lambda: pool.swap_in(refs)) as moving:
            closing = thread.submit(pool.close)
            assert not closing.done()
        closing.result(PATIENCE)
        assert moving.exception() is None


MOVES: dict[str, Callable[[BlockPool], object]] = {
    "swap in": lambda pool: pool.swap_in(refs_of(pool, SHORT)),
    "swap in, allocated": lambda pool: pool.swap_in(pool.alloc_mem(1, Medium.DRAM)),
    "match": lambda pool: pool.match(SHORT, in_hbm=True),
    "swap out": lambda pool: pool.swap_out(3),
    "allocation": lambda pool: pool.alloc_mem(8),
    "shrinking": lambda pool: pool.shrink_dram(4),
}


@pytest.mark.parametrize("name", MOVES)
def test_a_copy_that_fails_leaves_nothing_behind(
    pool: BlockPool, copies: Copies, name: str
) -> None:
    held = pool.alloc_mem(5, Medium.DRAM)
    in_dram(pool, SHORT)
    pool.free_mem(held)
    store(pool, OTHER)
    before = pool.stats()
    copies.error = RuntimeError("a device was lost")
    copies.go_on.set()
    with pytest.raises(RuntimeError, match="lost"):
        MOVES[name](pool)
    assert copies.count == 1
    pool.check_integrity()
    for medium in ("hbm", "dram"):
        was, now = getattr(before, medium), getattr(pool.stats(), medium)
        assert (now.cached, now.pinned, now.total) == (was.cached, 0, was.total)
    copies.error = None
    for tokens in (SHORT, OTHER):
        assert cached_blocks(pool, tokens) == 3
    for refs in (active(pool, Medium.HBM), active(pool, Medium.DRAM)):
        pool.free_mem(refs)
    with pool.match(SHORT, in_hbm=True) as match:
        assert ref_medium(match.refs).tolist() == [0, 0, 0]


def active(pool: BlockPool, medium: Medium) -> RefArray:
    """What the test has allocated and lost sight of."""
    blocks = pool._blocks[medium]
    return blocks.ref[: blocks.capacity][blocks.state[: blocks.capacity] == 1]


def test_threads_that_move_match_insert_and_evict(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a reader has is what was written, whatever moves at the time."""
    copy_from = BlockStore.copy_from

    def in_steps(
        target: BlockStore, source: BlockStore, source_index: IndexArray, index: IndexArray
    ) -> None:
        for at in range(len(index)):
            copy_from(target, source, source_index[at : at + 1], index[at : at + 1])
            barrier.wait(0)

    class Barrier(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            return super().wait(1e-4)

    barrier = Barrier()
    monkeypatch.setattr(BlockStore, "copy_from", in_steps)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with BlockPool(LAYOUT, 12, 12, dram_segment_blocks=4) as pool, ThreadPoolExecutor(6) as run:
            for work in [
                *(run.submit(_use, pool, seed) for seed in range(3)),
                *(run.submit(_move, pool, seed) for seed in range(3, 5)),
            ]:
                work.result(PATIENCE)
            assert_quiet(pool)
    finally:
        sys.setswitchinterval(interval)


def _some(rng: np.random.Generator) -> list[int]:
    return prompt(*rng.integers(0, 3, rng.integers(1, 5)).tolist())


def _use(pool: BlockPool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(120):
        tokens = _some(rng)
        keys = keys_of("", tokens)
        with pool.match(tokens, in_hbm=bool(rng.integers(2))) as match:
            assert torch.equal(pool.read(match.refs), kv_of(keys[: len(match.refs)]))
            try:
                rest = pool.alloc_mem(len(keys) - len(match.refs))
            except OutOfBlocks:
                continue
            pool.write(rest, kv_of(keys[len(match.refs) :]))
            result = pool.insert(tokens, np.concatenate((match.refs, rest)), pin=True)
            assert result.match is not None
            with result.match as whole:
                assert torch.equal(pool.read(whole.refs), kv_of(keys))
        pool.free_mem(result.duplicate)


def _move(pool: BlockPool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(60):
        tokens = _some(rng)
        pool.swap_out(int(rng.integers(4)))
        with pool.match(tokens) as match:
            try:
                moved = pool.swap_in(match.refs)
            except (OutOfBlocks, NotOwned):  # another mover was faster: they are their readers'
                continue
            assert not ref_medium(moved).any()
        pool.delete(_some(rng))
        pool.shrink_dram(4)
        pool.grow_dram(max(0, min(4, 12 - pool.stats().dram.total)))  # both may grow it


def test_what_comes_in_takes_the_place_of_the_coldest() -> None:
    """Not of what is hotter and in its way: that goes where something colder was."""
    cold, wanted, hot = SHORT, OTHER, prompt(4, 5, 6)
    with BlockPool(LAYOUT, 3, 6) as pool:
        for tokens in (cold, wanted):
            in_dram(pool, tokens)
        store(pool, hot)
        with pool.match(wanted, in_hbm=True) as match:
            assert ref_medium(match.refs).tolist() == [0, 0, 0]
        assert [cached_blocks(pool, tokens) for tokens in (cold, wanted, hot)] == [0, 3, 3]
        assert_quiet(pool)
