"""Book-keeping of one medium's fixed-size blocks: free list, states, generations, pins.

A block is FREE, ACTIVE (its allocator owns it), CACHED (the index owns it), DETACHED (it left
the index while pinned; the last unpin frees it), or RETIRED (its generations are used up).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from memserve.errors import PoolError
from memserve.types import (
    GENERATION_BITS,
    INDEX_BITS,
    MAX_BLOCKS,
    MAX_GENERATION,
    MEDIUM_BITS,
    IndexArray,
    Medium,
    RefArray,
)

FREE, ACTIVE, CACHED, DETACHED, RETIRED = range(5)
STATE_NAMES = ("free", "active", "cached", "detached", "retired")

NO_REF = -1
# Constants as arrays: numpy takes as long to convert a Python int as to add it to 256 elements.
_ONE = np.array(1, dtype=np.int32)
_GENERATION = np.array(MAX_GENERATION)
NOTHING: IndexArray = np.empty(0, dtype=np.int64)


class BlockAllocator:
    """Book-keeping of blocks 0 to capacity - 1; the bytes are in a `BlockStore`.

    Arrays are indexed by block and never shrink: when an index is used again after `shrink`,
    its generation continues. Methods trust their arguments; `Blocks` checks callers' input.
    """

    def __init__(self, owner: int, medium: Medium) -> None:
        self.medium = medium
        self.head = (owner << MEDIUM_BITS) | int(medium)  # the high bits of every reference
        self.capacity = 0
        self.state: NDArray[np.uint8] = np.empty(0, dtype=np.uint8)
        # The current reference to each block; of a FREE block, the one that `take` will give out.
        self.ref: RefArray = NOTHING
        self.pins: NDArray[np.int32] = np.empty(0, dtype=np.int32)
        # ACTIVE blocks that peers may not write to.
        self.private: NDArray[np.bool_] = np.empty(0, dtype=np.bool_)
        self.node: IndexArray = NOTHING  # id of the index node that holds a CACHED block
        self._watched: NDArray[np.bool_] = np.empty(0, dtype=np.bool_)
        self._watches = 0
        self._mark: IndexArray = NOTHING  # scratch for `distinct`
        self._stack: IndexArray = NOTHING  # FREE blocks; `take` pops from the end
        self.free = self.active = self.cached = self.detached = self.retired = 0
        self.pinned = 0  # CACHED blocks with pins

    @property
    def total(self) -> int:
        """Number of usable blocks."""
        return self.capacity - self.retired

    def check_growth(self, blocks: int) -> None:
        """Raise PoolError unless `grow` can add this number of blocks."""
        if not 0 <= blocks <= MAX_BLOCKS - self.capacity:
            raise PoolError(
                f"cannot add {blocks} {self.medium.name} blocks to {self.capacity}: "
                f"references can name {MAX_BLOCKS}"
            )

    def grow(self, blocks: int) -> None:
        """Add blocks at the end: FREE, except indices that are RETIRED already."""
        start, end = self.capacity, self.capacity + blocks
        missing = end - len(self.state)
        if missing > 0:
            self.state = np.append(self.state, np.zeros(missing, dtype=np.uint8))
            first = (self.head << INDEX_BITS | len(self.ref)) << GENERATION_BITS
            fresh = first + (np.arange(missing) << GENERATION_BITS)
            self.ref = np.append(self.ref, fresh)
            self.pins = np.append(self.pins, np.zeros(missing, dtype=np.int32))
            self.private = np.append(self.private, np.zeros(missing, dtype=np.bool_))
            self.node = np.append(self.node, np.zeros(missing, dtype=np.int64))
            self._watched = np.append(self._watched, np.zeros(missing, dtype=np.bool_))
            self._mark = np.append(self._mark, np.zeros(missing, dtype=np.int64))
            self._stack = np.append(self._stack, np.zeros(missing, dtype=np.int64))
        self.capacity = end
        added = np.arange(start, end)
        usable = added[self.state[added] == FREE]
        self.retired += blocks - len(usable)
        self._push(usable)

    def withhold(self, start: int) -> None:
        """Remove the blocks from `start` on from the free list, before `shrink`."""
        stack = self._stack[: self.free]
        below = stack[stack < start]
        self.free = len(below)
        self._stack[: self.free] = below

    def restore(self, start: int) -> None:
        """Undo `withhold`. Blocks that were freed after it are in the free list already."""
        self.withhold(start)
        behind = np.arange(start, self.capacity)
        self._push(behind[self.state[behind] == FREE])

    def shrink(self, start: int) -> None:
        """Remove the blocks from `start` on; all must be withheld or RETIRED."""
        self.retired -= int(np.count_nonzero(self.state[start : self.capacity] == RETIRED))
        self.capacity = start

    def take(self, count: int, private: bool = False) -> IndexArray:
        """Make `count` FREE blocks ACTIVE; return their indices [count].

        The caller checks that `count` blocks are free. Indices ascend if the free list allows it.
        """
        top = self.free - count
        index: IndexArray = self._stack[top : self.free][::-1].copy()
        self.free = top
        self.active += count
        self.state[index] = ACTIVE
        self.private[index] = private
        return index

    def free_active(self, index: IndexArray) -> None:
        self.active -= len(index)
        self._free(index)

    def free_cached(self, index: IndexArray) -> None:
        """Free blocks that left the index and have no pins."""
        self.cached -= len(index)
        self._free(index)

    def cache(self, index: IndexArray) -> None:
        """Make ACTIVE blocks CACHED: the index owns them."""
        self.state[index] = CACHED
        self.active -= len(index)
        self.cached += len(index)

    def adopt(self, index: IndexArray) -> None:
        """Make DETACHED blocks ACTIVE; the caller calls `cache` for them at once."""
        self.state[index] = ACTIVE
        self.detached -= len(index)
        self.active += len(index)
        self.pinned += len(index)

    def detach_or_free(self, index: IndexArray) -> IndexArray:
        """Take CACHED blocks from the index, which holds other blocks in their place: pinned
        ones become DETACHED and are returned, the others FREE."""
        pinned = self.pins[index] > 0
        kept = index[pinned]
        if len(kept):
            self.state[kept] = DETACHED
            self.cached -= len(kept)
            self.pinned -= len(kept)
            self.detached += len(kept)
            self.watch(kept)
            index = index[~pinned]
        self.free_cached(index)
        return kept

    def pin(self, index: IndexArray) -> None:
        """Add one pin to each CACHED or DETACHED block; `index` [n] has no repetition."""
        pins = self.pins[index]
        self.pinned += len(index) - int(np.count_nonzero(pins))
        pins += _ONE
        self.pins[index] = pins

    def unpin(self, index: IndexArray) -> IndexArray:
        """Remove one pin from each block; return the watched blocks without pins.

        DETACHED blocks among those become FREE.
        """
        pins = self.pins[index]
        pins -= _ONE
        self.pins[index] = pins
        self.pinned -= len(index) - int(np.count_nonzero(pins))
        if not self._watches:
            return NOTHING
        woken: IndexArray = index[self._watched[index] & (pins == 0)]
        self._watched[woken] = False
        self._watches -= len(woken)
        detached = woken[self.state[woken] == DETACHED]
        self.pinned += len(detached)  # `pinned` counts CACHED blocks only
        self.detached -= len(detached)
        self._free(detached)
        return woken

    def watch(self, index: IndexArray) -> None:
        """Have `unpin` return these pinned blocks when their last pin goes."""
        fresh = index[~self._watched[index]]
        self._watched[fresh] = True
        self._watches += len(fresh)

    def distinct(self, index: IndexArray) -> bool:
        """Return whether all indices differ, in linear time."""
        count = len(index)
        if 0 not in (index[1:] > index[:-1]).tobytes():
            return True
        order = np.arange(count)
        self._mark[index] = order
        return bool(np.count_nonzero(self._mark[index] == order) == count)

    def free_list(self) -> IndexArray:
        """Return the FREE blocks that are not withheld."""
        return self._stack[: self.free]

    def _free(self, index: IndexArray) -> None:
        if not len(index):
            return
        refs = self.ref[index]
        refs += _ONE
        self.ref[index] = refs
        self.state[index] = FREE
        if np.count_nonzero(refs & _GENERATION) < len(refs):
            # The generation wrapped around: references from its first uses would be valid again.
            spent = (refs & MAX_GENERATION) == 0
            self.ref[index[spent]] = NO_REF
            self.state[index[spent]] = RETIRED
            self.retired += int(np.count_nonzero(spent))
            index = index[~spent]
        self._push(index)

    def _push(self, index: IndexArray) -> None:
        end = self.free + len(index)
        self._stack[self.free : end] = index[::-1]
        self.free = end
