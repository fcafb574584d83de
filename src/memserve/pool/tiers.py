"""Moves cached blocks between HBM and DRAM, and drops them."""

from __future__ import annotations

import numpy as np

from memserve.errors import IntegrityError, OutOfBlocks, StaleBlock
from memserve.pool.allocator import ACTIVE, CACHED, DETACHED, BlockAllocator
from memserve.pool.blocks import Blocks
from memserve.pool.eviction import Eviction, EvictionQueue, Kind
from memserve.pool.index import Node, RadixIndex
from memserve.pool.moves import Copy, Hold, Holds, Moving
from memserve.pool.storage import BlockStore
from memserve.types import IndexArray, Medium, RefArray, ref_index, ref_medium

_NO_REFS: RefArray = np.empty(0, dtype=np.int64)


class Tiers:
    """Makes room in both media by moving and dropping the index's blocks.

    Callers hold the pool's lock. The pool's `Mover` runs methods that return a `Moving`, and
    releases the lock for each copy.

    A cached block is evictable if neither it nor a block behind it is pinned. Pins of matches
    cover whole prefixes, so every unpinned block is evictable, with two exceptions.
    For each DETACHED block, the block that replaced it in the index may be unpinned and have
    pinned blocks behind it. And a hold may be on any blocks; while such a hold is open
    (`Holds.scattered`), the evictable blocks are counted one by one.
    """

    def __init__(
        self,
        blocks: Blocks,
        stores: tuple[BlockStore, BlockStore],
        block_tokens: int,
        policy: Eviction,
    ) -> None:
        self._blocks = blocks
        self._stores = stores
        self.queues = tuple(EvictionQueue(kind, policy, block_tokens) for kind in Kind)
        self.index = RadixIndex(blocks, block_tokens, self._offer)
        self.holds = Holds(blocks)
        self.moving: RefArray = _NO_REFS  # active DRAM blocks that are being copied to HBM
        self._copies = 0  # copies made so far
        self.evictions = 0  # cached blocks dropped
        self.swapped_out = 0
        self.swapped_in = 0

    def evictable(self, medium: Medium) -> int:
        """Return the number of evictable blocks of the medium.

        Constant time unless there are detached blocks or scattered holds.
        """
        unpinned, uncertain = self._unpinned(medium)
        if not unpinned or not (uncertain or self.holds.scattered):
            return unpinned
        count = 0
        for root in self.index.roots.values():
            held = self.index.held(root)
            for node in root.subtree():
                free = node.refs[held[node.id] :]
                count += int(np.count_nonzero(ref_medium(free) == medium))
        return count

    def drop_for(self, medium: Medium, count: int) -> bool:
        """Make room without a copy; return whether `count` blocks are free.

        Only for HBM without a DRAM tier; returns False where `make_room` is needed.
        """
        blocks = self._blocks[medium]
        unpinned, uncertain = self._unpinned(medium)
        short = count - blocks.free
        if medium is not Medium.HBM or self._blocks.dram.total or self.holds.scattered:
            return False
        if short > unpinned - uncertain:
            return False
        self.drop(Kind.HBM, short)
        return count <= blocks.free

    def make_room(self, medium: Medium, count: int) -> Moving[None]:
        """Evict until at least `count` blocks are free.

        Raises OutOfBlocks, before any eviction unless other threads took blocks during a copy.
        """
        blocks = self._blocks[medium]
        while (short := count - blocks.free) > 0:
            unpinned, uncertain = self._unpinned(medium)
            sure = 0 if self.holds.scattered else unpinned - uncertain
            if short > sure and short > (evictable := self.evictable(medium)):
                raise OutOfBlocks(medium.name, count, blocks.free, evictable, blocks.total)
            before = self.evictions + self.swapped_out + self._copies
            if medium is Medium.HBM:
                yield from self._free_hbm(short)
            elif not self.drop(Kind.DRAM_LEAF, short):
                self.drop(Kind.DRAM_COVERED, short)
            if before == self.evictions + self.swapped_out + self._copies:
                raise IntegrityError(
                    f"no candidate for {short} {medium.name} blocks that count as evictable"
                )

    def allocate(self, medium: Medium, count: int, private: bool) -> Moving[RefArray]:
        """Return references to `count` ACTIVE blocks, after making room. Raises OutOfBlocks."""
        blocks = self._blocks[medium]
        yield from self.make_room(medium, count)
        return blocks.ref[blocks.take(count, private)]

    def swap_out(self, count: int) -> Moving[int]:
        """Move up to `count` unpinned blocks from HBM to DRAM; return the number moved.

        If DRAM is full, the coldest DRAM leaves are dropped first. Blocks that were matched
        during their copy stay in HBM.
        """
        hbm, dram = self._blocks.media
        if count > dram.free:
            self.drop(Kind.DRAM_LEAF, count - dram.free)
        left = count
        queue = self.queues[Kind.HBM]
        moved = 0
        while (left := min(left, dram.free)) and (victim := self._victim(queue, left)) is not None:
            node, positions = victim
            queue.charge(node)
            old = node.refs[positions]
            hold = self.holds.open(old)
            try:
                target = yield from self._copied(Medium.HBM, ref_index(old), Medium.DRAM)
            finally:
                self.let_go(hold)
            idle = hbm.pins[ref_index(old)] == 0
            dram.free_active(target[~idle])
            dram.cache(target[idle])
            self.replace(old[idle], dram.ref[target[idle]])
            moved += int(np.count_nonzero(idle))
            self.swapped_out += int(np.count_nonzero(idle))
            left -= len(old)
        return moved

    def to_hbm(self, hold: Hold, active: RefArray) -> Moving[RefArray]:
        """Move the DRAM blocks of `hold` and of `active` [n] to HBM; return `active` [n] in HBM.

        `hold` follows to the HBM blocks. Raises OutOfBlocks, before any move; StaleBlock if
        blocks of `active` were freed during the copy.
        """
        held = hold.refs[ref_medium(hold.refs) == Medium.DRAM]
        mine = active[ref_medium(active) == Medium.DRAM]
        old = np.concatenate((held, mine))
        if not len(old):
            return active
        yield from self.make_room(Medium.HBM, len(old))
        hbm, dram = self._blocks.media
        source = ref_index(old)
        self.moving = mine
        try:
            target = yield from self._copied(Medium.DRAM, source, Medium.HBM)
        finally:
            self.moving = _NO_REFS
        state = dram.state[source]
        there = dram.ref[source] == old
        cached = there & (state == CACHED)
        cached[len(held) :] = False
        own = there & (state == ACTIVE)
        own[: len(held)] = False
        # The other held blocks were replaced in the index during the copy; the hold followed.
        hbm.free_active(target[~(cached | own)])
        hbm.cache(target[cached])
        self.replace(old[cached], hbm.ref[target[cached]])
        hbm.private[target[own]] = dram.private[source[own]]
        dram.free_active(source[own])
        self.swapped_in += int(np.count_nonzero(cached | own))
        if int(np.count_nonzero(own)) < len(mine):
            hbm.free_active(target[own])
            raise StaleBlock("allocated blocks were freed while they were moved")
        moved = active.copy()
        moved[ref_medium(active) == Medium.DRAM] = hbm.ref[target[own]]
        return moved

    def replace(self, old: RefArray, new: RefArray) -> None:
        """Replace blocks `old` [n] in the index by CACHED blocks `new` [n].

        Matches keep `old`; holds that follow take `new`. Unpinned blocks of `old` become FREE.
        """
        if not len(old):
            return
        self.index.repoint_refs(old, new)
        for part, index in self.holds.follow(old, new) if len(self.holds) else ():
            self.wake(part.blocks, index)
        for blocks, _, index in self._blocks.by_medium(old):
            self.wake(blocks, blocks.detach_or_free(index))

    def let_go(self, hold: Hold) -> None:
        for part, index in self.holds.close(hold):
            self.wake(part.blocks, index)

    def drop(self, kind: Kind, count: int) -> int:
        """Drop cached blocks until `count` more blocks of the kind's medium are free or no
        candidate is left; return how many more are free."""
        queue = self.queues[kind]
        blocks = self._blocks[queue.medium]
        before = blocks.free
        while (left := count - (blocks.free - before)) > 0:
            victim = self._victim(queue, left)
            if victim is None:
                break
            node, positions = victim
            keep = int(positions[0])
            pinned = self._pinned_from(node, keep)
            if pinned is not None:
                self._park(queue, node, pinned)
                continue
            queue.charge(node)
            gone = self.index.cut(node, keep)
            self.discard(gone)
            self.evictions += len(gone)
        return blocks.free - before

    def discard(self, refs: RefArray) -> None:
        """Free unpinned blocks that were cut from the index."""
        for blocks, _, index in self._blocks.by_medium(refs):
            blocks.free_cached(index)

    def shrink_dram(self, count: int) -> Moving[int]:
        """Release whole segments of at most `count` blocks in all; return the blocks released."""
        store, gone = self._stores[Medium.DRAM], 0
        while store.extents:
            last = store.extents[-1]
            if gone + last.blocks > count or not (yield from self._vacate_dram(last.start)):
                break
            self._blocks.dram.shrink(last.start)
            store.shrink()
            gone += last.blocks
        return gone

    def _vacate_dram(self, start: int) -> Moving[bool]:
        """Move cached blocks away from the DRAM blocks from `start` on, and withhold those.

        Returns False, with nothing withheld, if some are active, pinned or detached, or if the
        rest of DRAM has no room for the cached ones.
        """
        dram = self._blocks.dram
        behind = np.arange(start, dram.capacity)
        if self._is_used(behind):
            return False
        dram.withhold(start)
        cached = behind[dram.state[behind] == CACHED]
        if len(cached) > dram.free + self.evictable(Medium.DRAM):
            dram.restore(start)
            return False
        while len(cached) > dram.free:
            # `make_room` also counts blocks that become free behind `start`.
            yield from self.make_room(Medium.DRAM, len(cached))
            dram.withhold(start)
            cached = cached[dram.state[cached] == CACHED]
        hold = self.holds.open(dram.ref[cached])
        old = hold.refs.copy()
        try:
            target = yield from self._copied(Medium.DRAM, cached, Medium.DRAM)
        except BaseException:
            dram.restore(start)
            raise
        finally:
            self.let_go(hold)
        same = (dram.ref[cached] == old) & (dram.state[cached] == CACHED)
        dram.free_active(target[~same])
        dram.cache(target[same])
        self.replace(old[same], dram.ref[target[same]])
        dram.withhold(start)
        if self._is_used(behind):  # blocks were matched during the copy
            dram.restore(start)
            return False
        return True

    def _is_used(self, index: IndexArray) -> bool:
        """Return whether any of these DRAM blocks is ACTIVE, DETACHED or pinned."""
        dram = self._blocks.dram
        state = dram.state[index]
        return bool(((state == ACTIVE) | (state == DETACHED) | (dram.pins[index] > 0)).any())

    def wake(self, blocks: BlockAllocator, index: IndexArray) -> None:
        """Queue the nodes that are parked until these blocks have no pins or leave the index."""
        for block in index.tolist():
            for queue in self.queues:
                queue.released((blocks.medium, block))

    def _free_hbm(self, short: int) -> Moving[None]:
        """Take one step towards `short` more free HBM blocks: a drop or a swap out."""
        unpinned, uncertain = self._unpinned(Medium.DRAM)
        room = self._blocks.dram.free + max(0, unpinned - uncertain)
        # DRAM has no room for all of them: drop the coldest.
        if short > room and self.drop(Kind.HBM, short - room):
            return
        copies = self._copies
        if not (yield from self.swap_out(short)) and copies == self._copies:
            self.drop(Kind.HBM, short)

    def _unpinned(self, medium: Medium) -> tuple[int, int]:
        """Return the number of unpinned cached blocks, and the most of them that may have pinned
        blocks behind them: the number of detached blocks."""
        blocks = self._blocks[medium]
        unpinned = blocks.cached - blocks.pinned
        return unpinned, sum(each.detached for each in self._blocks.media)

    def _victim(self, queue: EvictionQueue, limit: int) -> tuple[Node, IndexArray] | None:
        """Return the candidate of lowest priority, and the positions of up to `limit` unpinned
        blocks of the medium at the end of its edge; None if there is no candidate."""
        pins = self._blocks[queue.medium].pins
        while (node := queue.peek()) is not None:
            positions = node.positions(queue.medium)[-limit:]
            index = ref_index(node.refs[positions])
            pinned = np.flatnonzero(pins[index])
            if not len(pinned):
                return node, positions
            if pinned[-1] + 1 < len(index):
                return node, positions[pinned[-1] + 1 :]
            self._park(queue, node, int(node.refs[positions[-1]]))
        return None

    def _pinned_from(self, node: Node, keep: int) -> int | None:
        """Return a pinned block of the edge from `keep` on or of a node below, or None."""
        for each in node.subtree():
            refs = each.refs[keep:] if each is node else each.refs
            pinned = np.flatnonzero(self._blocks.pins(refs))
            if len(pinned):
                return int(refs[pinned[-1]])
        return None

    def _park(self, queue: EvictionQueue, node: Node, pinned: int) -> None:
        (part,) = self._blocks.by_medium(np.array([pinned], dtype=np.int64))
        part.blocks.watch(part.indices)
        queue.park(node, (part.blocks.medium, int(part.indices[0])))

    def _copied(self, source: Medium, index: IndexArray, target: Medium) -> Moving[IndexArray]:
        """Copy blocks `index` [n] of `source`, which must be held or active, to new blocks of
        `target`; return the indices [n] of those, which are ACTIVE and private."""
        taken = self._blocks[target].take(len(index), private=True)
        try:
            yield Copy(self._stores[source], index, self._stores[target], taken)
        except BaseException:
            self._blocks[target].free_active(taken)
            raise
        self._copies += 1
        return taken

    def _offer(self, node: Node) -> None:
        hbm, dram_leaf, dram_covered = self.queues
        hbm.offer(node)
        if node.own[Medium.DRAM]:
            dram_leaf.offer(node)
            dram_covered.offer(node)
