"""`HolderTree`: a radix tree of tokens whose edges record which instances hold them.

An instance holds all of an edge or nothing of it. Edges are split where holders differ and
merged where they are equal again, so that the tree's size follows the stored blocks. Lookups
compare tokens, never hashes; block names only serve to find a stored block again.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from memserve.radix import RadixNode, RadixNodes, RadixTree, common_bytes
from memserve.scheduler.block_table import BlockTable, Numbers
from memserve.types import IndexArray, Namespace


class Node(RadixNode):
    """An edge and its holders."""

    __slots__ = ("blocks", "expected", "hits", "mask", "tree", "used")

    def __init__(self, id: int, parent: Node | None, start: int, edge: bytes, tree: HolderTree):
        super().__init__(id, parent, start, edge)
        self.tree = tree
        self.blocks: dict[int, Numbers] = {}  # by holder's slot: block numbers [blocks of edge]
        self.expected: dict[int, float] = {}  # by slot: deadline of an expectation
        self.mask = 0  # holders: bits of the slots in `blocks` and `expected`
        self.hits = 0  # routed prompts (`expect`) that contain the edge, after the first one
        self.used = 0.0  # time of the last `expect` of the edge

    def __len__(self) -> int:
        """Number of blocks of the edge."""
        return len(self.edge) // self.tree.block_bytes

    def like(self, other: Node) -> bool:
        """Return whether both nodes have equal holders, so that their edges can be merged."""
        if self.mask != other.mask or self.expected != other.expected:
            return False
        return self.blocks.keys() == other.blocks.keys()

    def check(self) -> None:
        """Raise AssertionError if an invariant of the node does not hold."""
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
        """Whether the tree has any node below its root."""
        return bool(self.root.children)

    def walk(self, data: bytes, alive: int) -> list[tuple[int, int]]:
        """Return the ends of the prefixes of `data` that holders in the mask `alive` have: (mask of
        holders, bytes) by ascending bytes.

        A holder's prefix ends at its first missing block, even if it holds later ones.
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
        """Return those of `numbers` that are stored, but not where `store` would put them."""
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
        """Record that `slot` holds blocks `numbers` [n] for the n blocks of `data`, which follow
        block `depth` - 1, in node `at`. Each number must be stored there already, or nowhere."""
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
            if not count:  # `data` leaves the edge after a block that `slot` holds
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
        """Record that `slot` no longer holds the blocks at `positions` (ascending) of the edge."""
        gone = []
        for first, end in reversed(_runs(positions)):
            piece = node
            if end < len(node):
                node = self.split(node, end)
                piece = node
            if first:
                node = self.split(node, first)  # `piece` is the lower part
            gone.append(piece)
        touched = []
        for piece in gone:
            touched += [piece, *piece.children.values()]
            numbers = piece.blocks.pop(slot)
            piece.expected.pop(slot, None)
            piece.mask &= ~(1 << slot)
            self._tables[slot].vacate(numbers)
        self._tidy_all(touched)

    def expect(self, data: bytes, slot: int, now: float, deadline: float) -> bool:
        """Count `slot` as a holder of all of `data` until `deadline`. Returns False if `slot`
        stores all of `data` already. Calls with equal `now` are of one prompt: they count one
        hit."""
        touched: list[Node] = []
        node, at, end, step = self.root, 0, len(data), self.block_bytes
        while at < end:
            child = node.children.get(data[at : at + step])
            if child is None:
                child = self.add(node, data[at:])
                child.used = now
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
            if common < size and at < end:  # `data` leaves an edge that `slot` holds
                child = self.split(child, common // step)
                touched.append(child)
            if child.used < now:
                child.hits += 1
                child.used = now
            node = child
        self._tidy_all(touched)
        return bool(touched)

    def give_up(self, data: bytes, slot: int, now: float) -> None:
        """Remove the expectations of `slot` along `data` whose deadline is `now` or earlier."""
        touched = []
        for node, _, _, _ in self._along(self.root, 0, data):
            if slot in node.expected and node.expected[slot] <= now:
                del node.expected[slot]
                node.mask &= ~(1 << slot)
                touched.append(node)
        self._tidy_all(touched)

    def subtree(self) -> Iterator[Node]:
        """Yield all nodes except the root, parents before their children."""
        nodes = self.root.subtree()
        next(nodes)
        return nodes

    # --- internal -------------------------------------------------------------------------

    def _along(self, at: Node, depth: int, data: bytes) -> Iterator[tuple[Node, int, int, int]]:
        """Yield the parts of edges that equal `data`, from block `depth` on, which is in or after
        node `at`: (node, offset in its edge, blocks of `data` before it, common blocks)."""
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
        """Return the number of common leading blocks of the edge from block `offset` on, and of
        `data` from block `done` on."""
        edge, step = node.edge, self.block_bytes
        start, at = offset * step, done * step
        if data.startswith(edge[start:], at):  # the usual case, one memcmp
            return len(node) - offset
        return common_bytes(edge, start, data, at, step) // step

    def _append(self, node: Node, edge: bytes, slot: int, numbers: Numbers) -> Node:
        """Add blocks after the end of a node's edge: in the edge itself if `slot` is the only
        holder of a leaf, else in a new child. Returns the node that has them."""
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
        node.expected.pop(slot, None)  # the expectation came true
        node.mask |= 1 << slot
        self._tables[slot].place(numbers, node.id, node.start)

    def _replace(self, node: Node, offset: int, slot: int, numbers: Numbers) -> None:
        """Replace block numbers of tokens that `slot` holds, whose KV is in other blocks now."""
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
        """As `RadixTree.split`; both parts get the holders of `node`."""
        upper = super().split(node, at)
        upper.mask = node.mask
        upper.expected = dict(node.expected)
        upper.hits, upper.used = node.hits, node.used
        for slot, numbers in node.blocks.items():
            head = upper.blocks[slot] = numbers[:at].copy()
            node.blocks[slot] = numbers[at:].copy()
            self._tables[slot].node[head] = upper.id
        return upper

    def merge(self, node: Node) -> Node:
        """As `RadixTree.merge`; concatenates the holders' block numbers. Keeps the child's hits:
        only they contain the whole edge."""
        blocks, used = node.blocks, node.used
        child = super().merge(node)
        child.used = max(child.used, used)
        for slot, numbers in blocks.items():
            child.blocks[slot] = np.concatenate((numbers, child.blocks[slot]))
            self._tables[slot].node[numbers] = child.id
        return child

    def _tidy_all(self, touched: list[Node]) -> None:
        for node in touched:
            if node.parent is not None:  # not removed yet
                self._tidy(node)

    def _tidy(self, node: Node) -> None:
        """Remove the node, and ancestors, while without holders and children; then merge it with
        an only child, and with a parent whose only child it is, if the holders are equal."""
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
        """As `RadixTree.forget`; drops the block numbers too."""
        super().forget(node)
        node.blocks = {}


def _runs(positions: IndexArray) -> list[tuple[int, int]]:
    """Return the runs of ascending positions: (first, last + 1)."""
    if len(positions) < 2:
        return [(first, first + 1) for first in positions.tolist()]
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    firsts = positions[np.concatenate(([0], breaks))]
    lasts = positions[np.concatenate((breaks - 1, [len(positions) - 1]))]
    return [(first, last + 1) for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True)]
