"""Moving historical blocks between HBM and DRAM, and dropping them."""

from __future__ import annotations

import numpy as np

from memserve.errors import IntegrityError, OutOfBlocks
from memserve.pool.allocator import ACTIVE, CACHED, ORPHAN, BlockAllocator
from memserve.pool.blocks import Blocks
from memserve.pool.eviction import Eviction, EvictionQueue, Kind
from memserve.pool.index import Node, RadixIndex
from memserve.pool.storage import BlockStore
from memserve.types import IndexArray, Medium, RefArray, ref_index, ref_medium


class Tiers:
    """The index's blocks over both media. Callers hold the pool's lock.

    Counts: a cached block may go if no pin is on it or on anything below it. Pins cover
    whole prefixes, so that is every unpinned block; only while a pinned block is ORPHAN may
    its successor in the index be unpinned above pinned blocks, at most one for each.
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
        self.evictions = 0  # historical blocks dropped
        self.swapped_out = 0
        self.swapped_in = 0

    def evictable(self, medium: Medium) -> int:
        """How many historical blocks of the medium could go. Constant time without orphans."""
        unpinned, uncertain = self._unpinned(medium)
        if not uncertain or not unpinned:
            return unpinned
        count = 0
        for root in self.index.roots.values():
            held = self.index.held(root)
            for node in root.subtree():
                free = node.refs[held[node.id] :]
                count += int(np.count_nonzero(ref_medium(free) == medium))
        return count

    def make_room(self, medium: Medium, count: int) -> None:
        """Have at least `count` blocks free. Raises OutOfBlocks, and then changed nothing."""
        blocks = self._blocks[medium]
        short = count - blocks.free
        if short <= 0:
            return
        unpinned, uncertain = self._unpinned(medium)
        if short > unpinned - uncertain and short > (evictable := self.evictable(medium)):
            raise OutOfBlocks(medium.name, count, blocks.free, evictable, blocks.total)
        while (short := count - blocks.free) > 0:
            before = self.evictions + self.swapped_out
            if medium is Medium.HBM:
                self._free_hbm(short)
            elif not self.drop(Kind.DRAM_LEAF, short):
                self.drop(Kind.DRAM_COVERED, short)
            if before == self.evictions + self.swapped_out:
                raise IntegrityError(
                    f"{short} more {medium.name} blocks should be evictable and none is found"
                )

    def swap_out(self, count: int) -> int:
        """Move up to `count` unpinned blocks from HBM to DRAM; returns how many went.

        Where DRAM is full, the coldest leaves there are dropped first.
        """
        hbm, dram = self._blocks.media
        if count > dram.free:
            self.drop(Kind.DRAM_LEAF, count - dram.free)
        left = min(count, dram.free)
        moved = 0
        queue = self.queues[Kind.HBM]
        while left and (victim := self._victim(queue, left)) is not None:
            node, positions = victim
            queue.charge(node)
            source = ref_index(node.refs[positions])
            target = self._move(Medium.HBM, source, Medium.DRAM)
            dram.cache(target)
            self.index.repoint(node, positions, dram.ref[target])
            hbm.free_cached(source)
            moved += len(source)
            left -= len(source)
        self.swapped_out += moved
        return moved

    def to_hbm(self, refs: RefArray) -> RefArray:
        """The same KV in HBM: DRAM blocks move, others are kept. Raises OutOfBlocks.

        Each CACHED block of `refs` carries one pin of the caller, and so does each CACHED
        one returned. ACTIVE blocks stay the caller's.
        """
        in_dram = ref_medium(refs) == Medium.DRAM
        old = refs[in_dram]
        if not len(old):
            return refs
        self.make_room(Medium.HBM, len(old))
        hbm, dram = self._blocks.media
        source = ref_index(old)
        target = self._move(Medium.DRAM, source, Medium.HBM)
        new = hbm.ref[target]
        cached = dram.state[source] == CACHED
        dram.free_active(source[~cached])
        hbm.cache(target[cached])
        hbm.pin(target[cached])
        self.wake(dram, dram.unpin(source[cached]))
        self.replace(old[cached], new[cached])
        self.swapped_in += len(old)
        moved = refs.copy()
        moved[in_dram] = new
        return moved

    def replace(self, old: RefArray, new: RefArray) -> None:
        """Have the index hold CACHED blocks `new` where `old` are; readers keep the old."""
        self.index.repoint_refs(old, new)
        for blocks, _, index in self._blocks.by_medium(old):
            self.wake(blocks, blocks.orphan_or_free(index))

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

    def vacate_dram(self, start: int) -> bool:
        """Empty the DRAM blocks from `start` on and withhold them; False, and nothing is
        withheld, if active or pinned blocks are there or the others have no place."""
        dram = self._blocks.dram
        behind = np.arange(start, dram.capacity)
        state = dram.state[behind]
        if ((state == ACTIVE) | (state == ORPHAN) | (dram.pins[behind] > 0)).any():
            return False
        dram.withhold(start)
        cached = behind[state == CACHED]
        if len(cached) > dram.free + self.evictable(Medium.DRAM):
            dram.restore(start)
            return False
        while len(cached) > dram.free:
            self.make_room(Medium.DRAM, len(cached))  # counts what gets free behind `start` too
            dram.withhold(start)
            cached = cached[dram.state[cached] == CACHED]
        old = dram.ref[cached]
        target = self._move(Medium.DRAM, cached, Medium.DRAM)
        dram.cache(target)
        self.replace(old, dram.ref[target])
        dram.withhold(start)
        return True

    def wake(self, blocks: BlockAllocator, index: IndexArray) -> None:
        """Blocks that nobody reads any more, or that left the index."""
        for block in index.tolist():
            for queue in self.queues:
                queue.released((blocks.medium, block))

    def _free_hbm(self, short: int) -> None:
        """One step towards `short` more free HBM blocks."""
        unpinned, uncertain = self._unpinned(Medium.DRAM)
        room = self._blocks.dram.free + max(0, unpinned - uncertain)
        # What DRAM cannot hold is dropped, and that is the coldest.
        if short > room and self.drop(Kind.HBM, short - room):
            return
        if not self.swap_out(short):
            self.drop(Kind.HBM, short)

    def _unpinned(self, medium: Medium) -> tuple[int, int]:
        """Unpinned historical blocks, and how many of them pins below might hold."""
        blocks = self._blocks[medium]
        return blocks.cached - blocks.pinned, sum(each.orphan for each in self._blocks.media)

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

    def _move(self, source: Medium, index: IndexArray, target: Medium) -> IndexArray:
        """Copy blocks into newly taken ones of the target medium."""
        taken = self._blocks[target].take(len(index))
        try:
            self._stores[target].copy_from(self._stores[source], index, taken)
        except BaseException:
            self._blocks[target].free_active(taken)
            raise
        return taken

    def _offer(self, node: Node) -> None:
        hbm, dram_leaf, dram_covered = self.queues
        hbm.offer(node)
        if node.own[Medium.DRAM]:
            dram_leaf.offer(node)
            dram_covered.offer(node)
