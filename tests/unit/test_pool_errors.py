"""Every refusal names the numbers and leaves the pool as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from memserve import Medium
from memserve.errors import (
    DoubleFree,
    ForeignBlock,
    InvalidTokens,
    LayoutMismatch,
    LengthMismatch,
    NotOwned,
    OutOfBlocks,
    PinnedBlock,
    PoolError,
    StaleBlock,
    WrongMedium,
)
from memserve.pool.pool import BlockPool
from memserve.pool.results import PoolStats
from memserve.pool.storage import BlockStore
from memserve.types import MAX_GENERATION
from tests.pool_harness import BLOCK, LAYOUT, cached_blocks, keys_of, kv_of, prompt, store


@pytest.fixture
def pool() -> Iterator[BlockPool]:
    with BlockPool(LAYOUT, 8, 4, instance="p0") as pool:
        yield pool
        pool.check_integrity()


def refuse(
    pool: BlockPool, error: type[PoolError], message: str, call: Callable[[], object]
) -> None:
    before: PoolStats = pool.stats()
    with pytest.raises(error, match=message):
        call()
    assert pool.stats() == before
    pool.check_integrity()


def test_out_of_blocks_says_what_there_was(pool: BlockPool) -> None:
    store(pool, prompt(1, 2))
    active = pool.alloc_mem(3)
    refuse(
        pool,
        OutOfBlocks,
        "6 HBM blocks asked, 3 free and 2 evictable of 8",
        lambda: pool.alloc_mem(6),
    )
    refuse(
        pool,
        OutOfBlocks,
        "5 DRAM blocks asked, 4 free and 0 evictable of 4",
        lambda: pool.alloc_mem(5, Medium.DRAM),
    )
    assert cached_blocks(pool, prompt(1, 2)) == 2
    pool.free_mem(active)


def test_allocation_does_not_take_what_is_being_read(pool: BlockPool) -> None:
    store(pool, prompt(1, 2, 3))
    with pool.match(prompt(1, 2)):
        refuse(pool, OutOfBlocks, "5 free and 1 evictable of 8", lambda: pool.alloc_mem(7))
        assert len(pool.alloc_mem(6)) == 6


def test_allocation_elsewhere_needs_a_peer(pool: BlockPool) -> None:
    refuse(pool, ForeignBlock, "'p9'.*'p0'", lambda: pool.alloc_mem(1, instance="p9"))
    assert len(pool.alloc_mem(1, instance="p0")) == 1


def test_counts_are_not_negative(pool: BlockPool) -> None:
    store(pool, prompt(1))
    refuse(pool, LengthMismatch, "-1 blocks", lambda: pool.alloc_mem(-1))
    refuse(pool, LengthMismatch, "-2 blocks", lambda: pool.swap_out(-2))
    refuse(pool, PoolError, "cannot add -3 DRAM", lambda: pool.grow_dram(-3))
    refuse(pool, PoolError, "references can name 16777216", lambda: pool.grow_dram(1 << 24))
    assert pool.shrink_dram(-1) == 0


def test_a_failed_copy_loses_no_block(pool: BlockPool, monkeypatch: pytest.MonkeyPatch) -> None:
    store(pool, prompt(1, 2))

    def fail(*_: object) -> None:
        raise OSError("copy engine error")

    monkeypatch.setattr(BlockStore, "copy_from", fail)
    before = pool.stats()
    with pytest.raises(OSError, match="copy engine"):
        pool.swap_out(2)
    assert pool.stats() == before
    assert cached_blocks(pool, prompt(1, 2)) == 2


def test_a_block_is_freed_once(pool: BlockPool) -> None:
    refs = pool.alloc_mem(3)
    twice = np.concatenate((refs, refs[1:2]))
    refuse(pool, DoubleFree, "HBM block 1 .*twice in one call of 4", lambda: pool.free_mem(twice))
    pool.free_mem(refs)
    refuse(pool, DoubleFree, "HBM block 0 .*free already", lambda: pool.free_mem(refs))


def test_a_stale_reference_is_never_served(pool: BlockPool) -> None:
    old = pool.alloc_mem(1)
    pool.free_mem(old)
    new = pool.alloc_mem(1)
    message = "HBM block 0 of generation 0 was freed: it is active now, generation 1"
    calls: list[Callable[[], object]] = [
        lambda: pool.free_mem(old),
        lambda: pool.read(old),
        lambda: pool.write(old, torch.zeros(1, *LAYOUT.block_shape)),
        lambda: pool.insert(prompt(1), old),
        lambda: pool.swap_in(old),
        lambda: pool.hbm_indices(old),
    ]
    for call in calls:
        refuse(pool, StaleBlock, message, call)
    pool.free_mem(new)


def test_a_freed_reference_cannot_be_read(pool: BlockPool) -> None:
    refs = pool.alloc_mem(2, Medium.DRAM)
    pool.free_mem(refs)
    refuse(pool, StaleBlock, "DRAM block 0 .* is free now", lambda: pool.read(refs))


def test_references_of_others_are_foreign(pool: BlockPool) -> None:
    own = pool.alloc_mem(1)
    with BlockPool(LAYOUT, 4, instance="p7") as other:
        foreign = other.alloc_mem(2)
    mixed = np.concatenate((own, foreign[1:]))
    refuse(pool, ForeignBlock, "reference 1 is to block 1 of 'p7'", lambda: pool.free_mem(mixed))
    refuse(pool, ForeignBlock, "'p7'", lambda: pool.read(foreign))


def test_another_life_of_the_same_instance_is_foreign(pool: BlockPool) -> None:
    with BlockPool(LAYOUT, 4, instance="p0") as earlier:
        refs = earlier.alloc_mem(1)
    refuse(pool, ForeignBlock, f"epoch {earlier.owner.epoch}", lambda: pool.read(refs))


def test_references_to_no_block_are_foreign(pool: BlockPool) -> None:
    own = pool.alloc_mem(1)
    beyond = own + (100 << 24)
    message = "no HBM block 100 in 'p0', which has 8"
    refuse(pool, ForeignBlock, message, lambda: pool.read(beyond))
    negative = own | np.iinfo(np.int64).min
    refuse(pool, ForeignBlock, "no block reference", lambda: pool.read(negative))


def test_references_are_int64(pool: BlockPool) -> None:
    refuse(pool, ForeignBlock, "flat int64 array, not float64", lambda: pool.free_mem([0.5]))


def test_a_block_nobody_allocated_cannot_be_used(pool: BlockPool) -> None:
    guessed = pool.alloc_mem(1) + (1 << 24)
    refuse(pool, StaleBlock, "block 1 .* is free", lambda: pool.read(guessed))
    refuse(pool, DoubleFree, "block 1 .* free already", lambda: pool.free_mem(guessed))


def test_blocks_of_the_index_are_not_the_callers(pool: BlockPool) -> None:
    refs = store(pool, prompt(1, 2))
    kv = kv_of(keys_of("", prompt(1, 2)))
    refuse(pool, NotOwned, "HBM block 0 .*cached", lambda: pool.free_mem(refs))
    refuse(pool, NotOwned, "position 0.*cached KV is immutable", lambda: pool.write(refs, kv))
    with pool.match(prompt(1)):
        refuse(pool, PinnedBlock, "HBM block 0 .*1 pins", lambda: pool.free_mem(refs))


def test_a_cached_block_serves_only_its_own_tokens(pool: BlockPool) -> None:
    refs = store(pool, prompt(1, 2))
    refuse(
        pool,
        NotOwned,
        r"block 1 .*\(position 1\).*other tokens",
        lambda: pool.insert(prompt(1, 3), refs),
    )
    refuse(pool, NotOwned, "position 0", lambda: pool.insert(prompt(2, 1), refs[::-1]))


def test_a_block_has_one_place_in_the_index(pool: BlockPool) -> None:
    refs = pool.alloc_mem(1).repeat(2)
    refuse(pool, NotOwned, "named twice", lambda: pool.insert(prompt(1, 2), refs))


def test_lengths_have_to_fit(pool: BlockPool) -> None:
    refs = pool.alloc_mem(2)
    message = f"2 blocks of {BLOCK} tokens for 7 tokens"
    refuse(pool, LengthMismatch, message, lambda: pool.insert(range(7), refs))
    three = torch.zeros(3, *LAYOUT.block_shape)
    refuse(pool, LengthMismatch, "3 blocks for 2 ref", lambda: pool.write(refs, three))


def test_kv_of_another_shape_or_type_is_refused(pool: BlockPool) -> None:
    refs = pool.alloc_mem(2)
    wide = torch.zeros(2, *LAYOUT.block_shape[:-1], 5)
    half = torch.zeros(2, *LAYOUT.block_shape, dtype=torch.float16)
    refuse(pool, LayoutMismatch, r"2, 2, 4, 1, 5\).*2, 2, 4, 1, 3", lambda: pool.write(refs, wide))
    refuse(pool, LayoutMismatch, "float16.*float32", lambda: pool.write(refs, half))


def test_tokens_have_to_be_int32(pool: BlockPool) -> None:
    refuse(pool, InvalidTokens, "position 0", lambda: pool.match([2**40]))


def test_dram_blocks_have_no_place_in_the_engines_views(pool: BlockPool) -> None:
    refs = np.concatenate((pool.alloc_mem(1), pool.alloc_mem(1, Medium.DRAM)))
    refuse(pool, WrongMedium, "DRAM block 0 .*position 1", lambda: pool.hbm_indices(refs))


def test_a_closed_pool_refuses_work() -> None:
    with BlockPool(LAYOUT, 4, instance="p0") as pool:
        refs = store(pool, prompt(1))
        match = pool.match(prompt(1))
    for call in (lambda: pool.alloc_mem(1), lambda: pool.read(refs), lambda: pool.match([])):
        with pytest.raises(PoolError, match="'p0' is closed"):
            call()
    match.release()


def test_a_block_whose_generations_are_used_up_retires(pool: BlockPool) -> None:
    refs = pool.alloc_mem(8)
    pool.free_mem(refs)
    pool._blocks.hbm.ref[0] |= MAX_GENERATION
    last = pool.alloc_mem(1)
    assert last[0] & MAX_GENERATION == MAX_GENERATION
    pool.free_mem(last)
    assert pool.stats().hbm.total == 7
    assert last[0] not in pool.alloc_mem(7)
    refuse(pool, StaleBlock, "retired", lambda: pool.read(last))
    refuse(pool, StaleBlock, "retired", lambda: pool.free_mem(last))
