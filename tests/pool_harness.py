"""Small pools, and KV that can be told apart."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch

from memserve import KVLayout, Medium
from memserve.pool.pool import BlockPool
from memserve.types import RefArray

BLOCK = 4  # tokens
LAYOUT = KVLayout(2, 1, 3, "float32", BLOCK)
Key = tuple[str, tuple[int, ...]]  # namespace, all tokens up to the end of a block


def keys_of(namespace: str, tokens: Sequence[int], block: int = BLOCK) -> list[Key]:
    ends = range(block, len(tokens) + 1, block)
    return [(namespace, tuple(tokens[:end])) for end in ends]


def kv_of(keys: Sequence[Key], layout: KVLayout = LAYOUT) -> torch.Tensor:
    """KV that depends on the namespace and on every token up to the end of a block."""
    blocks = [
        np.random.default_rng(zlib.crc32(repr(key).encode())).standard_normal(layout.block_shape)
        for key in keys
    ]
    array = np.array(blocks, dtype=np.float32).reshape(len(keys), *layout.block_shape)
    return torch.from_numpy(array)


def prompt(*blocks: int) -> list[int]:
    """Tokens whose blocks are told apart by one number each."""
    return [block * BLOCK + offset for block in blocks for offset in range(BLOCK)]


def store(
    pool: BlockPool, tokens: Sequence[int], namespace: str = "", medium: Medium = Medium.HBM
) -> RefArray:
    """Allocate, write and insert a whole prompt; returns the blocks the index took."""
    keys = keys_of(namespace, tokens)
    refs = pool.alloc_mem(len(keys), medium)
    pool.write(refs, kv_of(keys))
    result = pool.insert(tokens, refs, namespace)
    pool.free_mem(result.duplicate)
    return result.new


def cached_blocks(pool: BlockPool, tokens: Sequence[int], namespace: str = "") -> int:
    """How long the cached prefix is, in blocks; does count as a use."""
    with pool.match(tokens, namespace) as match:
        keys = keys_of(namespace, tokens)[: len(match.refs)]
        assert torch.equal(pool.read(match.refs).cpu(), kv_of(keys))
        return len(match.refs)


class TickingClock:
    """Every look at it is a second later: recency is never a tie."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        self._now += 1.0
        return self._now
