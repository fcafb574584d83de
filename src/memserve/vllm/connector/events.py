"""What the pool holds, told in vLLM's own KV events.

A block in the pool has the name that vLLM gives the same block in its own cache, with another
medium: whoever follows the events sees one block in two places, and knows that it is still there
when vLLM has dropped its copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

from memserve.pool.listener import StoredRun
from memserve.types import RefArray, TokenArray

MEDIUM = "CPU"  # vLLM's word for the host's memory
BlockName = bytes | int


class Stored(NamedTuple):
    """Consecutive blocks of one prompt. `salt`: of those that begin it."""

    names: list[BlockName]
    parent: BlockName | None
    tokens: list[int]
    salt: str


class Removed(NamedTuple):
    names: list[BlockName]


class TierEvents:
    """The pool's listener. Belongs to vLLM's scheduling thread, as all changes of its pool do."""

    def __init__(self, block_tokens: int) -> None:
        self._block = block_tokens
        self._names: dict[int, BlockName] = {}  # by the pool's reference
        self._waiting: list[Stored | Removed] = []

    @property
    def held(self) -> set[BlockName]:
        """Blocks that were told of and not taken back."""
        return set(self._names.values())

    def published(
        self,
        names: Sequence[BlockName],
        tokens: TokenArray,
        refs: RefArray,
        new: RefArray,
        salt: str,
    ) -> None:
        """The index has taken `new` ones of `refs` [n], which are the last n blocks of `tokens`.
        `names`: of the prompt's blocks, as far as vLLM has named them; others are not told."""
        start = len(tokens) // self._block - len(refs)
        named = min(len(refs), len(names) - start)
        taken = np.isin(refs[: max(0, named)], new)
        for told, run in groupby(range(len(taken)), key=lambda at: bool(taken[at])):
            places = list(run)
            if not told:
                continue
            first, last = start + places[0], start + places[-1] + 1
            own = list(names[first:last])
            self._names.update(zip(refs[places].tolist(), own, strict=True))
            parent = names[first - 1] if first else None
            part = tokens[first * self._block : last * self._block].tolist()
            self._waiting.append(Stored(own, parent, part, salt))

    def take(self) -> list[Stored | Removed]:
        """What has happened since the last call, in order."""
        taken, self._waiting = self._waiting, []
        return taken

    # --- the pool's listener

    def stored(self, run: StoredRun) -> None:
        """Said by `published`, which knows the names."""

    def removed(self, namespace: str, refs: RefArray) -> None:
        gone = [self._names.pop(ref) for ref in refs.tolist() if ref in self._names]
        if gone:
            self._waiting.append(Removed(gone))

    def moved(self, run: StoredRun, old: RefArray) -> None:
        """A pool of one medium moves nothing."""
        self.removed(run.namespace, old)
