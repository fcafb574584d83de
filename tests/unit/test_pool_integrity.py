"""check_integrity finds each way in which the book-keeping can go wrong."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from memserve import Medium
from memserve.errors import IntegrityError
from memserve.pool.index import Node
from memserve.pool.pool import BlockPool
from tests.pool_harness import LAYOUT, prompt, store


def first_node(pool: BlockPool) -> Node:
    return next(iter(pool._index.nodes.values()))


def lose_a_block(pool: BlockPool) -> None:
    pool._blocks.hbm.take(1)
    pool._blocks.hbm.active -= 1
    pool._blocks.hbm.free += 1


def lose_a_cached_block(pool: BlockPool) -> None:
    node = first_node(pool)
    pool._index.cut(node, len(node.refs) - 1)


def share_a_block(pool: BlockPool) -> None:
    for node in pool._index.nodes.values():
        node.refs[-1] = first_node(pool).refs[0]


def keep_a_stale_reference(pool: BlockPool) -> None:
    first_node(pool).refs[0] += 1


def forget_a_pin(pool: BlockPool) -> None:
    pool._matches.clear()


def miscount_pins(pool: BlockPool) -> None:
    pool._blocks.hbm.pinned += 1


def miscount_free(pool: BlockPool) -> None:
    pool._blocks.hbm.free -= 1


def list_a_used_block_as_free(pool: BlockPool) -> None:
    pool._blocks.hbm.free_list()[-1] = 0


def miscount_media(pool: BlockPool) -> None:
    first_node(pool).own[Medium.DRAM] += 1


def forget_a_candidate(pool: BlockPool) -> None:
    for node in pool._index.nodes.values():
        node.queued = [0, 0, 0]


def shorten_an_edge(pool: BlockPool) -> None:
    node = first_node(pool)
    node.edge = node.edge[:-1]


def lose_a_node(pool: BlockPool) -> None:
    pool._index.nodes.popitem()


def misplace_a_child(pool: BlockPool) -> None:
    root = pool._index.roots[""]
    root.children[b"other"] = root.children.pop(next(iter(root.children)))


def shift_a_node(pool: BlockPool) -> None:
    first_node(pool).start += 1


def misnote_a_home(pool: BlockPool) -> None:
    pool._blocks.hbm.node[0] += 1


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lose_a_block, "HBM: .* blocks are free"),
        (lose_a_cached_block, r"HBM block \d is cached and not in the index"),
        (share_a_block, "in the index twice"),
        (keep_a_stale_reference, "reference to HBM block 0 is stale"),
        (forget_a_pin, "HBM block 0 has 1 pins, 0 open matches"),
        (miscount_pins, "1 cached blocks are pinned, 2 counted"),
        (miscount_free, "2 blocks are free, 1 counted"),
        (list_a_used_block_as_free, "the free list is not the free blocks"),
        (miscount_media, "DRAM counts 0, 0; recounted 0, 1"),
        (forget_a_candidate, r"is evictable \(HBM\), not queued"),
        (shorten_an_edge, "bytes of tokens"),
        (lose_a_node, "reachable from roots"),
        (misplace_a_child, "has another parent or key"),
        (shift_a_node, "starts at block 1"),
        (misnote_a_home, "HBM block 0 is in node"),
    ],
)
def test_what_disagrees_is_named(break_it: Callable[[BlockPool], None], message: str) -> None:
    with BlockPool(LAYOUT, 8, 2) as pool:
        store(pool, prompt(1, 2, 3))
        store(pool, prompt(4, 5))
        pool.alloc_mem(1)
        match = pool.match(prompt(1))
        pool.check_integrity()
        break_it(pool)
        with pytest.raises(IntegrityError, match=message):
            pool.check_integrity()
        del match


def test_an_orphan_without_a_reader_is_found() -> None:
    with BlockPool(LAYOUT, 8, 2) as pool:
        refs = pool.alloc_mem(1)
        blocks = pool._blocks.hbm
        blocks.state[pool.hbm_indices(refs)] = 3
        blocks.active, blocks.detached = 0, 1
        with pytest.raises(IntegrityError, match="detached without a reader"):
            pool.check_integrity()
        assert np.count_nonzero(blocks.state) == 1
