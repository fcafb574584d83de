"""Historical KV: what enters the index, is found in it, and leaves it by request."""

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
    """What an insertion did with the caller's blocks."""

    new: RefArray  # taken by the index
    duplicate: RefArray  # still the caller's
    known: RefArray  # the index's, for the first of the tokens
    rest: RefArray  # the caller's that it took for the others


class PrefixCache:
    """The index, by its rules of ownership. Callers hold the pool's lock."""

    def __init__(self, blocks: Blocks, tiers: Tiers, policy: Eviction) -> None:
        self._blocks = blocks
        self._tiers = tiers
        self._index = tiers.index
        self._policy = policy

    def find(self, namespace: str, data: bytes) -> Path:
        """The longest cached prefix, not pinned."""
        return self._index.walk(namespace, data, self._policy.stamp())

    def bring_in(self, namespace: str, data: bytes) -> Moving[RefArray]:
        """The longest cached prefix, moved to HBM as much as there is room for, and pinned."""
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
                except OutOfBlocks:  # others have taken some meanwhile: there is less room
                    continue
                self.pin(hold.refs)
                return hold.refs
        finally:
            self._tiers.let_go(hold)

    def insert(self, namespace: str, data: bytes, refs: RefArray, prefer_hbm: bool) -> Inserted:
        """Store live `refs` [n] for n blocks of tokens.

        `prefer_hbm`: replace the index's copy in DRAM by the caller's in HBM. Raises
        NotOwned, StaleBlock, ForeignBlock; then nothing has changed.
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
                if not all_mine:  # readers may put DETACHED blocks back
                    blocks.adopt(index[state[known:][where] == DETACHED])
                blocks.cache(index)
            self._index.extend(namespace, path, data, rest, behind, stamp)
        return Inserted(new, duplicate, path.refs, rest)

    def delete(self, namespace: str, data: bytes) -> int:
        """Remove what begins with the whole blocks of `data`, and those of its own blocks that
        nothing else shares, unless pins hold them; returns how many went. Empty: all."""
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
        """One more reader for each block. `in_dram`: False if it is known that none are there."""
        if in_dram:
            parts = list(self._blocks.by_medium(refs))
        else:
            parts = [Part(self._blocks.hbm, ALL, ref_index(refs))]
        for blocks, _, index in parts:
            blocks.pin(index)
        return parts

    def unpin(self, parts: Iterable[Part]) -> None:
        """One reader less."""
        for blocks, _, index in parts:
            self._tiers.wake(blocks, blocks.unpin(index))

    def swap_in(self, refs: RefArray) -> Moving[RefArray]:
        """The same KV in HBM, in the same order. Raises as `MemPool.swap_in`."""
        parts, state = self._blocks.live(refs)
        self._blocks.require_distinct(parts)
        if (state == DETACHED).any():
            name = self._blocks.name(int(refs[(state == DETACHED).argmax()]))
            raise NotOwned(f"{name} has left the index and belongs to its readers")
        cached = state == CACHED
        moved = refs.copy()
        hold = self._tiers.holds.open(refs[cached])  # making room must not evict them
        try:
            moved[~cached] = yield from self._tiers.to_hbm(hold, refs[~cached])
            moved[cached] = hold.refs
        finally:
            self._tiers.let_go(hold)
        return moved

    def _own(self, namespace: str, data: bytes) -> list[Node]:
        """The node at and below which is all that only prompts beginning with `data` need."""
        path = self._index.walk(namespace, data, self._policy.stamp())
        if not path.nodes:
            return []
        last = path.nodes[-1]
        if len(path.refs) == len(data) // self._index.block_bytes:
            return [last]
        # Where the tokens part from what is stored, what is stored goes on without them.
        shared = last.children or path.matched < len(last.refs)
        return [] if shared else [last]

    def _require_own_place(
        self, refs: RefArray, state: NDArray[np.uint8], present: RefArray
    ) -> None:
        """Blocks of the index are only good where the index has them."""
        bad = state == CACHED
        bad[: len(present)] &= refs[: len(present)] != present
        if bad.any():
            at = int(bad.argmax())
            name = self._blocks.name(int(refs[at]))
            raise NotOwned(f"{name} (position {at}) is cached for other tokens than these")

    def _upgrade(self, present: RefArray, mine: RefArray, where: NDArray[np.bool_]) -> None:
        """The index takes the caller's ACTIVE blocks `mine` instead of its own `present`."""
        for blocks, _, index in self._blocks.by_medium(mine[where]):
            blocks.cache(index)
        self._tiers.replace(present[where], mine[where])
        present[where] = mine[where]
