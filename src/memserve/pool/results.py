"""The results of `MemPool` calls: matches, insertions and statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import msgspec

from memserve.pool.allocator import BlockAllocator
from memserve.pool.blocks import Part
from memserve.types import RefArray


class Match:
    """A cached prefix, pinned until `release`.

    `tokens`: its length in tokens. `refs`: its blocks [tokens / block_tokens], in HBM or DRAM.
    """

    __slots__ = ("_pinned", "_release", "refs", "tokens")

    def __init__(
        self,
        tokens: int,
        refs: RefArray,
        pinned: list[Part],
        release: Callable[[Match], None],
    ) -> None:
        self.tokens = tokens
        self.refs = refs
        self._pinned = pinned  # not derived from `refs`, which callers may change
        self._release = release

    def release(self) -> None:
        """Unpin the blocks; a second call does nothing."""
        self._release(self)

    def __enter__(self) -> Match:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"Match(tokens={self.tokens}, blocks={len(self.refs)})"


@dataclass(frozen=True, slots=True)
class InsertResult:
    """Result of `MemPool.insert`.

    `new`: blocks that the index owns now. `duplicate`: blocks whose KV the index had already;
    still the caller's. `match`: all the tokens, with `pin=True`; else None.
    """

    new: RefArray
    duplicate: RefArray
    match: Match | None = None


class MediumStats(msgspec.Struct, frozen=True):
    """Block counts of one medium: total = free + active + cached + detached."""

    total: int
    free: int
    active: int  # owned by their allocator
    cached: int  # owned by the index
    pinned: int  # cached blocks that a match or a read holds
    detached: int  # not in the index any more, and still held by a match or a read

    @classmethod
    def of(cls, blocks: BlockAllocator) -> MediumStats:
        return cls(
            total=blocks.total,
            free=blocks.free,
            active=blocks.active,
            cached=blocks.cached,
            pinned=blocks.pinned,
            detached=blocks.detached,
        )


class PoolStats(msgspec.Struct, frozen=True):
    """State of a pool at one moment; the last three fields are counters since its start."""

    hbm: MediumStats
    dram: MediumStats
    namespaces: int
    nodes: int  # of the index, without roots
    matches: int  # not released yet
    evictions: int  # cached blocks dropped
    swapped_out: int
    swapped_in: int
