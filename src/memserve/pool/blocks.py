"""The blocks of one pool, both media: references into indices, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from memserve.errors import DoubleFree, ForeignBlock, NotOwned, PinnedBlock, PoolError, StaleBlock
from memserve.pool.allocator import (
    ACTIVE,
    FREE,
    RETIRED,
    STATE_NAMES,
    BlockAllocator,
)
from memserve.types import (
    GENERATION_BITS,
    INDEX_BITS,
    MAX_OWNERS,
    IndexArray,
    Medium,
    Owner,
    RefArray,
    intern_owner,
    owner_of,
    ref_generation,
    ref_index,
    ref_medium,
    ref_owner,
)

_HEAD_SHIFT = GENERATION_BITS + INDEX_BITS
_ALL = slice(None)


class Part(NamedTuple):
    """The references of one medium within an array of references."""

    blocks: BlockAllocator
    where: slice | NDArray[np.bool_]  # which of the array
    indices: IndexArray


class Blocks:
    """One allocator per medium."""

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        number = intern_owner(owner.instance, owner.epoch)
        self.hbm = BlockAllocator(number, Medium.HBM)
        self.dram = BlockAllocator(number, Medium.DRAM)
        self.media = (self.hbm, self.dram)

    def __getitem__(self, medium: Medium) -> BlockAllocator:
        return self.media[medium]

    def parts(self, refs: RefArray) -> list[Part]:
        """Own references by medium. Raises ForeignBlock."""
        if not len(refs):
            return []
        head = refs >> _HEAD_SHIFT
        found = []
        left = len(refs)
        for blocks in self.media:
            where = head == blocks.head
            count = int(np.count_nonzero(where))
            if count == len(refs):
                return [Part(blocks, _ALL, ref_index(refs))]
            if count:
                found.append(Part(blocks, where, ref_index(refs[where])))
            left -= count
        if left:
            self._refuse_foreign(refs)
        return found

    def live(self, refs: RefArray) -> tuple[list[Part], NDArray[np.uint8]]:
        """Own references by medium, and each block's state [n].

        Raises ForeignBlock, and StaleBlock for references to blocks that were freed.
        """
        parts = self.parts(refs)
        state = np.empty(len(refs), dtype=np.uint8)
        for blocks, where, index in parts:
            given = ref_generation(refs[where])
            present = self._generations(blocks, index)
            states = blocks.state[index]
            if not (given == present).all() or not states.all() or (states == RETIRED).any():
                bad = (given != present) | (states == FREE) | (states == RETIRED)
                at = int(bad.argmax())
                raise StaleBlock(
                    f"{_name(blocks, index[at], given[at])} was freed: the block is in "
                    f"generation {present[at]} now, and {STATE_NAMES[states[at]]}"
                )
            state[where] = states
        return parts, state

    def freeable(self, refs: RefArray) -> list[Part]:
        """Own references by medium, all to distinct ACTIVE blocks.

        Raises ForeignBlock, DoubleFree, StaleBlock, PinnedBlock, NotOwned.
        """
        parts = self.parts(refs)
        for blocks, where, index in parts:
            given = ref_generation(refs[where])
            good = (given == self._generations(blocks, index)) & (blocks.state[index] == ACTIVE)
            if not good.all():
                at = int(good.argmin())
                self._refuse_free(blocks, int(index[at]), int(given[at]))
            if not blocks.distinct(index):
                at = _first_repetition(index)
                name = _name(blocks, index[at], given[at])
                raise DoubleFree(f"{name} is named twice in one call of {len(refs)} blocks")
        return parts

    def by_medium(self, refs: RefArray) -> Iterator[Part]:
        """As `parts`, for references that are known to be the pool's own."""
        medium = ref_medium(refs)
        in_dram = int(np.count_nonzero(medium))
        if in_dram == 0 or in_dram == len(refs):
            if len(refs):
                yield Part(self.dram if in_dram else self.hbm, _ALL, ref_index(refs))
            return
        for blocks in self.media:
            where = medium == blocks.medium
            yield Part(blocks, where, ref_index(refs[where]))

    def pins(self, refs: RefArray) -> NDArray[np.int32]:
        """Readers of each block [n]; the pool's own references."""
        pins = np.empty(len(refs), dtype=np.int32)
        for blocks, where, index in self.by_medium(refs):
            pins[where] = blocks.pins[index]
        return pins

    def require_distinct(self, parts: list[Part]) -> None:
        """Raises NotOwned where one block is named twice."""
        for blocks, _, index in parts:
            if not blocks.distinct(index):
                at = _first_repetition(index)
                name = _name(blocks, index[at], blocks.generation[index[at]])
                raise NotOwned(f"{name} is named twice in one call")

    def name(self, ref: int) -> str:
        """One own reference, for an error message."""
        one = np.array([ref], dtype=np.int64)
        blocks = self.media[int(ref_medium(one)[0])]
        return _name(blocks, int(ref_index(one)[0]), int(ref_generation(one)[0]))

    def _generations(self, blocks: BlockAllocator, index: IndexArray) -> IndexArray:
        try:
            return blocks.generation[index]
        except IndexError:
            raise ForeignBlock(
                f"there is no {blocks.medium.name} block {int(index.max())} "
                f"in {self.owner.instance!r}, which has {blocks.capacity}"
            ) from None

    def _refuse_free(self, blocks: BlockAllocator, index: int, given: int) -> NoReturn:
        present, state = int(blocks.generation[index]), int(blocks.state[index])
        name = _name(blocks, index, given)
        error: PoolError
        if state == FREE and present <= given + 1:
            error = DoubleFree(f"{name} is free already")
        elif given != present or state in (FREE, RETIRED):
            error = StaleBlock(
                f"{name} was freed: the block is in generation {present} now, "
                f"and {STATE_NAMES[state]}"
            )
        elif blocks.pins[index]:
            error = PinnedBlock(f"{name} is {STATE_NAMES[state]} and has {blocks.pins[index]} pins")
        else:
            error = NotOwned(f"{name} is cached and belongs to the index; delete() removes it")
        raise error

    def _refuse_foreign(self, refs: RefArray) -> NoReturn:
        heads = [blocks.head for blocks in self.media]
        at = int(np.isin(refs >> _HEAD_SHIFT, heads).argmin())
        one = refs[at : at + 1]
        number = int(ref_owner(one)[0])
        own = self.owner
        if one[0] < 0 or number >= MAX_OWNERS:
            raise ForeignBlock(f"{int(one[0])} at position {at} is no block reference")
        try:
            other = owner_of(number)
        except IndexError:
            raise ForeignBlock(f"{int(one[0])} at position {at} is no block reference") from None
        raise ForeignBlock(
            f"reference {at} is to block {int(ref_index(one)[0])} of {other.instance!r} "
            f"(epoch {other.epoch}), this is {own.instance!r} (epoch {own.epoch})"
        )


def as_refs(refs: ArrayLike) -> RefArray:
    """`refs` as a one-dimensional int64 array. Raises ForeignBlock if they are none."""
    array = np.asarray(refs)
    if array.size == 0:
        return np.empty(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype != np.int64:
        raise ForeignBlock(
            f"block references are a flat int64 array, not {array.dtype} of shape {array.shape}"
        )
    return array


def _name(blocks: BlockAllocator, index: int, generation: int) -> str:
    return f"{blocks.medium.name} block {index} of generation {generation}"


def _first_repetition(index: IndexArray) -> int:
    """Position of the first block that occurred before."""
    _, first = np.unique(index, return_index=True)
    again = np.ones(len(index), dtype=np.bool_)
    again[first] = False
    return int(again.argmax())
