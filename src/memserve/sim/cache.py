"""`SimCache`, a simulated pool: the blocks that an instance holds in HBM and DRAM, with LRU
eviction.

Chains of blocks are released from their end, so that a block is older than its parent and is
evicted first, as in the real index.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

from memserve.sim.prompt import BlockKey


class CacheListener(Protocol):
    """Receives the keys of blocks that leave the cache."""

    def removed(self, key: BlockKey) -> None: ...


class SimCache:
    """Blocks by key. Blocks of running sequences are pinned; capacities are in blocks."""

    def __init__(self, hbm_blocks: int, dram_blocks: int, listener: CacheListener) -> None:
        self._capacity = hbm_blocks
        self._dram_capacity = dram_blocks
        self._listener = listener
        self._pins: dict[BlockKey, int] = {}
        self._idle: OrderedDict[BlockKey, None] = OrderedDict()  # in HBM, unpinned, oldest first
        self._dram: OrderedDict[BlockKey, None] = OrderedDict()  # oldest first
        self._private = 0  # number of blocks in HBM without a key

    @property
    def free(self) -> int:
        """Number of HBM blocks that a sequence could get: unused, or cached and unpinned."""
        return self._capacity - len(self._pins) - self._private

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._pins or key in self._idle or key in self._dram

    def found(self, keys: Sequence[BlockKey]) -> int:
        """Number of leading blocks that are in HBM or DRAM."""
        for count, key in enumerate(keys):
            if key not in self:
                return count
        return len(keys)

    def acquire(self, keys: Sequence[BlockKey], private: int) -> int | None:
        """Pin blocks `keys`, which must be present, and allocate `private` blocks without key.

        Returns the number of blocks swapped in from DRAM; None if HBM has no room.
        """
        idle = sum(key in self._idle for key in keys)
        swapped = sum(key in self._dram for key in keys)
        if self.free < idle + swapped + private:
            return None
        for key in keys:
            self._dram.pop(key, None)
            self._idle.pop(key, None)
            self._pins[key] = self._pins.get(key, 0) + 1
        self._private += private
        self._make_room()
        return swapped

    def publish(self, keys: Sequence[BlockKey]) -> list[int]:
        """Give `keys` to as many private blocks, which stay pinned.

        Returns the positions of the keys that were not present. For the others the private copy
        is dropped.
        """
        new = []
        for position, key in enumerate(keys):
            if key not in self:
                new.append(position)
            self._idle.pop(key, None)
            self._dram.pop(key, None)
            self._pins[key] = self._pins.get(key, 0) + 1
        self._private -= len(keys)
        return new

    def release(self, keys: Sequence[BlockKey], private: int) -> None:
        """Unpin blocks `keys`, which stay cached, and free `private` blocks."""
        self._private -= private
        for key in reversed(keys):
            self._pins[key] -= 1
            if not self._pins[key]:
                del self._pins[key]
                self._idle[key] = None

    def put(self, keys: Sequence[BlockKey]) -> list[int]:
        """Store leading blocks that another instance sent, as far as HBM has room, unpinned.
        Returns the positions of the keys that were not present."""
        held = self.found(keys)
        room = held + max(0, self.free - sum(key in self._idle for key in keys[:held]))
        taken = keys[:room]
        if self.acquire(taken[:held], len(taken) - held) is None:
            return []
        new = [held + position for position in self.publish(taken[held:])]
        self.release(taken, 0)
        return new

    def drop(self, keys: Sequence[BlockKey]) -> None:
        """Drop those of the blocks that are not pinned."""
        for key in reversed(keys):
            if key in self._idle:
                del self._idle[key]
                self._listener.removed(key)
            elif key in self._dram:
                del self._dram[key]
                self._listener.removed(key)

    def _make_room(self) -> None:
        while len(self._idle) > self.free:
            key, _ = self._idle.popitem(last=False)
            if self._dram_capacity:
                self._dram[key] = None
            else:
                self._listener.removed(key)
        while len(self._dram) > self._dram_capacity:
            key, _ = self._dram.popitem(last=False)
            self._listener.removed(key)
