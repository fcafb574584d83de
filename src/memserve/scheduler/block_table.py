"""Block tables: the node and depth in the trees of each block that an instance's events name.

A table maps block names to small numbers. Two kinds: `References` for memserve's instances, whose
names are packed references with a dense index, and `Hashes` for other engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from memserve.types import (
    GENERATION_BITS,
    INDEX_BITS,
    MAX_BLOCKS,
    IndexArray,
    Medium,
)

BlockHash = int | bytes
Numbers = NDArray[np.int32]
_Number = TypeVar("_Number", np.uint8, np.int32, np.int64)

_NOWHERE = 0  # no node has this id
_FIRST_SIZE = 1024
_MEDIA = 7  # media with a bit of their own in `Hashes`
_DEVICE = ("GPU", None)  # events that name no medium are of the device's memory
_MAX_REFERENCE = (1 << (GENERATION_BITS + INDEX_BITS + 1)) - 1  # one bit for the medium


class BlockTable:
    """Node and depth of each stored block of one instance, by block number."""

    def __init__(self) -> None:
        self.node: IndexArray = np.zeros(_FIRST_SIZE, dtype=np.int64)  # ids; 0: not stored
        self._depth: Numbers = np.zeros(_FIRST_SIZE, dtype=np.int32)  # blocks from the root
        self.stored = 0
        self.uses_host = False  # True once a block was outside the device's memory

    def place(self, numbers: Numbers, node: int, start: int) -> None:
        """Record blocks that were not stored: they are in `node` at depth `start`, `start + 1`,
        ..."""
        self.node[numbers] = node
        self._depth[numbers] = np.arange(start, start + len(numbers))
        self.stored += len(numbers)

    def vacate(self, numbers: Numbers) -> None:
        """Record that the instance no longer has these stored blocks."""
        self.node[numbers] = _NOWHERE
        self.stored -= len(numbers)

    def depth(self, numbers: Numbers) -> Numbers:
        return self._depth[numbers]

    def homes(self) -> list[int]:
        """Return the ids of the nodes with blocks of this instance, ascending."""
        homes: list[int] = np.unique(self.node[self.node != _NOWHERE]).tolist()
        return homes

    @property
    def num_bytes(self) -> int:
        return self.node.nbytes + self._depth.nbytes

    def _grow(self, size: int) -> None:
        if size > len(self.node):
            size = max(size, 2 * len(self.node))
            self.node = _longer(self.node, size)
            self._depth = _longer(self._depth, size)


class References(BlockTable):
    """Table for names that are packed references without owner: medium, index, generation. A
    block's number follows from index and medium."""

    def __init__(self) -> None:
        super().__init__()
        self._hash: IndexArray = np.zeros(_FIRST_SIZE, dtype=np.int64)

    def number(self, hashes: Sequence[BlockHash], medium: str | None) -> Numbers:
        """Return numbers for blocks that are about to be stored.

        Raises ValueError for names that are no references, and for two generations of one block.
        """
        given = _references(hashes)
        numbers = _slots(given)
        if len(numbers):
            self._grow(int(numbers.max()) + 1)
            self.uses_host = self.uses_host or bool((numbers & 1).any())
        before = self._hash[numbers]
        self._hash[numbers] = given
        if (self._hash[numbers] != given).any():  # two names have one number: the last was kept
            self._hash[numbers] = before
            raise ValueError("two references to one block")
        return numbers

    def known(self, hash: BlockHash) -> int | None:
        """Return the number of a stored block; None if it is not stored."""
        found = self.forget((hash,), None)
        return int(found[0]) if len(found) else None

    def forget(self, hashes: Sequence[BlockHash], medium: str | None) -> Numbers:
        """Return the numbers of the stored ones. `medium` is unused: references contain it."""
        given = _references(hashes)
        numbers = _slots(given)
        inside = numbers < len(self.node)
        given, numbers = given[inside], numbers[inside]
        present: Numbers = numbers[
            (self._hash[numbers] == given) & (self.node[numbers] != _NOWHERE)
        ]
        return present

    def media(self, numbers: Numbers) -> dict[str, int]:
        """Number of stored blocks by the medium that has them; one with copies counts in each."""
        counts = np.bincount(numbers & 1, minlength=len(Medium)).tolist()
        return {each.name: counts[each] for each in Medium if counts[each]}

    def in_host(self, numbers: Numbers) -> int:
        """Return the number of blocks that are not in the device's memory."""
        return int((numbers & 1).sum())

    @property
    def num_bytes(self) -> int:
        return super().num_bytes + self._hash.nbytes

    def _grow(self, size: int) -> None:
        super()._grow(size)
        self._hash = _longer(self._hash, len(self.node))


class Hashes(BlockTable):
    """Table for names of any kind. One name may have copies in several media."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers: dict[BlockHash, int] = {}
        self._names: list[BlockHash] = []
        self._free: list[int] = []
        self._media: dict[str | None, int] = {}  # bit mask by medium
        self._device = np.uint8(0)  # bits of the media in _DEVICE
        self._copies: NDArray[np.uint8] = np.zeros(_FIRST_SIZE, dtype=np.uint8)  # media, by number

    def number(self, hashes: Sequence[BlockHash], medium: str | None) -> Numbers:
        """Return numbers for blocks that are about to be stored; add `medium` to their media."""
        numbers = np.array([self._number(name) for name in hashes], dtype=np.int32)
        self._copies[numbers] |= self._bit(medium)
        return numbers

    def known(self, hash: BlockHash) -> int | None:
        """Return the number of a name; None if the block is not stored."""
        return self._numbers.get(hash)

    def forget(self, hashes: Sequence[BlockHash], medium: str | None) -> Numbers:
        """Remove `medium` from the blocks' media. Returns the distinct numbers of stored blocks
        that are in no medium now."""
        known = [number for name in hashes if (number := self._numbers.get(name)) is not None]
        numbers = distinct(np.array(known, dtype=np.int32))
        self._copies[numbers] &= ~np.uint8(self._bit(medium))
        gone: Numbers = numbers[(self._copies[numbers] == 0) & (self.node[numbers] != _NOWHERE)]
        return gone

    def media(self, numbers: Numbers) -> dict[str, int]:
        """Number of stored blocks by the medium that has them; one with copies counts in each."""
        copies = self._copies[numbers]
        found = {
            name or "unknown": int(np.count_nonzero(copies & bit))
            for name, bit in self._media.items()
        }
        return {name: count for name, count in found.items() if count}

    def in_host(self, numbers: Numbers) -> int:
        """Return the number of blocks without a copy in the device's memory."""
        return int(((self._copies[numbers] & self._device) == 0).sum())

    def vacate(self, numbers: Numbers) -> None:
        super().vacate(numbers)
        self._copies[numbers] = 0
        for number in numbers.tolist():
            del self._numbers[self._names[number]]
            self._names[number] = 0
            self._free.append(number)

    @property
    def num_bytes(self) -> int:
        entry = 170  # bytes of dictionary entry, list entry, key and number
        return super().num_bytes + self._copies.nbytes + entry * len(self._numbers)

    def _number(self, name: BlockHash) -> int:
        number = self._numbers.get(name)
        if number is None:
            if self._free:
                number = self._free.pop()
                self._names[number] = name
            else:
                number = len(self._names)
                self._names.append(name)
                self._grow(number + 1)
            self._numbers[name] = number
        return number

    def _bit(self, medium: str | None) -> int:
        # Seven media have a bit each; engines use three. Further media share the last bit.
        bit = self._media.get(medium)
        if bit is None and len(self._media) < _MEDIA:
            bit = self._media[medium] = 1 << len(self._media)
            if medium in _DEVICE:
                self._device |= np.uint8(bit)
        self.uses_host = self.uses_host or medium not in _DEVICE
        return 1 << _MEDIA if bit is None else bit

    def _grow(self, size: int) -> None:
        super()._grow(size)
        self._copies = _longer(self._copies, len(self.node))


def _longer(numbers: NDArray[_Number], size: int) -> NDArray[_Number]:
    """Return `numbers` extended by zeros to `size`. Large block numbers are cheap: the kernel backs
    zeroed memory with pages when it is written."""
    if len(numbers) >= size:
        return numbers
    longer = np.zeros(size, dtype=numbers.dtype)
    longer[: len(numbers)] = numbers
    return longer


def distinct(numbers: NDArray[_Number]) -> NDArray[_Number]:
    """Return the distinct numbers, ascending. Most events name one block: no sort is needed."""
    return numbers if len(numbers) < 2 else np.unique(numbers)


def _references(hashes: Sequence[BlockHash]) -> IndexArray:
    given = np.array(hashes)
    if not len(given):
        return np.empty(0, dtype=np.int64)
    if given.dtype != np.int64 or int(given.min()) < 0 or int(given.max()) > _MAX_REFERENCE:
        raise ValueError(f"block names are not references of an instance: {hashes[0]!r}, ...")
    return given


def _slots(references: IndexArray) -> Numbers:
    index = (references >> GENERATION_BITS) & (MAX_BLOCKS - 1)
    medium = references >> (GENERATION_BITS + INDEX_BITS)
    return (2 * index + medium).astype(np.int32)
