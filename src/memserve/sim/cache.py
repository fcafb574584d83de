"""A simulated pool: which blocks an instance holds, in two tiers, least recently used first out.

Chains of blocks are released from their end, so that ends are older than what they hang on and
go first, as in the real index.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

from memserve.sim.prompt import BlockKey


class CacheListener(Protocol):
    """Hears of blocks that can, or can no longer, be reused."""

    def removed(self, key: BlockKey) -> None: ...


class SimCache:
    """Blocks by key. Those of running sequences are pinned; capacities are in blocks."""

    def __init__(self, hbm_blocks: int, dram_blocks: int, listener: CacheListener) -> None:
        self._capacity = hbm_blocks
        self._dram_capacity = dram_blocks
        self._listener = listener
        self._pins: dict[BlockKey, int] = {}
        self._idle: OrderedDict[BlockKey, None] = OrderedDict()  # in HBM, oldest first
        self._dram: OrderedDict[BlockKey, None] = OrderedDict()
        self._private = 0  # blocks in HBM that have no key (yet)

    @property
    def free(self) -> int:
        """Blocks of HBM that a sequence could have, those of the history included."""
        return self._capacity - len(self._pins) - self._private

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._pins or key in self._idle or key in self._dram

    def found(self, keys: Sequence[BlockKey]) -> int:
        """How many leading blocks are here."""
        for count, key in enumerate(keys):
            if key not in self:
                return count
        return len(keys)

    def acquire(self, keys: Sequence[BlockKey], private: int) -> int | None:
        """Pin leading blocks, which must be here, and take `private` new ones.

        Returns how many of the pinned ones had to come from DRAM; None if HBM has no room.
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
        """Give as many private blocks these keys; the owner's pins stay on them.

        Returns the positions of those that nobody had: the others were here meanwhile, and the
        private copy is given up.
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
        """Unpin blocks, which stay for others, and give private ones back."""
        self._private -= private
        for key in reversed(keys):
            self._pins[key] -= 1
            if not self._pins[key]:
                del self._pins[key]
                self._idle[key] = None

    def put(self, keys: Sequence[BlockKey]) -> list[int]:
        """Take blocks that somebody sent, as far as there is room for them; positions as of
        `publish`. They are nobody's at once."""
        held = self.found(keys)
        room = held + max(0, self.free - sum(key in self._idle for key in keys[:held]))
        taken = keys[:room]
        if self.acquire(taken[:held], len(taken) - held) is None:
            return []
        new = [held + position for position in self.publish(taken[held:])]
        self.release(taken, 0)
        return new

    def drop(self, keys: Sequence[BlockKey]) -> None:
        """Forget idle blocks."""
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
