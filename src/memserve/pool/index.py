"""The index: a radix tree from token prefixes to the blocks that hold their KV.

The tree is canonical: no node except a root has exactly one child, so the number of nodes
depends only on the stored prefixes. The index owns CACHED blocks; `BlockAllocator.node` maps a
block to its node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from memserve.pool.blocks import Blocks, Part
from memserve.pool.listener import IndexListener, StoredRun, moved_runs
from memserve.radix import RadixNode, RadixNodes, RadixTree
from memserve.types import IndexArray, Medium, RefArray, ref_medium

_MEDIA = (Medium.HBM, Medium.DRAM)
_DRAM = int(Medium.DRAM)  # for `walk`: access to an enumeration's member takes as long as a step
_NO_REFS: RefArray = np.empty(0, dtype=np.int64)


class Node(RadixNode):
    """A node: its edge, the edge's blocks, and counts of blocks by medium."""

    __slots__ = ("below", "own", "queued", "refs", "stamp")

    def __init__(self, id: int, parent: Node | None, start: int, edge: bytes) -> None:
        super().__init__(id, parent, start, edge)
        self.refs = _NO_REFS  # [blocks of the edge]; the array is replaced, never changed
        self.stamp = 0.0  # last access; a stamp of the eviction policy
        self.own = [0, 0]  # by medium: blocks of the edge
        self.below = [0, 0]  # by medium: children whose subtree has blocks of it
        self.queued = [0, 0, 0]  # by eviction queue: serial of the valid entry, 0 for none

    def holds(self, medium: int) -> bool:
        """Return whether this edge or a node below has blocks of the medium."""
        return self.own[medium] > 0 or self.below[medium] > 0

    def is_dram_leaf(self) -> bool:
        """Return whether the node has no children and its last block is in DRAM."""
        if self.children or not self.own[Medium.DRAM]:
            return False
        return not self.own[Medium.HBM] or bool(ref_medium(self.refs[-1:])[0])

    def positions(self, medium: Medium) -> IndexArray:
        """Return the ascending positions within the edge of its blocks of this medium."""
        if self.own[medium] == len(self.refs):
            return np.arange(len(self.refs))
        return np.flatnonzero(ref_medium(self.refs) == medium)


class Path(NamedTuple):
    """Result of a lookup: the stored prefix of the given tokens."""

    nodes: list[Node]
    refs: RefArray  # [blocks of the prefix], a copy
    matched: int  # blocks of the last node's edge that are part of the prefix
    in_dram: bool  # False: no block is in DRAM; True: the nodes have DRAM blocks


class RadixIndex(RadixTree[Node]):
    """The trees of one pool's cached blocks, one per namespace.

    `changed` is called with every node that may have become evictable.
    """

    def __init__(self, blocks: Blocks, block_tokens: int, changed: Callable[[Node], None]) -> None:
        super().__init__(RadixNodes(), block_tokens)
        self._blocks = blocks
        self._changed = changed
        self.listener: IndexListener | None = None
        self._namespaces: dict[int, str] = {}  # by root id
        self.roots: dict[str, Node] = {}

    def walk(self, namespace: str, data: bytes, stamp: float) -> Path:
        """Return the longest stored prefix in whole blocks; sets the stamp of its nodes."""
        root = self.roots.get(namespace)
        if root is None:
            return Path([], _NO_REFS, 0, False)
        nodes, length = self.follow(root, data)
        if not nodes:
            return Path(nodes, _NO_REFS, 0, False)
        in_dram = 0
        for node in nodes:
            node.stamp = stamp
            in_dram += node.own[_DRAM]
        matched = length // self.block_bytes - nodes[-1].start
        return Path(nodes, _joined(nodes, matched), matched, in_dram > 0)

    def extend(
        self,
        namespace: str,
        path: Path,
        data: bytes,
        refs: RefArray,
        parts: Iterable[Part],
        stamp: float,
    ) -> None:
        """Store `refs` [n] for the n blocks of `data` behind `path`; `parts`: `refs` by medium."""
        if not path.nodes:
            node = self._root(namespace)
        else:
            node = path.nodes[-1]
            if path.matched < len(node.refs):
                node = self.split(node, path.matched)
        at = len(path.refs) * self.block_bytes
        edge = data[at : at + len(refs) * self.block_bytes]
        if node.parent is not None and not node.children:  # a leaf grows
            node.edge += edge
            node.refs = np.concatenate((node.refs, refs))
            node.queued = [0, 0, 0]
        else:
            node = self.add(node, edge)
            node.refs = refs.copy()
            node.stamp = stamp
        for blocks, _, index in parts:
            blocks.node[index] = node.id
            medium = int(blocks.medium)
            self._count(node, medium, node.own[medium] + len(index), node.below[medium])
        self._changed(node)
        if self.listener is not None:
            parent = int(path.refs[-1]) if len(path.refs) else None
            self.listener.stored(StoredRun(namespace, parent, node.refs[-len(refs) :], edge))

    def repoint(self, node: Node, positions: IndexArray, refs: RefArray) -> RefArray:
        """Put blocks `refs` [n] at `positions` [n] of an edge; return the previous blocks [n]."""
        old = node.refs[positions]
        node.refs = node.refs.copy()  # listeners share the array
        node.refs[positions] = refs
        self._house(node, refs)
        self._recount(node)
        self._tail_changed(node)
        if self.listener is not None:
            namespace = self._namespace(node)
            for run, part in moved_runs(namespace, node, positions, self.block_bytes):
                self.listener.moved(run, old[part])
        return old

    def repoint_refs(self, old: RefArray, new: RefArray) -> None:
        """Put block `new[i]` in the place of CACHED block `old[i]`, in any node."""
        homes = np.empty(len(old), dtype=np.int64)
        for blocks, where, index in self._blocks.by_medium(old):
            homes[where] = blocks.node[index]
        for home in np.unique(homes).tolist():
            node = self.nodes[home]
            mine = homes == home
            order = np.argsort(node.refs)
            positions = order[np.searchsorted(node.refs, old[mine], sorter=order)]
            self.repoint(node, positions, new[mine])

    def cut(self, node: Node, keep: int) -> RefArray:
        """Remove the edge's blocks from `keep` on and all nodes below; return their blocks."""
        gone = [node.refs[keep:]]
        for below in list(node.subtree())[1:]:
            gone.append(below.refs)
            self.forget(below)
        refs = np.concatenate(gone)
        if self.listener is not None:
            self.listener.removed(self._namespace(node), refs)
        node.children = {}
        node.refs = node.refs[:keep].copy()
        in_dram = int(np.count_nonzero(ref_medium(node.refs)))
        self._count(node, Medium.HBM, keep - in_dram, 0)
        self._count(node, Medium.DRAM, in_dram, 0)
        if keep:
            node.edge = node.edge[: keep * self.block_bytes]
            self._tail_changed(node)
        else:
            self._detach(node)
        return refs

    def prune(self, top: Node) -> RefArray:
        """Remove the subtree of `top` except pinned blocks and the blocks before them; return
        the removed blocks."""
        held = self.held(top)
        # Partial cuts come first: a cut that removes a node may merge its parent into the one
        # remaining sibling, and the positions of a planned cut in that sibling would be wrong.
        partial: list[Node] = []
        whole: list[Node] = []
        stack = [top]
        while stack:
            node = stack.pop()
            if not held[node.id]:
                whole.append(node)
            elif any(held[child.id] for child in node.children.values()):
                stack.extend(node.children.values())
            elif node.children or held[node.id] < len(node.refs):
                partial.append(node)
        gone = [self.cut(node, held[node.id]) for node in (*partial, *whole)]
        return np.concatenate(gone) if gone else _NO_REFS

    def held(self, top: Node) -> dict[int, int]:
        """Return for each node of the subtree of `top` how many blocks of its edge, from the
        start, must stay because they or later blocks are pinned."""
        held: dict[int, int] = {}
        for node in reversed(list(top.subtree())):
            if any(held[child.id] for child in node.children.values()):
                held[node.id] = len(node.refs)
                continue
            pinned = np.flatnonzero(self._blocks.pins(node.refs))
            held[node.id] = int(pinned[-1]) + 1 if len(pinned) else 0
        return held

    def _namespace(self, node: Node) -> str:
        while node.parent is not None:
            node = node.parent
        return self._namespaces[node.id]

    def _root(self, namespace: str) -> Node:
        root = self.roots.get(namespace)
        if root is None:
            root = self._new(None, 0, b"")
            self.roots[namespace] = root
            self._namespaces[root.id] = namespace
        return root

    def _new(self, parent: Node | None, start: int, edge: bytes) -> Node:
        return Node(next(self._ids), parent, start, edge)

    def split(self, node: Node, at: int) -> Node:
        """Split as `RadixTree.split`; the lower node stays queued, because its tail is the same."""
        upper = super().split(node, at)
        upper.stamp = node.stamp
        upper.refs = node.refs[:at].copy()
        node.refs = node.refs[at:].copy()
        in_dram = self._house(upper, upper.refs)
        upper.own = [at - in_dram, in_dram]
        node.own = [node.own[0] - upper.own[0], node.own[1] - in_dram]
        upper.below = [int(node.holds(medium)) for medium in _MEDIA]
        self._changed(upper)
        return upper

    def merge(self, node: Node) -> Node:
        """Merge as `RadixTree.merge`; the child stays queued for eviction."""
        refs, own, stamp = node.refs, node.own, node.stamp
        child = super().merge(node)
        child.refs = np.concatenate((refs, child.refs))
        child.stamp = max(stamp, child.stamp)
        child.own = [a + b for a, b in zip(own, child.own, strict=True)]
        self._house(child, refs)
        self._changed(child)
        return child

    def _detach(self, node: Node) -> None:
        """Remove a node without blocks from the tree; its edge still holds its key."""
        parent = self.remove(node)
        if parent.parent is None:
            if not parent.children:
                del self.roots[self._namespaces.pop(parent.id)]
        elif len(parent.children) == 1:
            self.merge(parent)
        else:
            self._changed(parent)

    def forget(self, node: Node) -> None:
        """Forget the node, and clear it: eviction queues may still refer to it."""
        super().forget(node)
        node.own = [0, 0]
        node.queued = [0, 0, 0]
        node.refs = _NO_REFS

    def _house(self, node: Node, refs: RefArray) -> int:
        """Set `node` as the node of these blocks; return how many of them are in DRAM."""
        in_dram = 0
        for blocks, _, index in self._blocks.by_medium(refs):
            blocks.node[index] = node.id
            if blocks.medium is Medium.DRAM:
                in_dram = len(index)
        return in_dram

    def _recount(self, node: Node) -> None:
        in_dram = int(np.count_nonzero(ref_medium(node.refs)))
        self._count(node, Medium.HBM, len(node.refs) - in_dram, node.below[Medium.HBM])
        self._count(node, Medium.DRAM, in_dram, node.below[Medium.DRAM])

    def _count(self, node: Node, medium: int, own: int, below: int) -> None:
        """Set a node's counts, and update ancestors if its subtree gained or lost the medium."""
        held = node.own[medium] > 0 or node.below[medium] > 0
        node.own[medium] = own
        node.below[medium] = below
        holds = own > 0 or below > 0
        while held != holds and (parent := node.parent) is not None:
            held = parent.holds(medium)
            parent.below[medium] += 1 if holds else -1
            holds = parent.holds(medium)
            if not parent.below[medium] and parent.parent is not None:
                self._changed(parent)
            node = parent

    def _tail_changed(self, node: Node) -> None:
        """Invalidate the node's queue entries, because its last blocks changed; queue it again."""
        node.queued = [0, 0, 0]
        self._changed(node)


def _joined(nodes: list[Node], matched: int) -> RefArray:
    """Return a new array of the nodes' blocks, with the first `matched` of the last node."""
    if len(nodes) == 1:
        return nodes[0].refs[:matched].copy()
    parts = [node.refs for node in nodes]
    if matched < len(parts[-1]):
        parts[-1] = parts[-1][:matched]
    return np.concatenate(parts)
