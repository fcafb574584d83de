"""The book-keeping of blocks, apart from the pool that owns it."""

from __future__ import annotations

from memserve import Medium
from memserve.pool.allocator import BlockAllocator


def test_a_block_freed_behind_withheld_ones_is_free_once() -> None:
    """A copy out of the last segment fails while another call frees one of its blocks."""
    blocks = BlockAllocator(1, Medium.DRAM)
    blocks.grow(8)
    taken = blocks.take(2)
    behind = int(taken[-1])
    blocks.withhold(behind)
    blocks.free_active(taken[-1:])
    blocks.restore(behind)
    assert blocks.free == 7
    assert sorted([*blocks.take(7), taken[0]]) == list(range(8))
