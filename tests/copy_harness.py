"""Pools with known bytes, and what moves them, for the tests of transports."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from memserve import KVLayout, Medium
from memserve.pool.pool import BlockPool
from memserve.transfer.base import BlockList, Completion, Ticket, Transport, WriteList
from memserve.transfer.regions import local_regions, pool_regions
from memserve.types import RefArray

# Far more than any copy of a test takes; a test that waits so long has failed.
DEADLINE = 60.0


def random_kv(layout: KVLayout, blocks: int, seed: int) -> torch.Tensor:
    """KV that differs in every byte position, as [blocks, *block_shape]."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, size=blocks * layout.block_bytes, dtype=np.uint8)
    if layout.dtype == "float32":  # no NaN: they never compare equal
        data = data.view(np.uint32) % (1 << 20)
        return torch.from_numpy(data.astype(np.float32)).view(blocks, *layout.block_shape)
    return torch.from_numpy(data % 100).view(layout.torch_dtype).view(blocks, *layout.block_shape)


def fill(pool: BlockPool, seed: int) -> dict[Medium, RefArray]:
    """Take every block of a pool and write random KV into it."""
    taken = {}
    for medium, stats in zip(Medium, (pool.stats().hbm, pool.stats().dram), strict=True):
        refs = pool.alloc_mem(stats.total, medium)
        if len(refs):
            pool.write(refs, random_kv(pool.layout, len(refs), seed + int(medium)))
        taken[medium] = refs
    return taken


def connect(transport: Transport, pool: BlockPool, other: BlockPool, peer: Transport) -> None:
    """Let `transport` of `pool` write into `other`, which has `peer`."""
    regions = local_regions(other)
    peer.register(regions)
    transport.register(local_regions(pool))
    transport.add_peer(other.owner, pool_regions(other.layout, regions), peer.describe())


def drain(transport: Transport, tickets: Sequence[Ticket]) -> dict[Ticket, Completion]:
    """Poll until every ticket has ended. Fails on one that ends twice, or never."""
    ended: dict[Ticket, Completion] = {}
    deadline = time.monotonic() + DEADLINE
    while len(ended) < len(tickets):
        assert time.monotonic() < deadline, f"{len(tickets) - len(ended)} tickets never ended"
        for completion in transport.poll():
            assert completion.ticket in tickets
            assert completion.ticket not in ended
            ended[completion.ticket] = completion
        time.sleep(transport.poll_interval)
    return ended


def write_list(
    source: RefArray,
    target: RefArray,
    layers: range | None = None,
    heads: range | None = None,
) -> WriteList:
    return WriteList(BlockList.of(source), BlockList.of(target), layers, heads)
