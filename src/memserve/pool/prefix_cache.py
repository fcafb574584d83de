"""The prefix cache: find, insert, delete and swap in cached KV."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memserve.errors import NotOwned, OutOfBlocks
from memserve.pool.allocator import ACTIVE, CACHED, DETACHED
from memserve.pool.blocks import ALL, Blocks, Part, are_all
from memserve.pool.eviction import Eviction
from memserve.pool.index import Node, Path
from memserve.pool.moves import Moving
from memserve.pool.tiers import Tiers
from memserve.types import Medium, RefArray, ref_index, ref_medium

_NONE: RefArray = np.empty(0, dtype=np.int64)


class Inserted(NamedTuple):
    """Result of `PrefixCache.insert`."""

    new: RefArray  # the caller's blocks that the index owns now
    duplicate: RefArray  # blocks that are still the caller's
    known: RefArray  # the index's blocks for the prefix that was cached already
    rest: RefArray  # the caller's blocks for the tokens behind that prefix


class PrefixCache:
    """Applies the rules of block ownership to the index. Callers hold the pool's lock."""

    def __init__(self, blocks: Blocks, tiers: Tiers, policy: Eviction) -> None:
        self._blocks = blocks
        self._tiers = tiers
        self._index = tiers.index
        self._policy = policy

    def find(self, namespace: str, data: bytes) -> Path:
        """Return the longest cached prefix, not pinned."""
        return self._index.walk(namespace, data, self._policy.stamp())

    def bring_in(self, namespace: str, data: bytes) -> Moving[RefArray]:
        """Move the longest cached prefix to HBM; return its blocks, pinned.

        The prefix is cut where HBM has no more room.
        """
        hold = self._tiers.holds.open(self.find(namespace, data).refs, prefix=True)
        try:
            while True:
                room = self._blocks.hbm.free + self._tiers.evictable(Medium.HBM)
                moves = np.cumsum(ref_medium(hold.refs))
                fits = hold.refs[: int(np.searchsorted(moves, room, side="right"))]
                if len(fits) < len(hold.refs):
                    longer, hold = hold, self._tiers.holds.open(fits, prefix=True)
                    self._tiers.let_go(longer)
                try:
                    yield from self._tiers.to_hbm(hold, _NONE)
                except OutOfBlocks:  # other threads took blocks during a copy: less room now
                    continue
                self.pin(hold.refs)
                return hold.refs
        finally:
            self._tiers.let_go(hold)

    def insert(self, namespace: str, data: bytes, refs: RefArray, prefer_hbm: bool) -> Inserted:
        """Store blocks `refs` [n] for n blocks of tokens.

        `prefer_hbm`: replace the index's DRAM block by the caller's HBM block for the same
        prefix. Raises NotOwned, StaleBlock, ForeignBlock, before any change.
        """
        parts, state = self._blocks.live(refs)
        self._blocks.require_distinct(parts)
        stamp = self._policy.stamp()
        path = self._index.walk(namespace, data, stamp)
        known = len(path.refs)
        head, rest = refs[:known], refs[known:]
        all_mine = are_all(state, ACTIVE)
        duplicate, new = head.copy(), rest.copy()
        if not all_mine:
            self._require_own_place(refs, state, path.refs)
            duplicate = head[state[:known] == ACTIVE]
        if prefer_hbm and path.in_dram:
            mine = state[:known] == ACTIVE
            better = mine & (ref_medium(path.refs) > ref_medium(head))
            duplicate = head[mine & ~better]
            new = np.concatenate((head[better], rest))
            self._upgrade(path.refs, head, better)
        if len(rest):
            if len(parts) == 1:
                behind = [Part(parts[0].blocks, ALL, parts[0].indices[known:])]
            else:
                behind = list(self._blocks.by_medium(rest))
            for blocks, where, index in behind:
                if not all_mine:  # a match may insert its DETACHED blocks again
                    blocks.adopt(index[state[known:][where] == DETACHED])
                blocks.cache(index)
            self._index.extend(namespace, path, data, rest, behind, stamp)
        return Inserted(new, duplicate, path.refs, rest)

    def delete(self, namespace: str, data: bytes) -> int:
        """Free the unpinned blocks that only prompts beginning with `data` need; return their
        number. `data`: tokens of whole blocks; empty: all blocks of the namespace."""
        root = self._index.roots.get(namespace)
        if root is None:
            return 0
        tops = self._own(namespace, data) if data else list(root.children.values())
        count = 0
        for top in tops:
            gone = self._index.prune(top)
            self._tiers.discard(gone)
            count += len(gone)
        return count

    def pin(self, refs: RefArray, in_dram: bool = True) -> list[Part]:
        """Add one pin to each block. `in_dram`: False promises that no block is in DRAM."""
        if in_dram:
            parts = list(self._blocks.by_medium(refs))
        else:
            parts = [Part(self._blocks.hbm, ALL, ref_index(refs))]
        for blocks, _, index in parts:
            blocks.pin(index)
        return parts

    def unpin(self, parts: Iterable[Part]) -> None:
        """Remove one pin from each block."""
        for blocks, _, index in parts:
            self._tiers.wake(blocks, blocks.unpin(index))

    def swap_in(self, refs: RefArray) -> Moving[RefArray]:
        """Move DRAM blocks to HBM; return HBM references [n]. Raises as `MemPool.swap_in`."""
        parts, state = self._blocks.live(refs)
        self._blocks.require_distinct(parts)
        if (state == DETACHED).any():
            name = self._blocks.name(int(refs[(state == DETACHED).argmax()]))
            raise NotOwned(f"{name} has left the index and belongs to its readers")
        cached = state == CACHED
        moved = refs.copy()
        hold = self._tiers.holds.open(refs[cached])  # so that `make_room` does not evict them
        try:
            moved[~cached] = yield from self._tiers.to_hbm(hold, refs[~cached])
            moved[cached] = hold.refs
        finally:
            self._tiers.let_go(hold)
        return moved

    def _own(self, namespace: str, data: bytes) -> list[Node]:
        """Return [node] whose subtree holds the blocks that only prompts beginning with `data`
        need, or [] if there are none."""
        path = self._index.walk(namespace, data, self._policy.stamp())
        if not path.nodes:
            return []
        last = path.nodes[-1]
        if len(path.refs) == len(data) // self._index.block_bytes:
            return [last]
        # `data` is not stored as a whole. If the stored tokens go on behind the common prefix,
        # another prompt needs that prefix.
        shared = last.children or path.matched < len(last.refs)
        return [] if shared else [last]

    def _require_own_place(
        self, refs: RefArray, state: NDArray[np.uint8], present: RefArray
    ) -> None:
        """Raise NotOwned if a CACHED block is given for other tokens than the index has it for."""
        bad = state == CACHED
        bad[: len(present)] &= refs[: len(present)] != present
        if bad.any():
            at = int(bad.argmax())
            name = self._blocks.name(int(refs[at]))
            raise NotOwned(f"{name} (position {at}) is cached for other tokens than these")

    def _upgrade(self, present: RefArray, mine: RefArray, where: NDArray[np.bool_]) -> None:
        """Replace the index's blocks `present` by the caller's ACTIVE blocks `mine`, at `where`."""
        for blocks, _, index in self._blocks.by_medium(mine[where]):
            blocks.cache(index)
        self._tiers.replace(present[where], mine[where])
        present[where] = mine[where]
