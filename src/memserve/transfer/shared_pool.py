"""A pool whose blocks peers read and write: what its local callers must not do meanwhile."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from memserve.errors import DoubleFree, NotOwned
from memserve.pool import pool as local
from memserve.pool.allocator import ACTIVE
from memserve.pool.blocks import as_refs
from memserve.pool.results import InsertResult, Match
from memserve.transfer.base import LocalRegion
from memserve.transfer.guards import Guard, Guards
from memserve.transfer.pins import still_active, with_prefixes
from memserve.transfer.regions import local_regions
from memserve.types import SHARED, RefArray


class SharedPool(local.MemPool):
    """Keeps blocks that a peer writes to from being reused, moved or published."""

    memory_version = 0  # grows whenever `local_regions` changes

    @cached_property
    def _guards(self) -> Guards:
        return Guards()

    # --- for local callers ----------------------------------------------------------------

    def free_mem(self, refs: ArrayLike) -> None:
        """As in `memserve.pool`. Blocks that a peer is still writing to are free once it has
        stopped."""
        given = as_refs(refs)
        with self._lock:
            guarded = self._guards.where(given) if len(self._guards) else None
            if guarded is None or not guarded.any():
                super().free_mem(given)
                return
            self._blocks.freeable(given)
            if self._guards.where_freed(given).any():
                raise DoubleFree("a block is free already, as soon as a peer stops writing to it")
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
        return local_regions(self)

    def require_live(self, refs: RefArray) -> None:
        with self._lock:
            self._blocks.live(refs)

    def require_freeable(self, refs: RefArray) -> None:
        with self._lock:
            self._blocks.freeable(refs)

    def still_allocated(self, refs: RefArray) -> RefArray:
        with self._lock:
            return refs[still_active(self._blocks, refs) & ~self._guards.where_freed(refs)]

    def guard(self, refs: RefArray, heads: range, granted: RefArray) -> Guard:
        with self._lock:
            self._blocks.freeable(refs)
            for blocks, _, index in self._blocks.by_medium(refs[~np.isin(refs, granted)]):
                if blocks.private[index].any():
                    raise NotOwned("some of these blocks are not for peers to write to")
            if np.isin(refs, self._tiers.moving).any():
                raise NotOwned("some of these blocks are being moved")
            if self._guards.where_freed(refs).any() or self._guards.contested(refs, heads):
                raise NotOwned("a peer is writing to some of these blocks")
            return self._guards.add(refs, heads)

    def make_public(self, refs: RefArray) -> None:
        with self._lock:
            allocated = refs[still_active(self._blocks, refs)]
            for blocks, _, index in self._blocks.by_medium(allocated):
                blocks.private[index] = False

    def unguard(self, guard: Guard) -> None:
        with self._lock:
            freed = self._guards.remove(guard)
            if len(freed):
                super().free_mem(freed)

    def pin_source(self, source: RefArray) -> Match | None:
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
        """Blocks that their owners gave back while a peer was writing to them."""
        return self._guards.freed

    def _refuse_guarded(self, refs: ArrayLike) -> None:
        if len(self._guards) and self._guards.where(as_refs(refs)).any():
            raise NotOwned("a peer is writing to some of these blocks")
