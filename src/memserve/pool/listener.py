"""What the index tells whoever wants to know what it holds.

The index calls under the pool's lock, so a listener only notes what it is told: arrays and bytes
are shared with the index, which never changes them. Where there is no listener nothing is
computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from memserve.types import IndexArray, RefArray

if TYPE_CHECKING:
    from memserve.pool.index import Node


class StoredRun(NamedTuple):
    """Consecutive historical blocks of one prompt."""

    namespace: str
    parent: int | None  # the block before the first; None: they begin a prompt
    refs: RefArray  # [n]
    data: bytes  # their int32 tokens


class IndexListener(Protocol):
    """Called in the order of the changes, under the pool's lock."""

    def stored(self, run: StoredRun) -> None:
        """Blocks entered the index."""

    def removed(self, namespace: str, refs: RefArray) -> None:
        """Blocks left it."""

    def moved(self, run: StoredRun, old: RefArray) -> None:
        """Tokens that are in the index have other blocks now, instead of `old` [n]."""


def stored_runs(roots: Mapping[str, Node]) -> Iterator[StoredRun]:
    """All of an index, parents before their children."""
    for namespace, root in roots.items():
        for node in root.subtree():
            if node.parent is not None:
                yield StoredRun(namespace, _parent(node, 0), node.refs, node.edge)


def moved_runs(
    namespace: str, node: Node, positions: IndexArray, block_bytes: int
) -> Iterator[tuple[StoredRun, IndexArray]]:
    """The blocks that are at these positions of an edge now, as runs, ascending, each with its
    part of `positions`."""
    order = np.argsort(positions, kind="stable")
    ascending = positions[order]
    breaks = (np.flatnonzero(np.diff(ascending) != 1) + 1).tolist()
    for begin, end in zip([0, *breaks], [*breaks, len(ascending)], strict=True):
        first, last = int(ascending[begin]), int(ascending[end - 1]) + 1
        data = node.edge[first * block_bytes : last * block_bytes]
        run = StoredRun(namespace, _parent(node, first), node.refs[first:last], data)
        yield run, order[begin:end]


def _parent(node: Node, position: int) -> int | None:
    """The block before one of an edge."""
    if position:
        return int(node.refs[position - 1])
    above = node.parent
    if above is None or above.parent is None:
        return None
    return int(above.refs[-1])
