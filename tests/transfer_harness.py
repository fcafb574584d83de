"""Pools that are connected, for tests of transfers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from memserve import KVLayout, MemPool
from memserve.types import RefArray

LAYOUT = KVLayout(
    layers=3, kv_heads=2, head_dim=4, dtype="float32", block_tokens=4, model="transfer-test"
)
LOCAL = "tcp://127.0.0.1:0"
# Much longer than anything takes: a test that gets there has failed.
PATIENCE = 30.0


@contextmanager
def two_pools(blocks: int = 32, **options: object) -> Iterator[tuple[MemPool, MemPool]]:
    """`a` knows `b`. Both are checked at the end: nothing may be left of any transfer."""
    with (
        MemPool(LAYOUT, blocks, 8, instance="a", **options) as a,  # type: ignore[arg-type]
        MemPool(LAYOUT, blocks, 8, instance="b") as b,
    ):
        a.connect("b", b.serve(LOCAL))
        yield a, b
        for pool in (a, b):
            quiet(pool)


def kv_blocks(count: int, seed: int = 0, layout: KVLayout = LAYOUT) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *layout.block_shape, generator=generator)


def filled(pool: MemPool, count: int, seed: int = 0) -> RefArray:
    """Allocated blocks with the bytes of `kv_blocks`."""
    refs = pool.alloc_mem(count)
    pool.write(refs, kv_blocks(count, seed, pool.layout))
    return refs


def tokens_of(count: int) -> list[int]:
    """Tokens of `count` blocks."""
    return list(range(count * LAYOUT.block_tokens))


def eventually(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"never came: {what}"
        time.sleep(0.01)


def quiet(pool: MemPool) -> None:
    """Nothing of a transfer is left, and every block has exactly one owner."""
    eventually(lambda: pool.peer_stats().outgoing == 0, "the end of every transfer")
    eventually(lambda: pool.peer_stats().quarantined == 0, "the end of every quarantine")
    assert pool.quarantined_blocks == 0
    stats = pool.stats()
    assert stats.matches == 0
    assert stats.hbm.pinned == stats.dram.pinned == 0
    pool.check_integrity()
