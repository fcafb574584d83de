"""What the pool's calls return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import msgspec

from memserve.pool.allocator import BlockAllocator
from memserve.pool.blocks import Part
from memserve.types import RefArray


class Match:
    """A cached prefix that cannot be evicted until `release`.

    `tokens`: its length. `refs`: its blocks [tokens / block_tokens], in HBM or DRAM.
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
        self._pinned = pinned  # apart from refs, which callers may change
        self._release = release

    def release(self) -> None:
        """Let the blocks go; a second call does nothing."""
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
    """`new`: blocks that the index took. `duplicate`: blocks whose KV it had; still the
    caller's. `match`: all the tokens, pinned, if asked for."""

    new: RefArray
    duplicate: RefArray
    match: Match | None = None


class MediumStats(msgspec.Struct, frozen=True):
    """Blocks of one medium: total = free + active + cached + detached."""

    total: int
    free: int
    active: int  # owned by whoever allocated them
    cached: int  # owned by the index
    pinned: int  # of the cached ones: being read
    detached: int  # gone from the index, still being read

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
    """The pool at one moment; the counters only grow."""

    hbm: MediumStats
    dram: MediumStats
    namespaces: int
    nodes: int  # of the index
    matches: int  # not released
    evictions: int  # historical blocks dropped
    swapped_out: int
    swapped_in: int
