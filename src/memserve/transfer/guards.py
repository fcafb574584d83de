"""Blocks of local callers that peers are writing into."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memserve.types import RefArray

_NONE: RefArray = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Guard:
    """Somebody writes these KV heads of these blocks."""

    refs: RefArray
    heads: range


class Guards:
    """While a block is guarded its owner may give it back, but nobody may have it yet. Several
    may write to one block, but each to heads of its own."""

    def __init__(self) -> None:
        self._held: list[Guard] = []
        self._guarded = _NONE  # by any of those
        self._freed = _NONE  # of these: given back by their owners

    def __len__(self) -> int:
        return len(self._guarded)

    @property
    def freed(self) -> int:
        """Guarded blocks that wait to be free."""
        return len(self._freed)

    def where(self, refs: RefArray) -> NDArray[np.bool_]:
        """Which of `refs` are guarded."""
        return np.isin(refs, self._guarded)

    def where_freed(self, refs: RefArray) -> NDArray[np.bool_]:
        """Which of `refs` their owners have given back."""
        return np.isin(refs, self._freed)

    def contested(self, refs: RefArray, heads: range) -> bool:
        """Whether somebody writes to some of these heads of some of these blocks."""
        return any(
            max(heads.start, other.heads.start) < min(heads.stop, other.heads.stop)
            and bool(np.isin(refs, other.refs).any())
            for other in self._held
        )

    def add(self, refs: RefArray, heads: range) -> Guard:
        guard = Guard(refs, heads)
        self._held.append(guard)
        self._guarded = np.union1d(self._guarded, refs)
        return guard

    def defer(self, refs: RefArray) -> None:
        """The owner gives guarded blocks back."""
        self._freed = np.concatenate((self._freed, refs))

    def remove(self, guard: Guard) -> RefArray:
        """It writes no more; returns the blocks that are to be freed now."""
        self._held.remove(guard)
        left = [other.refs for other in self._held]
        self._guarded = np.unique(np.concatenate(left)) if left else _NONE
        due = ~np.isin(self._freed, self._guarded)
        freed = self._freed[due]
        self._freed = self._freed[~due]
        return freed
