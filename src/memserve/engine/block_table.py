"""The KV blocks of one running sequence: a cached prefix and a tail of active blocks.

The index owns the prefix, which a `Match` pins; the sequence owns the tail. A block moves from
tail to prefix as soon as it is full and computed, so other sequences share it while this one
still runs. Preemption is a `release`: the prefix stays cached (swapped to DRAM when HBM is needed,
dropped when DRAM is full), and only KV in blocks that are not full is lost.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from memserve.errors import OutOfBlocks
from memserve.pool.pool import BlockPool
from memserve.pool.results import Match
from memserve.tokens import NO_TOKENS
from memserve.types import Medium, Namespace, RefArray, TokenArray, ref_medium

_NO_REFS: RefArray = np.empty(0, dtype=np.int64)


class BlockTable:
    """Blocks of one sequence, which owns the table. Used by the engine's thread only."""

    def __init__(self, pool: BlockPool, namespace: Namespace, ephemeral: bool) -> None:
        """`ephemeral`: the namespace is this sequence's alone, and `close` drops it. The index
        then only keeps KV over a preemption.
        """
        self._pool = pool
        self._namespace = namespace
        self._ephemeral = ephemeral
        self._block_tokens = pool.layout.block_tokens
        self._prefix: Match | None = None
        self._tail: RefArray = _NO_REFS
        self._indices: NDArray[np.int64] = _NO_REFS

    @property
    def indices(self) -> NDArray[np.int64]:
        """HBM block indices [blocks], in token order."""
        return self._indices

    @property
    def refs(self) -> RefArray:
        """References of the blocks [blocks], in HBM, in token order."""
        prefix = _NO_REFS if self._prefix is None else self._prefix.refs
        return np.concatenate([prefix, self._tail])

    @property
    def block_tokens(self) -> int:
        return self._block_tokens

    @property
    def cached_tokens(self) -> int:
        """Tokens of the pinned prefix."""
        return 0 if self._prefix is None else self._prefix.tokens

    def acquire(self, tokens: TokenArray, reusable: int, headroom: int) -> int:
        """Pin the longest cached prefix of the first `reusable` tokens, swap it into HBM, and
        reserve blocks for all `tokens`.

        Returns the number of cached tokens. Raises OutOfBlocks, before anything is pinned or
        moved, unless `headroom` blocks would stay free or evictable.
        """
        assert self._prefix is None
        assert not len(self._tail)
        wanted = tokens[:reusable]
        with self._pool.match(wanted, self._namespace) as found:
            in_hbm = int(np.count_nonzero(ref_medium(found.refs) == Medium.HBM))
            missing = self._blocks(len(tokens)) - in_hbm
            self._require(missing + headroom)
        self._prefix = self._pool.match(wanted, self._namespace, in_hbm=True)
        try:
            self._indices = self._pool.hbm_indices(self._prefix.refs)
            self.reserve(len(tokens))
        except BaseException:  # OutOfBlocks, or a failed copy of a swap-out
            self.release()
            raise
        return self._prefix.tokens

    def _require(self, blocks: int) -> None:
        hbm, evictable = self._pool.stats().hbm, self._pool.evictable()
        if hbm.free + evictable < blocks:
            raise OutOfBlocks("HBM", blocks, hbm.free, evictable, hbm.total)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._block_tokens)

    def reserve(self, tokens: int) -> None:
        """Allocate blocks for `tokens` tokens in total. Raises OutOfBlocks, without effect."""
        missing = self._blocks(tokens) - len(self._indices)
        if missing > 0:
            refs = self._pool.alloc_mem(missing, Medium.HBM, private=True)
            self._tail = np.concatenate([self._tail, refs])
            self._indices = np.concatenate([self._indices, self._pool.hbm_indices(refs)])

    def commit(
        self, tokens: TokenArray, take_over: Callable[[RefArray], None] | None = None
    ) -> None:
        """Give the full blocks of `tokens`, all with KV, to the index.

        If the index has a block of the same tokens already, the table uses that block from now
        on, and its own one goes to `take_over`, or is freed without a `take_over`.
        """
        blocks = len(tokens) // self._block_tokens
        before = self.cached_tokens // self._block_tokens
        if blocks == before:
            return
        full = tokens[: blocks * self._block_tokens]
        prefix = _NO_REFS if self._prefix is None else self._prefix.refs
        mine = self._tail[: blocks - before]
        result = self._pool.insert(full, np.concatenate([prefix, mine]), self._namespace, pin=True)
        assert result.match is not None
        if self._prefix is not None:
            self._prefix.release()
        self._prefix = result.match
        self._tail = self._tail[blocks - before :]
        if len(result.duplicate):
            (take_over or self._pool.free_mem)(result.duplicate)
            self._indices = self._indices.copy()
            self._indices[:blocks] = self._pool.hbm_indices(result.match.refs)

    def release(self) -> None:
        """Unpin the prefix (it stays cached) and free the tail. Idempotent."""
        if self._prefix is not None:
            self._prefix.release()
            self._prefix = None
        if len(self._tail):
            self._pool.free_mem(self._tail)
            self._tail = _NO_REFS
        self._indices = _NO_REFS

    def close(self) -> None:
        """Release all blocks, and drop an ephemeral namespace. Idempotent."""
        self.release()
        if self._ephemeral:
            self._pool.delete(NO_TOKENS, self._namespace)
