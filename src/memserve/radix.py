"""A radix tree of tokens: the base of a pool's index and of a gateway's prompt trees.

An edge is a run of whole blocks of int32 tokens, stored as bytes; a node's children are keyed by
the bytes of their first block. Lookups compare the tokens themselves, one memcmp per edge, so no
hash collision can lead to another prompt's KV. A subclass of `RadixNode` adds the data of an
edge's blocks, and a subclass of `RadixTree` moves that data when edges are split and merged.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from hashlib import blake2b
from typing import Generic, Self, TypeVar

import numpy as np

from memserve.tokens import TOKEN_BYTES


class RadixNode:
    """An edge and the nodes below it."""

    __slots__ = ("children", "edge", "id", "parent", "start")

    def __init__(self, id: int, parent: Self | None, start: int, edge: bytes) -> None:
        self.id = id
        self.parent = parent  # None: a root, or no longer in the tree
        self.start = start  # number of blocks between the root and this edge
        self.edge = edge
        self.children: dict[bytes, Self] = {}

    def subtree(self) -> Iterator[Self]:
        """Yield this node and all nodes below, parents before their children."""
        stack = [self]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())


N = TypeVar("N", bound=RadixNode)


class RadixNodes(Generic[N]):
    """The nodes of one or several trees by id, without roots, and the counter of ids."""

    def __init__(self) -> None:
        self.ids = itertools.count(1)
        self.by_id: dict[int, N] = {}


class RadixTree(Generic[N]):
    """Lookup and changes of shape, for trees of one block size.

    The caller decides when edges are split and merged, and owns the data stored with them.
    """

    def __init__(self, nodes: RadixNodes[N], block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.block_bytes = TOKEN_BYTES * block_tokens
        self.nodes = nodes.by_id
        self._ids = nodes.ids

    def _new(self, parent: N | None, start: int, edge: bytes) -> N:
        """Return a node with a unique id and no data for its edge."""
        raise NotImplementedError

    def follow(self, root: N, data: bytes) -> tuple[list[N], int]:
        """Return the nodes that share blocks with `data`, from below the root on, and the length
        of the stored prefix: bytes of whole blocks."""
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
        """Add and return a child of `parent`, which must have none for `edge`'s first block."""
        step = self.block_bytes
        child = self._new(parent, parent.start + len(parent.edge) // step, edge)
        parent.children[edge[:step]] = child
        self.nodes[child.id] = child
        return child

    def split(self, node: N, at: int) -> N:
        """Split the edge of `node` before its block `at`, 0 < at < its blocks; return a new node
        for the upper part. `node` is the lower part, with its id and its children."""
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
        """Merge `node` into its only child and return the child, with its id and its children.
        `node` leaves the tree."""
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
        """Remove `node`, which has no children, from the tree; return its parent."""
        parent = node.parent
        assert parent is not None
        del parent.children[node.edge[: self.block_bytes]]
        self.forget(node)
        return parent

    def forget(self, node: N) -> None:
        """Clear a node that left the tree: queues and tables may still refer to it, and must not
        keep its data alive."""
        del self.nodes[node.id]
        node.parent = None
        node.edge = b""
        node.children = {}


def common_bytes(edge: bytes, offset: int, data: bytes, at: int, step: int) -> int:
    """Return the length of the common prefix of edge[offset:] and data[at:]: bytes, rounded down
    to whole blocks of `step` bytes."""
    count = min(len(edge) - offset, len(data) - at) // TOKEN_BYTES
    if count <= 0:
        return 0
    ours = np.frombuffer(edge, np.int32, count, offset)
    differ = ours != np.frombuffer(data, np.int32, count, at)
    first = int(differ.argmax())
    common = TOKEN_BYTES * (first if differ[first] else count)
    return common - common % step


def block_digests(data: bytes, step: int, before: bytes = b"") -> list[bytes]:
    """Digests of the blocks of `data`, `step` bytes each. A digest covers the block and all
    blocks before it; `before`: the digest of the block in front of `data`, if any."""
    chain = []
    for at in range(0, len(data) - step + 1, step):
        before = blake2b(before + data[at : at + step], digest_size=16).digest()
        chain.append(before)
    return chain
