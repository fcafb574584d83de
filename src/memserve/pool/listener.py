"""The interface for listeners to changes of the index.

The index calls its listener under the pool's lock, so a listener only stores the arguments for
later. Arrays and bytes are shared with the index, which never changes them in place. Without a
listener the index computes no runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from memserve.types import IndexArray, RefArray

if TYPE_CHECKING:
    from memserve.pool.index import Node


class StoredRun(NamedTuple):
    """Consecutive cached blocks of one prompt."""

    namespace: str
    parent: int | None  # reference to the block before the run; None: the run begins a prompt
    refs: RefArray  # [n]
    data: bytes  # int32 tokens [n * block_tokens]


class IndexListener(Protocol):
    """Receives the changes of the index in their order, under the pool's lock."""

    def stored(self, run: StoredRun) -> None:
        """Blocks entered the index."""

    def removed(self, namespace: str, refs: RefArray) -> None:
        """Blocks `refs` [n] left the index."""

    def moved(self, run: StoredRun, old: RefArray) -> None:
        """Blocks `run.refs` [n] replaced blocks `old` [n] for the same tokens."""


def stored_runs(roots: Mapping[str, Node]) -> Iterator[StoredRun]:
    """Yield one run for each edge below the roots, parents before their children."""
    for namespace, root in roots.items():
        for node in root.subtree():
            if node.parent is not None:
                yield StoredRun(namespace, _parent(node, 0), node.refs, node.edge)


def moved_runs(
    namespace: str, node: Node, positions: IndexArray, block_bytes: int
) -> Iterator[tuple[StoredRun, IndexArray]]:
    """Yield the present blocks at these positions of an edge as consecutive runs, ascending.

    Each run comes with the indices into `positions` [n] of its blocks.
    """
    order = np.argsort(positions, kind="stable")
    ascending = positions[order]
    breaks = (np.flatnonzero(np.diff(ascending) != 1) + 1).tolist()
    for begin, end in zip([0, *breaks], [*breaks, len(ascending)], strict=True):
        first, last = int(ascending[begin]), int(ascending[end - 1]) + 1
        data = node.edge[first * block_bytes : last * block_bytes]
        run = StoredRun(namespace, _parent(node, first), node.refs[first:last], data)
        yield run, order[begin:end]


def _parent(node: Node, position: int) -> int | None:
    """Return the reference to the block before this position of the edge; None at a root."""
    if position:
        return int(node.refs[position - 1])
    above = node.parent
    if above is None or above.parent is None:
        return None
    return int(above.refs[-1])
