"""A radix tree of tokens whose edges know which instances hold them.

An edge is a run of whole blocks, kept as the tokens' bytes; children are keyed by the bytes of
their first block. Each instance holds all of an edge or nothing of it: edges are cut where
holders change, and joined again where they no longer differ, so that memory follows what is
stored. Lookups always compare the tokens: what instances call their blocks only serves to find
them again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from memserve.scheduler.block_table import BlockTable, Numbers
from memserve.types import IndexArray, Namespace


class Node:
    """An edge and what hangs below it."""

    __slots__ = (
        "blocks",
        "children",
        "edge",
        "expected",
        "id",
        "mask",
        "parent",
        "start",
        "tree",
    )

    def __init__(self, id: int, tree: HolderTree, parent: Node | None, start: int, edge: bytes):
        self.id = id
        self.tree = tree
        self.parent = parent  # None: a root, or no longer in the tree
        self.start = start  # blocks from the root to this edge
        self.edge = edge
        self.children: dict[bytes, Node] = {}
        self.blocks: dict[int, Numbers] = {}  # by holder's slot: its blocks [blocks of the edge]
        self.expected: dict[int, float] = {}  # by slot: until when it counts as held
        self.mask = 0  # bits of the slots in `blocks` and `expected`: who counts as a holder

    def __len__(self) -> int:
        """Blocks of the edge."""
        return len(self.edge) // self.tree.step

    def like(self, other: Node) -> bool:
        """Whether the two could be one edge."""
        if self.mask != other.mask or self.expected != other.expected:
            return False
        return self.blocks.keys() == other.blocks.keys()

    def check(self) -> None:
        """Raises AssertionError for a node that should not be as it is."""
        parent = self.parent
        assert parent is not None
        assert parent.children[self.edge[: self.tree.step]] is self
        assert self.start == parent.start + len(parent)
        assert len(self) * self.tree.step == len(self.edge) > 0
        assert self.mask or self.children
        slots = {*self.blocks, *self.expected}
        assert self.mask == sum(1 << slot for slot in slots)
        assert len(slots) == len(self.blocks) + len(self.expected)
        assert all(len(numbers) == len(self) for numbers in self.blocks.values())
        if len(self.children) == 1:
            assert not self.like(next(iter(self.children.values())))


class Trunk:
    """What all trees share: nodes by id, and the holders' tables by slot."""

    def __init__(self) -> None:
        self.ids = itertools.count(1)
        self.nodes: dict[int, Node] = {}  # without roots
        self.tables: dict[int, BlockTable] = {}


class HolderTree:
    """The tree of one namespace and block size."""

    def __init__(self, trunk: Trunk, namespace: Namespace, block_tokens: int) -> None:
        self.namespace = namespace
        self.step = 4 * block_tokens  # bytes
        self._trunk = trunk
        self._tables = trunk.tables
        self.root = Node(next(trunk.ids), self, None, 0, b"")

    def __bool__(self) -> bool:
        """Whether anything is stored."""
        return bool(self.root.children)

    def walk(self, data: bytes, alive: int) -> list[tuple[int, int]]:
        """Where holders among `alive` end along `data`: their mask, and bytes, ascending.

        A holder that lacks a block on the way ends there, whatever it has behind.
        """
        ends: list[tuple[int, int]] = []
        node, step = self.root, self.step
        last, at = len(data) - step, 0
        while at <= last:
            child = node.children.get(data[at : at + step])
            if child is None:
                break
            left = alive & child.mask
            if left != alive:
                if at:
                    ends.append((alive & ~left, at))
                alive = left
                if not alive:
                    return ends
            if not data.startswith(child.edge, at):
                at += _common_blocks(child.edge, 0, data, at, step) * step
                break
            at += len(child.edge)
            node = child
        if at:
            ends.append((alive, at))
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
        node, offset, done, total = at, depth - at.start, 0, len(numbers)
        while done < total:
            if offset == len(node):
                child = node.children.get(data[done * self.step : (done + 1) * self.step])
                if child is None:
                    rest = data[done * self.step :]
                    touched.append(self._append(node, rest, slot, numbers[done:]))
                    break
                node, offset = child, 0
                continue
            count = _common_blocks(node.edge, offset, data, done * self.step, self.step)
            if not count:  # only behind a block that the slot holds: at the start, or at `at`
                node = self._split(node, offset)
                continue
            if slot in node.blocks:
                self._replace(node, offset, slot, numbers[done : done + count])
            else:
                if count < len(node):
                    touched.append(node)
                    node = self._split(node, count)
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
                node = self._split(node, end)
                piece = node
            if first:
                node = self._split(node, first)  # `piece` keeps its end
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
        node, at, end, step = self.root, 0, len(data), self.step
        while at < end:
            child = node.children.get(data[at : at + step])
            if child is None:
                child = self._add(node, data[at:])
            size = common = len(child.edge)
            if not data.startswith(child.edge, at):
                common = _common_blocks(child.edge, 0, data, at, step) * step
            at += common
            if slot not in child.blocks:
                if common < size:
                    touched.append(child)
                    child = self._split(child, common // step)
                    size = common
                child.expected[slot] = max(deadline, child.expected.get(slot, deadline))
                child.mask |= 1 << slot
                touched.append(child)
            if common < size and at < end:  # held so far, and parts from there
                child = self._split(child, common // step)
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
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    # --- inside ---------------------------------------------------------------------------

    def _along(self, at: Node, depth: int, data: bytes) -> Iterator[tuple[Node, int, int, int]]:
        """The part of the tree that `data` follows behind `depth`: node, offset in its edge,
        blocks of `data` before it, common blocks."""
        node, offset, done = at, depth - at.start, 0
        total = len(data) // self.step
        while done < total:
            if offset == len(node):
                child = node.children.get(data[done * self.step : (done + 1) * self.step])
                if child is None:
                    return
                node, offset = child, 0
            count = _common_blocks(node.edge, offset, data, done * self.step, self.step)
            if not count:
                return
            yield node, offset, done, count
            offset += count
            done += count
            if offset < len(node):
                return

    def _append(self, node: Node, edge: bytes, slot: int, numbers: Numbers) -> Node:
        """New blocks behind all of an edge."""
        alone = node.mask == 1 << slot and not node.children and not node.expected
        if node.parent is None or not alone:
            child = self._add(node, edge)
            self._claim(child, slot, numbers)
            return child
        start = node.start + len(node)
        node.edge += edge
        node.blocks[slot] = np.concatenate((node.blocks[slot], numbers))
        self._tables[slot].place(numbers, node.id, start)
        return node

    def _add(self, node: Node, edge: bytes) -> Node:
        child = Node(next(self._trunk.ids), self, node, node.start + len(node), edge)
        node.children[edge[: self.step]] = child
        self._trunk.nodes[child.id] = child
        return child

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

    def _split(self, node: Node, at: int) -> Node:
        """Cut an edge in two; returns the new upper node."""
        assert node.parent is not None
        step = self.step
        upper = Node(next(self._trunk.ids), self, node.parent, node.start, node.edge[: at * step])
        upper.mask = node.mask
        upper.expected = dict(node.expected)
        node.parent.children[upper.edge[:step]] = upper
        node.parent = upper
        node.start += at
        node.edge = node.edge[at * step :]
        upper.children[node.edge[:step]] = node
        self._trunk.nodes[upper.id] = upper
        for slot, numbers in node.blocks.items():
            head = upper.blocks[slot] = numbers[:at].copy()
            node.blocks[slot] = numbers[at:].copy()
            self._tables[slot].node[head] = upper.id
        return upper

    def _merge(self, node: Node, child: Node) -> None:
        """Absorb a node into its only child."""
        assert node.parent is not None
        child.edge = node.edge + child.edge
        child.start = node.start
        child.parent = node.parent
        node.parent.children[child.edge[: self.step]] = child
        for slot, numbers in node.blocks.items():
            child.blocks[slot] = np.concatenate((numbers, child.blocks[slot]))
            self._tables[slot].node[numbers] = child.id
        self._forget(node)

    def _tidy_all(self, touched: list[Node]) -> None:
        for node in touched:
            if node.parent is not None:  # still there
                self._tidy(node)

    def _tidy(self, node: Node) -> None:
        """Remove the node if nobody needs it, and join it to its like above and below."""
        while not node.mask and not node.children:
            parent = node.parent
            if parent is None:
                return
            del parent.children[node.edge[: self.step]]
            self._forget(node)
            node = parent
        if node.parent is None:
            return
        if len(node.children) == 1:
            (child,) = node.children.values()
            if node.like(child):
                self._merge(node, child)
                node = child
        above = node.parent
        if above is None or above.parent is None:
            return
        if len(above.children) == 1 and above.like(node):
            self._merge(above, node)

    def _forget(self, node: Node) -> None:
        del self._trunk.nodes[node.id]
        node.parent = None
        node.children = {}
        node.blocks = {}


def _common_blocks(edge: bytes, offset: int, data: bytes, at: int, step: int) -> int:
    """Whole blocks that an edge from block `offset` on and data[at:] have in common."""
    start = offset * step
    common, most = 0, min(len(edge) - start, len(data) - at) // step
    # All of them, as a rule; else by halves.
    middle = most
    while common < most:
        first = common * step
        if data.startswith(edge[start + first : start + middle * step], at + first):
            common = middle
        else:
            most = middle - 1
        middle = (common + most + 1) // 2
    return common


def _runs(positions: IndexArray) -> list[tuple[int, int]]:
    """Ascending positions as runs: first, end."""
    if len(positions) < 2:
        return [(first, first + 1) for first in positions.tolist()]
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    firsts = positions[np.concatenate(([0], breaks))]
    lasts = positions[np.concatenate((breaks - 1, [len(positions) - 1]))]
    return [(first, last + 1) for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True)]
