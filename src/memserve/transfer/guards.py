"""Blocks of local callers that a peer is writing into."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from memserve.types import RefArray

_NONE: RefArray = np.empty(0, dtype=np.int64)


class Guards:
    """While a block is guarded its owner may give it back, but nobody may have it yet."""

    def __init__(self) -> None:
        self._guarded = _NONE
        self._freed = _NONE  # of the guarded ones: given back by their owners

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

    def add(self, refs: RefArray) -> None:
        self._guarded = np.concatenate((self._guarded, refs))

    def defer(self, refs: RefArray) -> None:
        """The owner gives guarded blocks back."""
        self._freed = np.concatenate((self._freed, refs))

    def remove(self, refs: RefArray) -> RefArray:
        """Nobody writes any more; returns those that are to be freed now."""
        self._guarded = self._guarded[~np.isin(self._guarded, refs)]
        due = np.isin(self._freed, refs)
        freed = self._freed[due]
        self._freed = self._freed[~due]
        return freed
