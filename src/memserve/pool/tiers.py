"""Moving historical blocks between HBM and DRAM, and dropping them."""

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
    """The index's blocks over both media. Callers hold the pool's lock; what returns a `Moving`
    is run by the pool's `Mover`, which gives the lock up for each copy.

    Counts: a cached block may go if no pin is on it or on anything below it. Pins cover
    whole prefixes, so that is every unpinned block; only while a pinned block is DETACHED may
    its successor in the index be unpinned above pinned blocks, at most one for each. Some holds
    are on any blocks; while there are such everything is counted.
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
        self.moving: RefArray = _NO_REFS  # allocated blocks, on their way to HBM
        self._copies = 0  # made so far
        self.evictions = 0  # historical blocks dropped
        self.swapped_out = 0
        self.swapped_in = 0

    def evictable(self, medium: Medium) -> int:
        """How many historical blocks of the medium could go. Constant time without detached."""
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
        """As `make_room` where that takes no copy; False where it may, or there is no room."""
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
        """Have at least `count` blocks free. Raises OutOfBlocks, and then has changed nothing,
        unless others have taken meanwhile what it made free."""
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
                    f"{short} more {medium.name} blocks should be evictable and none is found"
                )

    def allocate(self, medium: Medium, count: int, private: bool) -> Moving[RefArray]:
        """`count` blocks that were free, or were made free. Raises OutOfBlocks."""
        blocks = self._blocks[medium]
        yield from self.make_room(medium, count)
        return blocks.ref[blocks.take(count, private)]

    def swap_out(self, count: int) -> Moving[int]:
        """Move up to `count` unpinned blocks from HBM to DRAM; returns how many went.

        Where DRAM is full, the coldest leaves there are dropped first. Blocks that somebody has
        matched while they were copied stay.
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
        """Have the same KV in HBM. Of the cached blocks that are held, those in DRAM move, and
        the hold follows. Returns where the allocated blocks `active` [n] are then. Raises
        OutOfBlocks, and then has moved none; StaleBlock if `active` ones are not any more.
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
        # The index has others for the rest by now, and the hold is on those.
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
        """Have the index hold CACHED blocks `new` where `old` are; readers keep the old, and holds
        go on to the new."""
        if not len(old):
            return
        self.index.repoint_refs(old, new)
        for part, index in self.holds.follow(old, new) if len(self.holds) else ():
            self.wake(part.blocks, index)
        for blocks, _, index in self._blocks.by_medium(old):
            self.wake(blocks, blocks.orphan_or_free(index))

    def let_go(self, hold: Hold) -> None:
        for part, index in self.holds.close(hold):
            self.wake(part.blocks, index)

    def drop(self, kind: Kind, count: int) -> int:
        """Drop historical blocks until `count` more of the kind's medium are free, or none is
        left that may go; returns how many more are free."""
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
        """Free blocks that were cut from the index."""
        for blocks, _, index in self._blocks.by_medium(refs):
            blocks.free_cached(index)

    def shrink_dram(self, count: int) -> Moving[int]:
        """Give whole segments of at most `count` blocks back; returns how many blocks went."""
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
        """Empty the DRAM blocks from `start` on and withhold them; False, and nothing is
        withheld, if active or pinned blocks are there or the others have no place."""
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
            # Counts what gets free behind `start` too.
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
        if self._is_used(behind):  # somebody has matched some of it meanwhile
            dram.restore(start)
            return False
        return True

    def _is_used(self, index: IndexArray) -> bool:
        """Whether somebody owns or reads some of these DRAM blocks."""
        dram = self._blocks.dram
        state = dram.state[index]
        return bool(((state == ACTIVE) | (state == DETACHED) | (dram.pins[index] > 0)).any())

    def wake(self, blocks: BlockAllocator, index: IndexArray) -> None:
        """Blocks that nobody reads any more, or that left the index."""
        for block in index.tolist():
            for queue in self.queues:
                queue.released((blocks.medium, block))

    def _free_hbm(self, short: int) -> Moving[None]:
        """One step towards `short` more free HBM blocks."""
        unpinned, uncertain = self._unpinned(Medium.DRAM)
        room = self._blocks.dram.free + max(0, unpinned - uncertain)
        # What DRAM cannot hold is dropped, and that is the coldest.
        if short > room and self.drop(Kind.HBM, short - room):
            return
        copies = self._copies
        if not (yield from self.swap_out(short)) and copies == self._copies:
            self.drop(Kind.HBM, short)

    def _unpinned(self, medium: Medium) -> tuple[int, int]:
        """Unpinned historical blocks, and how many of them pins below might hold."""
        blocks = self._blocks[medium]
        unpinned = blocks.cached - blocks.pinned
        return unpinned, sum(each.detached for each in self._blocks.media)

    def _victim(self, queue: EvictionQueue, limit: int) -> tuple[Node, IndexArray] | None:
        """The candidate of least priority, and the positions of up to `limit` unpinned blocks
        of the medium at the end of its edge."""
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
        """A pinned block in the edge from `keep` on or below, if there is one."""
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
        """Newly taken blocks of the target medium, with the bytes of others, which must be held
        or allocated."""
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
