"""A radix tree of tokens whose edges know which instances hold them.

Each instance holds all of an edge or nothing of it: edges are cut where holders change, and
joined again where they no longer differ, so that memory follows what is stored. Lookups always
compare the tokens: the names that instances give their blocks only serve to find them again.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from memserve.radix import RadixNode, RadixNodes, RadixTree, common_bytes
from memserve.scheduler.block_table import BlockTable, Numbers
from memserve.types import IndexArray, Namespace


class Node(RadixNode):
    """An edge and its holders."""

    __slots__ = ("blocks", "expected", "mask", "tree")

    def __init__(self, id: int, parent: Node | None, start: int, edge: bytes, tree: HolderTree):
        super().__init__(id, parent, start, edge)
        self.tree = tree
        self.blocks: dict[int, Numbers] = {}  # by holder's slot: its blocks [blocks of the edge]
        self.expected: dict[int, float] = {}  # by slot: until when it counts as held
        self.mask = 0  # bits of the slots in `blocks` and `expected`: who counts as a holder

    def __len__(self) -> int:
        """Blocks of the edge."""
        return len(self.edge) // self.tree.block_bytes

    def like(self, other: Node) -> bool:
        """Whether the two could be one edge."""
        if self.mask != other.mask or self.expected != other.expected:
            return False
        return self.blocks.keys() == other.blocks.keys()

    def check(self) -> None:
        """Raises AssertionError for a node that should not be as it is."""
        parent = self.parent
        assert parent is not None
        assert parent.children[self.edge[: self.tree.block_bytes]] is self
        assert self.start == parent.start + len(parent)
        assert len(self) * self.tree.block_bytes == len(self.edge) > 0
        assert self.mask or self.children
        slots = {*self.blocks, *self.expected}
        assert self.mask == sum(1 << slot for slot in slots)
        assert len(slots) == len(self.blocks) + len(self.expected)
        assert all(len(numbers) == len(self) for numbers in self.blocks.values())
        if len(self.children) == 1:
            assert not self.like(next(iter(self.children.values())))


class SharedNodes(RadixNodes[Node]):
    """The nodes of all trees by id, and the holders' tables by slot."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[int, BlockTable] = {}


class HolderTree(RadixTree[Node]):
    """The tree of one namespace and block size."""

    def __init__(self, shared: SharedNodes, namespace: Namespace, block_tokens: int) -> None:
        super().__init__(shared, block_tokens)
        self.namespace = namespace
        self._tables = shared.tables
        self.root = self._new(None, 0, b"")

    def __bool__(self) -> bool:
        """Whether anything is stored."""
        return bool(self.root.children)

    def walk(self, data: bytes, alive: int) -> list[tuple[int, int]]:
        """Where holders among `alive` end along `data`: their mask, and bytes, ascending.

        A holder that lacks a block on the way ends there, whatever it has behind.
        """
        ends: list[tuple[int, int]] = []
        nodes, length = self.follow(self.root, data)
        for node in nodes:
            left = alive & node.mask
            if left != alive:
                if node.start:
                    ends.append((alive & ~left, node.start * self.block_bytes))
                alive = left
                if not alive:
                    return ends
        if length:
            ends.append((alive, length))
        return ends

    def differing(self, at: Node, depth: int, data: bytes, slot: int, numbers: Numbers) -> Numbers:
        """Which of `numbers`, stored somewhere, are not where `store` would put them."""
        table = self._tables[slot]
        right = np.zeros(len(numbers), dtype=np.bool_)
        for node, offset, done, count in self._along(at, depth, data):
            mine = node.blocks.get(slot)
            if mine is not None:
                right[done : done + count] = (
                    mine[offset : offset + count] == numbers[done : done + count]
                )
        astray: Numbers = numbers[~right & (table.node[numbers] != 0)]
        return astray

    def store(self, at: Node, depth: int, data: bytes, slot: int, numbers: Numbers) -> None:
        """`slot` holds blocks `numbers` [n], nowhere so far or already there, for the n blocks
        of `data` behind the block `depth` - 1 of `at`."""
        touched: list[Node] = []
        step = self.block_bytes
        node, offset, done, total = at, depth - at.start, 0, len(numbers)
        while done < total:
            if offset == len(node):
                child = node.children.get(data[done * step : (done + 1) * step])
                if child is None:
                    rest = data[done * step :]
                    touched.append(self._append(node, rest, slot, numbers[done:]))
                    break
                node, offset = child, 0
                continue
            count = self._common_blocks(node, offset, data, done)
            if not count:  # only behind a block that the slot holds: at the start, or at `at`
                node = self.split(node, offset)
                continue
            if slot in node.blocks:
                self._replace(node, offset, slot, numbers[done : done + count])
            else:
                if count < len(node):
                    touched.append(node)
                    node = self.split(node, count)
                self._claim(node, slot, numbers[done : done + count])
                touched.append(node)
            done += count
            offset += count
        self._tidy_all(touched)

    def drop(self, node: Node, slot: int, positions: IndexArray) -> None:
        """`slot` no longer holds the blocks at `positions` of the edge, ascending."""
        gone = []
        for first, end in reversed(_runs(positions)):
            piece = node
            if end < len(node):
                node = self.split(node, end)
                piece = node
            if first:
                node = self.split(node, first)  # `piece` keeps its end
            gone.append(piece)
        touched = []
        for piece in gone:
            touched += [piece, *piece.children.values()]
            numbers = piece.blocks.pop(slot)
            piece.expected.pop(slot, None)
            piece.mask &= ~(1 << slot)
            self._tables[slot].vacate(numbers)
        self._tidy_all(touched)

    def expect(self, data: bytes, slot: int, deadline: float) -> bool:
        """Count `slot` as a holder of all of `data` until `deadline`; False if it is one."""
        touched: list[Node] = []
        node, at, end, step = self.root, 0, len(data), self.block_bytes
        while at < end:
            child = node.children.get(data[at : at + step])
            if child is None:
                child = self.add(node, data[at:])
            size = common = len(child.edge)
            if not data.startswith(child.edge, at):
                common = common_bytes(child.edge, 0, data, at, step)
            at += common
            if slot not in child.blocks:
                if common < size:
                    touched.append(child)
                    child = self.split(child, common // step)
                    size = common
                child.expected[slot] = max(deadline, child.expected.get(slot, deadline))
                child.mask |= 1 << slot
                touched.append(child)
            if common < size and at < end:  # held so far, and parts from there
                child = self.split(child, common // step)
                touched.append(child)
            node = child
        self._tidy_all(touched)
        return bool(touched)

    def give_up(self, data: bytes, slot: int, now: float) -> None:
        """End what was expected along `data` until `now`."""
        touched = []
        for node, _, _, _ in self._along(self.root, 0, data):
            if slot in node.expected and node.expected[slot] <= now:
                del node.expected[slot]
                node.mask &= ~(1 << slot)
                touched.append(node)
        self._tidy_all(touched)

    def subtree(self) -> Iterator[Node]:
        """All nodes, parents before their children, without the root."""
        nodes = self.root.subtree()
        next(nodes)
        return nodes

    # --- inside ---------------------------------------------------------------------------

    def _along(self, at: Node, depth: int, data: bytes) -> Iterator[tuple[Node, int, int, int]]:
        """The part of the tree that `data` follows behind `depth`: node, offset in its edge,
        blocks of `data` before it, common blocks."""
        node, offset, done = at, depth - at.start, 0
        step = self.block_bytes
        total = len(data) // step
        while done < total:
            if offset == len(node):
                child = node.children.get(data[done * step : (done + 1) * step])
                if child is None:
                    return
                node, offset = child, 0
            count = self._common_blocks(node, offset, data, done)
            if not count:
                return
            yield node, offset, done, count
            offset += count
            done += count
            if offset < len(node):
                return

    def _common_blocks(self, node: Node, offset: int, data: bytes, done: int) -> int:
        """Blocks that the edge from `offset` on and `data` behind `done` blocks have in common."""
        edge, step = node.edge, self.block_bytes
        start, at = offset * step, done * step
        if data.startswith(edge[start:], at):  # as a rule
            return len(node) - offset
        return common_bytes(edge, start, data, at, step) // step

    def _append(self, node: Node, edge: bytes, slot: int, numbers: Numbers) -> Node:
        """New blocks behind all of an edge."""
        alone = node.mask == 1 << slot and not node.children and not node.expected
        if node.parent is None or not alone:
            child = self.add(node, edge)
            self._claim(child, slot, numbers)
            return child
        start = node.start + len(node)
        node.edge += edge
        node.blocks[slot] = np.concatenate((node.blocks[slot], numbers))
        self._tables[slot].place(numbers, node.id, start)
        return node

    def _claim(self, node: Node, slot: int, numbers: Numbers) -> None:
        node.blocks[slot] = numbers.copy()
        node.expected.pop(slot, None)  # confirmed
        node.mask |= 1 << slot
        self._tables[slot].place(numbers, node.id, node.start)

    def _replace(self, node: Node, offset: int, slot: int, numbers: Numbers) -> None:
        """Other blocks for tokens that the slot has: they moved."""
        mine = node.blocks[slot]
        here = slice(offset, offset + len(numbers))
        changed = mine[here] != numbers
        if not changed.any():
            return
        table = self._tables[slot]
        table.vacate(mine[here][changed])
        mine[here] = numbers
        start = node.start + offset
        for first, end in _runs(np.flatnonzero(changed)):
            table.place(numbers[first:end], node.id, start + first)

    def _new(self, parent: Node | None, start: int, edge: bytes) -> Node:
        return Node(next(self._ids), parent, start, edge, self)

    def split(self, node: Node, at: int) -> Node:
        """Both nodes have the holders that `node` had."""
        upper = super().split(node, at)
        upper.mask = node.mask
        upper.expected = dict(node.expected)
        for slot, numbers in node.blocks.items():
            head = upper.blocks[slot] = numbers[:at].copy()
            node.blocks[slot] = numbers[at:].copy()
            self._tables[slot].node[head] = upper.id
        return upper

    def merge(self, node: Node) -> Node:
        """The child has the holders of `node`."""
        blocks = node.blocks
        child = super().merge(node)
        for slot, numbers in blocks.items():
            child.blocks[slot] = np.concatenate((numbers, child.blocks[slot]))
            self._tables[slot].node[numbers] = child.id
        return child

    def _tidy_all(self, touched: list[Node]) -> None:
        for node in touched:
            if node.parent is not None:  # still there
                self._tidy(node)

    def _tidy(self, node: Node) -> None:
        """Remove the node if nobody needs it, and join it to its like above and below."""
        while not node.mask and not node.children:
            if node.parent is None:
                return
            node = self.remove(node)
        if node.parent is None:
            return
        if len(node.children) == 1:
            (child,) = node.children.values()
            if node.like(child):
                node = self.merge(node)
        above = node.parent
        if above is None or above.parent is None:
            return
        if len(above.children) == 1 and above.like(node):
            self.merge(above)

    def forget(self, node: Node) -> None:
        """Holders have nothing there any more."""
        super().forget(node)
        node.blocks = {}


def _runs(positions: IndexArray) -> list[tuple[int, int]]:
    """Ascending positions as runs: first, end."""
    if len(positions) < 2:
        return [(first, first + 1) for first in positions.tolist()]
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    firsts = positions[np.concatenate(([0], breaks))]
    lasts = positions[np.concatenate((breaks - 1, [len(positions) - 1]))]
    return [(first, last + 1) for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True)]
