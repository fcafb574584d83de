"""Which blocks must be pinned so that some of the index's can be read."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from memserve.pool.allocator import ACTIVE, CACHED
from memserve.pool.blocks import Blocks
from memserve.pool.index import Node, RadixIndex
from memserve.types import Medium, RefArray, ref_index, ref_medium


def with_prefixes(
    blocks: Blocks, index: RadixIndex, refs: RefArray, state: NDArray[np.uint8]
) -> RefArray:
    """The cached and detached ones of live `refs` [n], and the cached blocks before them:
    pins cover whole prefixes. Each once; callers hold the pool's lock."""
    cached = np.unique(refs[state == CACHED])
    detached = np.unique(refs[(state != CACHED) & (state != ACTIVE)])
    needed: dict[Node, int] = {}  # blocks of the node's edge
    homes = {
        home
        for part, _, at in blocks.by_medium(cached)
        for home in np.unique(part.node[at]).tolist()
    }
    for home in homes:
        node: Node | None = index.nodes[home]
        assert node is not None
        last = int(np.flatnonzero(np.isin(node.refs, cached))[-1]) + 1
        needed[node] = max(last, needed.get(node, 0))
        node = node.parent
        while node is not None and needed.get(node) != len(node.refs):
            needed[node] = len(node.refs)
            node = node.parent
    return np.concatenate([*(node.refs[:last] for node, last in needed.items()), detached])


def still_active(blocks: Blocks, refs: RefArray) -> NDArray[np.bool_]:
    """Which of `refs` [n] are blocks of the pool, and what they were when they were allocated."""
    active = np.zeros(len(refs), dtype=np.bool_)
    for medium in Medium:
        where = np.flatnonzero(ref_medium(refs) == medium)
        at = ref_index(refs[where])
        part = blocks[medium]
        known = at < len(part.ref)
        where, at = where[known], at[known]
        active[where] = (part.ref[at] == refs[where]) & (part.state[at] == ACTIVE)
    return active
