"""A radix tree of tokens: what the index of a pool and the trees of a gateway have in common.

An edge is a run of whole blocks of int32 tokens, kept as their bytes; children are keyed by the
bytes of their first block. Lookups compare the tokens themselves, whole edges with one memcmp
each, so no hash collision can name another prompt's KV. A subclass of `RadixNode` says what is
stored with the blocks of an edge, and a subclass of `RadixTree` moves that when edges are cut
and joined.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Generic, Self, TypeVar

import numpy as np

TOKEN_BYTES = 4


class RadixNode:
    """An edge and the nodes below it."""

    __slots__ = ("children", "edge", "id", "parent", "start")

    def __init__(self, id: int, parent: Self | None, start: int, edge: bytes) -> None:
        self.id = id
        self.parent = parent  # None: a root, or no longer in the tree
        self.start = start  # blocks from the root to this edge
        self.edge = edge
        self.children: dict[bytes, Self] = {}

    def subtree(self) -> Iterator[Self]:
        """This node and all below, parents before their children."""
        stack = [self]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())


N = TypeVar("N", bound=RadixNode)


class RadixNodes(Generic[N]):
    """The nodes of one or several trees by id, without roots."""

    def __init__(self) -> None:
        self.ids = itertools.count(1)
        self.by_id: dict[int, N] = {}


class RadixTree(Generic[N]):
    """Trees of one block size, and what changes their shape.

    The callers decide when edges are cut and joined, and own what is stored with them.
    """

    def __init__(self, nodes: RadixNodes[N], block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.block_bytes = TOKEN_BYTES * block_tokens
        self.nodes = nodes.by_id
        self._ids = nodes.ids

    def _new(self, parent: N | None, start: int, edge: bytes) -> N:
        """A node with an id of its own, and nothing stored with its edge."""
        raise NotImplementedError

    def follow(self, root: N, data: bytes) -> tuple[list[N], int]:
        """The nodes along `data`, from below the root to the last with a block in common, and the
        length of the stored prefix: bytes of whole blocks."""
        nodes: list[N] = []
        children, step = root.children, self.block_bytes
        last, at = len(data) - step, 0
        while at <= last:
            node = children.get(data[at : at + step])
            if node is None:
                break
            nodes.append(node)
            edge = node.edge
            if not data.startswith(edge, at):
                return nodes, at + common_bytes(edge, 0, data, at, step)
            at += len(edge)
            children = node.children
        return nodes, at

    def add(self, parent: N, edge: bytes) -> N:
        """A new child of `parent`, which has none for the first block of `edge`."""
        step = self.block_bytes
        child = self._new(parent, parent.start + len(parent.edge) // step, edge)
        parent.children[edge[:step]] = child
        self.nodes[child.id] = child
        return child

    def split(self, node: N, at: int) -> N:
        """Cut the edge of `node` before its block `at`, inside the edge; returns the new node of
        the upper part. The lower part keeps its id and its children."""
        parent, step = node.parent, self.block_bytes
        assert parent is not None
        upper = self._new(parent, node.start, node.edge[: at * step])
        parent.children[upper.edge[:step]] = upper
        node.parent = upper
        node.start += at
        node.edge = node.edge[at * step :]
        upper.children[node.edge[:step]] = node
        self.nodes[upper.id] = upper
        return upper

    def merge(self, node: N) -> N:
        """Join `node` to its only child, which is returned: it keeps its id and its children.
        `node` is no longer in the tree."""
        parent = node.parent
        assert parent is not None
        (child,) = node.children.values()
        child.edge = node.edge + child.edge
        child.start = node.start
        child.parent = parent
        parent.children[child.edge[: self.block_bytes]] = child
        self.forget(node)
        return child

    def remove(self, node: N) -> N:
        """Take `node`, which has no children, out of its parent, which is returned."""
        parent = node.parent
        assert parent is not None
        del parent.children[node.edge[: self.block_bytes]]
        self.forget(node)
        return parent

    def forget(self, node: N) -> None:
        """Let go of a node that the tree no longer reaches. Others may still name it: it must
        hold no memory."""
        del self.nodes[node.id]
        node.parent = None
        node.edge = b""
        node.children = {}


def common_bytes(edge: bytes, offset: int, data: bytes, at: int, step: int) -> int:
    """Length of what edge[offset:] and data[at:] have in common from their start, in bytes, of
    whole blocks of `step` bytes."""
    count = min(len(edge) - offset, len(data) - at) // TOKEN_BYTES
    if count <= 0:
        return 0
    ours = np.frombuffer(edge, np.int32, count, offset)
    differ = ours != np.frombuffer(data, np.int32, count, at)
    first = int(differ.argmax())
    common = TOKEN_BYTES * (first if differ[first] else count)
    return common - common % step
