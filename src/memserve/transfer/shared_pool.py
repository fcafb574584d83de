"""`SharedPool`: a `BlockPool` whose blocks peers read and write."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from memserve.errors import DoubleFree, NotOwned
from memserve.pool.allocator import ACTIVE, CACHED
from memserve.pool.blocks import Blocks, as_refs
from memserve.pool.index import Node, RadixIndex
from memserve.pool.pool import BlockPool
from memserve.pool.results import InsertResult, Match
from memserve.transfer.base import LocalRegion
from memserve.transfer.regions import local_regions
from memserve.types import SHARED, Medium, RefArray, ref_index, ref_medium


class SharedPool(BlockPool):
    """A pool that does not reuse, move or publish blocks while a peer writes to them."""

    memory_version = 0  # grows whenever `local_regions` changes
    vouched: float | None = None  # seconds of the clock, of the last `MemPool.vouch`; None: none

    @cached_property
    def _guards(self) -> Guards:
        return Guards()

    # --- for local callers ----------------------------------------------------------------

    def free_mem(self, refs: ArrayLike) -> None:
        """As in `memserve.pool`. Blocks that a peer is writing to become free when the peer
        stops."""
        given = as_refs(refs)
        with self._lock:
            guarded = self._guards.where(given) if len(self._guards) else None
            if guarded is None or not guarded.any():
                super().free_mem(given)
                return
            self._blocks.freeable(given)
            if self._guards.where_freed(given).any():
                raise DoubleFree("a block was freed already, while a peer was writing to it")
            super().free_mem(given[~guarded])
            self._guards.defer(given[guarded])

    def insert(
        self, tokens: ArrayLike, refs: ArrayLike, namespace: str = SHARED, *, pin: bool = False
    ) -> InsertResult:
        """As in `memserve.pool`. Raises NotOwned for blocks that a peer is writing to."""
        with self._lock:
            self._refuse_guarded(refs)
            return super().insert(tokens, refs, namespace, pin=pin)

    def swap_in(self, refs: ArrayLike) -> RefArray:
        """As in `memserve.pool`. Raises NotOwned for blocks that a peer is writing to."""
        with self._mover.turn:
            with self._lock:
                self._refuse_guarded(refs)
            return super().swap_in(refs)

    def grow_dram(self, blocks: int) -> None:
        with self._mover.turn, self._lock:
            super().grow_dram(blocks)
            self.memory_version += 1

    def shrink_dram(self, blocks: int) -> int:
        gone = super().shrink_dram(blocks)
        with self._lock:
            self.memory_version += 1
        return gone

    # --- for peers ------------------------------------------------------------------------

    def local_regions(self) -> tuple[LocalRegion, ...]:
        """Return the pool's current memory. Raises PoolError once the pool is closed."""
        return local_regions(self)

    def require_live(self, refs: RefArray) -> None:
        """Raise StaleBlock unless all of `refs` are current."""
        with self._lock:
            self._blocks.live(refs)

    def require_freeable(self, refs: RefArray) -> None:
        """Raise the error that `free_mem` would raise."""
        with self._lock:
            self._blocks.freeable(refs)

    def still_allocated(self, refs: RefArray) -> RefArray:
        """Return those of `refs` that are neither inserted nor freed since their allocation."""
        with self._lock:
            return refs[still_active(self._blocks, refs) & ~self._guards.where_freed(refs)]

    def guard(self, refs: RefArray, heads: range, granted: RefArray) -> Guard:
        """Reserve allocated blocks for a peer that will write `heads` of them. Raises as `free_mem`
        does; NotOwned if another peer writes these heads, or for private blocks that are not among
        `granted`."""
        with self._lock:
            self._blocks.freeable(refs)
            for blocks, _, index in self._blocks.by_medium(refs[~np.isin(refs, granted)]):
                if blocks.private[index].any():
                    raise NotOwned("some of these blocks are private: peers may not write to them")
            if np.isin(refs, self._tiers.moving).any():
                raise NotOwned("some of these blocks are being moved")
            if self._guards.where_freed(refs).any() or self._guards.contested(refs, heads):
                raise NotOwned("a peer is writing to some of these blocks")
            return self._guards.add(refs, heads)

    def make_public(self, refs: RefArray) -> None:
        """Let peers write to those of `refs` that are still allocated."""
        with self._lock:
            allocated = refs[still_active(self._blocks, refs)]
            for blocks, _, index in self._blocks.by_medium(allocated):
                blocks.private[index] = False

    def unguard(self, guard: Guard) -> None:
        """End a guard, and free the blocks that their owners gave back meanwhile."""
        with self._lock:
            freed = self._guards.remove(guard)
            if len(freed):
                super().free_mem(freed)

    def pin_source(self, source: RefArray) -> Match | None:
        """Pin the cached blocks of `source` while they are sent; return None if none is cached.
        Raises StaleBlock; NotOwned for blocks that a peer is writing to."""
        with self._lock:
            self._require_open()
            _, state = self._blocks.live(source)
            self._refuse_guarded(source)
            if (state == ACTIVE).all():
                return None
            pinned = with_prefixes(self._blocks, self._index, source, state)
            return self._open_match(pinned, in_dram=True)

    @property
    def freed_by_owner(self) -> int:
        """Number of blocks that their owners freed while a peer was writing to them."""
        return self._guards.freed

    def _refuse_guarded(self, refs: ArrayLike) -> None:
        if len(self._guards) and self._guards.where(as_refs(refs)).any():
            raise NotOwned("a peer is writing to some of these blocks")


_NONE: RefArray = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Guard:
    """A peer's claim to write these KV heads of these blocks."""

    refs: RefArray
    heads: range


class Guards:
    """The guards of a pool. A guarded block that its owner frees stays allocated until its last
    guard ends. Several peers may write to one block, each to other heads."""

    def __init__(self) -> None:
        self._held: list[Guard] = []
        self._guarded = _NONE  # blocks of all guards
        self._freed = _NONE  # those of `_guarded` that their owners have freed

    def __len__(self) -> int:
        return len(self._guarded)

    @property
    def freed(self) -> int:
        """Number of guarded blocks that their owners have freed."""
        return len(self._freed)

    def where(self, refs: RefArray) -> NDArray[np.bool_]:
        """Return which of `refs` [n] are guarded."""
        return np.isin(refs, self._guarded)

    def where_freed(self, refs: RefArray) -> NDArray[np.bool_]:
        """Return which of `refs` [n] their owners have freed."""
        return np.isin(refs, self._freed)

    def contested(self, refs: RefArray, heads: range) -> bool:
        """Return whether a guard has some of these heads of some of these blocks."""
        return any(
            max(heads.start, other.heads.start) < min(heads.stop, other.heads.stop)
            and bool(np.isin(refs, other.refs).any())
            for other in self._held
        )

    def add(self, refs: RefArray, heads: range) -> Guard:
        guard = Guard(refs, heads)
        self._held.append(guard)
        self._guarded = np.union1d(self._guarded, refs)
        return guard

    def defer(self, refs: RefArray) -> None:
        """Note that the owner has freed guarded blocks."""
        self._freed = np.concatenate((self._freed, refs))

    def remove(self, guard: Guard) -> RefArray:
        """End a guard; return the freed blocks that no other guard has, for the pool to take
        back."""
        self._held.remove(guard)
        left = [other.refs for other in self._held]
        self._guarded = np.unique(np.concatenate(left)) if left else _NONE
        due = ~np.isin(self._freed, self._guarded)
        freed = self._freed[due]
        self._freed = self._freed[~due]
        return freed


def with_prefixes(
    blocks: Blocks, index: RadixIndex, refs: RefArray, state: NDArray[np.uint8]
) -> RefArray:
    """Return the cached and detached blocks of live `refs` [n], with the cached blocks before them,
    since pins cover whole prefixes; each once. Callers hold the pool's lock."""
    cached = np.unique(refs[state == CACHED])
    detached = np.unique(refs[(state != CACHED) & (state != ACTIVE)])
    needed: dict[Node, int] = {}  # blocks of the node's edge
    homes = {
        home
        for part, _, at in blocks.by_medium(cached)
        for home in np.unique(part.node[at]).tolist()
    }
    for home in homes:
        node: Node | None = index.nodes[home]
        assert node is not None
        last = int(np.flatnonzero(np.isin(node.refs, cached))[-1]) + 1
        needed[node] = max(last, needed.get(node, 0))
        node = node.parent
        while node is not None and needed.get(node) != len(node.refs):
            needed[node] = len(node.refs)
            node = node.parent
    return np.concatenate([*(node.refs[:last] for node, last in needed.items()), detached])


def still_active(blocks: Blocks, refs: RefArray) -> NDArray[np.bool_]:
    """Return which of `refs` [n] are the pool's, and still allocated to their first owner."""
    active = np.zeros(len(refs), dtype=np.bool_)
    for medium in Medium:
        where = np.flatnonzero(ref_medium(refs) == medium)
        at = ref_index(refs[where])
        part = blocks[medium]
        known = at < len(part.ref)
        where, at = where[known], at[known]
        active[where] = (part.ref[at] == refs[where]) & (part.state[at] == ACTIVE)
    return active
