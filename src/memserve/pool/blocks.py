"""The blocks of one pool in both media: references are checked and become block indices."""

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
    MAX_GENERATION,
    MAX_OWNERS,
    IndexArray,
    Medium,
    Owner,
    RefArray,
    intern_owner,
    owner_of,
    ref_index,
    ref_medium,
    ref_owner,
    unpack_ref,
)

_HEAD_SHIFT = GENERATION_BITS + INDEX_BITS
ALL = slice(None)
_REF_DTYPE = np.dtype(np.int64)


class Part(NamedTuple):
    """The references of one medium within an array of references [n]."""

    blocks: BlockAllocator
    where: slice | NDArray[np.bool_]  # their positions in the array
    indices: IndexArray  # their block indices


class Blocks:
    """The allocators of a pool, one per medium, and the checks of callers' references."""

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        number = intern_owner(owner.instance, owner.epoch)
        self.hbm = BlockAllocator(number, Medium.HBM)
        self.dram = BlockAllocator(number, Medium.DRAM)
        self.media = (self.hbm, self.dram)

    def __getitem__(self, medium: Medium) -> BlockAllocator:
        return self.media[medium]

    def parts(self, refs: RefArray) -> list[Part]:
        """Return the parts of `refs` by medium. Raises ForeignBlock."""
        if not len(refs):
            return []
        head = refs >> _HEAD_SHIFT
        found = []
        left = len(refs)
        for blocks in self.media:
            where = head == blocks.head
            count = int(np.count_nonzero(where))
            if count:
                everywhere = count == len(refs)
                index = ref_index(refs if everywhere else refs[where])
                self._require_known(blocks, int(index.max()))
                found.append(Part(blocks, ALL if everywhere else where, index))
            left -= count
        if left:
            self._refuse_foreign(refs)
        return found

    def live(self, refs: RefArray) -> tuple[list[Part], NDArray[np.uint8]]:
        """Return the parts of `refs` [n] by medium, and each block's state [n].

        Raises ForeignBlock; StaleBlock for references to blocks that were freed.
        """
        part = self._all_in(self.hbm, refs)
        if part is not None:
            states = self.hbm.state[part.indices]
            if FREE not in states.tobytes():
                return [part], states
        parts = self.parts(refs)
        state = np.empty(len(refs), dtype=np.uint8)
        for blocks, where, index in parts:
            given = refs[where]
            states = blocks.state[index]
            good = (given == blocks.ref[index]) & (states != FREE)
            if not good.all():
                at = int(good.argmin())
                raise StaleBlock(self._freed(blocks, int(index[at]), int(given[at])))
            state[where] = states
        return parts, state

    def freeable(self, refs: RefArray) -> list[Part]:
        """Return the parts of `refs` by medium if all name distinct ACTIVE blocks.

        Otherwise raises ForeignBlock, DoubleFree, StaleBlock, PinnedBlock or NotOwned.
        """
        part = self._all_in(self.hbm, refs)
        if part is not None:
            states = self.hbm.state[part.indices]
            if are_all(states, ACTIVE) and self.hbm.distinct(part.indices):
                return [part]
        parts = self.parts(refs)
        for blocks, where, index in parts:
            given = refs[where]
            good = (given == blocks.ref[index]) & (blocks.state[index] == ACTIVE)
            if not good.all():
                at = int(good.argmin())
                self._refuse_free(blocks, int(index[at]), int(given[at]))
            if not blocks.distinct(index):
                name = self.name(int(given[_first_repetition(index)]))
                raise DoubleFree(f"{name} is named twice in one call of {len(refs)} blocks")
        return parts

    def _all_in(self, blocks: BlockAllocator, refs: RefArray) -> Part | None:
        """Return a Part if every reference is current and in `blocks`, else None."""
        if not blocks.capacity:
            return None
        index = ref_index(refs)
        present = blocks.ref.take(index, mode="clip")
        if present.tobytes() != refs.tobytes():  # takes a third of an array comparison's time
            return None
        return Part(blocks, ALL, index)

    def by_medium(self, refs: RefArray) -> Iterator[Part]:
        """Yield the parts of `refs` by medium, unchecked: for the pool's own references."""
        medium = ref_medium(refs)
        in_dram = np.count_nonzero(medium)
        if in_dram == 0 or in_dram == len(refs):
            if len(refs):
                yield Part(self.dram if in_dram else self.hbm, ALL, ref_index(refs))
            return
        for blocks in self.media:
            where = medium == blocks.medium
            yield Part(blocks, where, ref_index(refs[where]))

    def pins(self, refs: RefArray) -> NDArray[np.int32]:
        """Return the pin count of each block [n], unchecked: for the pool's own references."""
        pins = np.empty(len(refs), dtype=np.int32)
        for blocks, where, index in self.by_medium(refs):
            pins[where] = blocks.pins[index]
        return pins

    def require_distinct(self, parts: list[Part]) -> None:
        """Raise NotOwned if a block is named twice."""
        for blocks, _, index in parts:
            if not blocks.distinct(index):
                name = self.name(int(blocks.ref[index[_first_repetition(index)]]))
                raise NotOwned(f"{name} is named twice in one call")

    def name(self, ref: int) -> str:
        """Return the text of one reference for an error message."""
        block = unpack_ref(ref)
        return f"{block.medium.name} block {block.index} of generation {block.generation}"

    def _freed(self, blocks: BlockAllocator, index: int, given: int) -> str:
        now = f"generation {int(blocks.ref[index]) & MAX_GENERATION}"
        return f"{self.name(given)} was freed: it is {STATE_NAMES[blocks.state[index]]} now, {now}"

    def _require_known(self, blocks: BlockAllocator, index: int) -> None:
        if index >= len(blocks.ref):
            raise ForeignBlock(
                f"there is no {blocks.medium.name} block {index} in {self.owner.instance!r}, "
                f"which has {blocks.capacity}"
            )

    def _refuse_free(self, blocks: BlockAllocator, index: int, given: int) -> NoReturn:
        state, ahead = int(blocks.state[index]), int(blocks.ref[index]) - given
        name = self.name(given)
        error: PoolError
        if state == FREE and ahead <= 1:
            error = DoubleFree(f"{name} is free already")
        elif state == RETIRED or ahead:
            error = StaleBlock(self._freed(blocks, index, given))
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


def are_all(states: NDArray[np.uint8], state: int) -> bool:
    """Return whether all states equal `state`; takes a fifth of an array comparison's time."""
    return states.tobytes() == bytes((state,)) * len(states)


def as_refs(refs: ArrayLike) -> RefArray:
    """Return `refs` as a one-dimensional int64 array. Raises ForeignBlock for other types."""
    if isinstance(refs, np.ndarray) and refs.dtype == _REF_DTYPE and refs.ndim == 1:
        return refs
    array = np.asarray(refs)
    if array.size == 0:
        return np.empty(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype != np.int64:
        raise ForeignBlock(
            f"block references are a flat int64 array, not {array.dtype} of shape {array.shape}"
        )
    return array


def _first_repetition(index: IndexArray) -> int:
    """Return the position of the first index that repeats an earlier one."""
    _, first = np.unique(index, return_index=True)
    again = np.ones(len(index), dtype=np.bool_)
    again[first] = False
    return int(again.argmax())
