"""Consistency check of allocators, index and eviction queues. Reads all of their state: for
tests and idle times."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from memserve.errors import IntegrityError
from memserve.pool.allocator import (
    ACTIVE,
    CACHED,
    DETACHED,
    FREE,
    RETIRED,
    STATE_NAMES,
    BlockAllocator,
)
from memserve.pool.blocks import Blocks, Part
from memserve.pool.eviction import EvictionQueue
from memserve.pool.index import Node, RadixIndex
from memserve.types import IndexArray, Medium, ref_index, ref_medium


def check(
    blocks: Blocks,
    index: RadixIndex,
    queues: Sequence[EvictionQueue],
    pins: Sequence[Part],
) -> None:
    """Raise IntegrityError for the first contradiction. `pins`: blocks of open matches and holds,
    once for each."""
    nodes = [node for root in index.roots.values() for node in _checked_tree(index, root)]
    if len(nodes) != len(index.nodes) or any(index.nodes[node.id] is not node for node in nodes):
        raise IntegrityError(
            f"{len(nodes)} nodes are reachable from roots, {len(index.nodes)} are registered"
        )
    for queue in queues:
        for node in nodes:
            if queue.is_candidate(node) and not node.queued[queue.kind]:
                raise IntegrityError(f"node {node.id} is evictable ({queue.kind.name}), not queued")
    for each in blocks.media:
        _check_allocator(each)
        _check_owners(each, nodes)
        _check_pins(each, [part.indices for part in pins if part.blocks is each])


def _checked_tree(index: RadixIndex, root: Node) -> Iterable[Node]:
    if not root.children:
        raise IntegrityError(f"root {root.id} has no children and was not removed")
    for node in root.subtree():
        _check_node(index, node)
        if node is not root:
            yield node


def _check_node(index: RadixIndex, node: Node) -> None:
    step = index.block_bytes
    where = f"node {node.id}"
    if len(node.edge) != len(node.refs) * step:
        raise IntegrityError(f"{where}: {len(node.edge)} bytes of tokens, {len(node.refs)} blocks")
    if node.parent is not None and (not len(node.refs) or len(node.children) == 1):
        raise IntegrityError(
            f"{where}: {len(node.refs)} blocks, {len(node.children)} children; not canonical"
        )
    for key, child in node.children.items():
        if child.parent is not node or child.edge[:step] != key:
            raise IntegrityError(f"{where}: child {child.id} has another parent or key")
        if child.start != node.start + len(node.refs):
            raise IntegrityError(f"{where}: child {child.id} starts at block {child.start}")
    for medium in Medium:
        own = int(np.count_nonzero(ref_medium(node.refs) == medium))
        below = sum(child.holds(medium) for child in node.children.values())
        if node.own[medium] != own or (node.below[medium] != below):
            raise IntegrityError(
                f"{where}: {medium.name} counts {node.own[medium]}, {node.below[medium]}; "
                f"recounted {own}, {below}"
            )


def _check_allocator(blocks: BlockAllocator) -> None:
    state = blocks.state[: blocks.capacity]
    counted = np.bincount(state, minlength=len(STATE_NAMES))
    claimed = {
        FREE: blocks.free,
        ACTIVE: blocks.active,
        CACHED: blocks.cached,
        DETACHED: blocks.detached,
        RETIRED: blocks.retired,
    }
    for each, claim in claimed.items():
        if counted[each] != claim:
            raise IntegrityError(
                f"{blocks.medium.name}: {counted[each]} blocks are {STATE_NAMES[each]}, "
                f"{claim} counted"
            )
    listed = np.sort(blocks.free_list())
    if not np.array_equal(listed, np.flatnonzero(state == FREE)):
        raise IntegrityError(f"{blocks.medium.name}: the free list is not the free blocks")


def _check_owners(blocks: BlockAllocator, nodes: list[Node]) -> None:
    """Check that each CACHED block is in the index exactly once, and no other block is there."""
    name = blocks.medium.name
    homes = np.zeros(blocks.capacity, dtype=np.int64)
    for node in nodes:
        refs = node.refs[ref_medium(node.refs) == blocks.medium]
        at = ref_index(refs)
        if not np.array_equal(refs, blocks.ref[at]):
            bad = int(at[(refs != blocks.ref[at]).argmax()])
            raise IntegrityError(f"node {node.id}: reference to {name} block {bad} is stale")
        if homes[at].any() or not blocks.distinct(at):
            raise IntegrityError(f"node {node.id}: a {name} block is in the index twice")
        homes[at] = node.id
    cached = blocks.state[: blocks.capacity] == CACHED
    wrong = cached != (homes > 0)
    if wrong.any():
        bad = int(wrong.argmax())
        raise IntegrityError(
            f"{name} block {bad} is {STATE_NAMES[blocks.state[bad]]} "
            f"and {'in' if homes[bad] else 'not in'} the index"
        )
    lost = cached & (homes != blocks.node[: blocks.capacity])
    if lost.any():
        bad = int(lost.argmax())
        raise IntegrityError(
            f"{name} block {bad} is in node {homes[bad]}, recorded in {blocks.node[bad]}"
        )


def _check_pins(blocks: BlockAllocator, held_by: list[IndexArray]) -> None:
    pins = np.zeros(blocks.capacity, dtype=np.int64)
    for index in held_by:
        pins[index] += 1
    state = blocks.state[: blocks.capacity]
    wrong = pins != blocks.pins[: blocks.capacity]
    if wrong.any():
        bad = int(wrong.argmax())
        raise IntegrityError(
            f"{blocks.medium.name} block {bad} has {blocks.pins[bad]} pins, "
            f"{pins[bad]} open matches and holds"
        )
    held = pins > 0
    if (held & (state != CACHED) & (state != DETACHED)).any():
        bad = int((held & (state != CACHED) & (state != DETACHED)).argmax())
        raise IntegrityError(
            f"{blocks.medium.name} block {bad} is pinned and {STATE_NAMES[state[bad]]}"
        )
    if ((state == DETACHED) & ~held).any():
        bad = int(((state == DETACHED) & ~held).argmax())
        raise IntegrityError(f"{blocks.medium.name} block {bad} is detached without a reader")
    pinned = int(np.count_nonzero(held & (state == CACHED)))
    if pinned != blocks.pinned:
        raise IntegrityError(
            f"{blocks.medium.name}: {pinned} cached blocks are pinned, {blocks.pinned} counted"
        )
