"""The pool's content as KV events of vLLM.

A block in the pool has the hash that vLLM gives the same block in its own cache, with another
medium: a follower of the events sees one block in two places, and knows that the pool still has it
when vLLM has dropped its copy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from memserve.pool.listener import StoredRun
from memserve.types import RefArray
from memserve.vllm.connector.sequence import Spaces

MEDIUM = "CPU"  # vLLM's name of host memory
BlockName = bytes | int  # vLLM's block hash
# Returns the name of a block from that of the block before it (None: none), its tokens, the salt.
NameBlock = Callable[[BlockName | None, list[int], str], BlockName]


class Stored(NamedTuple):
    """Consecutive blocks of one prompt, behind the block `parent` (None: from the beginning)."""

    names: list[BlockName]
    parent: BlockName | None
    tokens: list[int]
    salt: str


class Removed(NamedTuple):
    names: list[BlockName]


class _Moved(NamedTuple):
    """Blocks `refs` [n] that have replaced the blocks `old` [n] in the pool's index."""

    refs: RefArray
    old: RefArray


class TierEvents:
    """Translates the pool's events. The pool calls `stored`, `removed` and `moved` on any thread,
    under its lock; vLLM's scheduling thread calls the rest."""

    def __init__(self, block_tokens: int, name: NameBlock, spaces: Spaces) -> None:
        """`spaces`: the pool's namespaces; KV of other weights is not reported."""
        self._block = block_tokens
        self._spaces = spaces
        self._name = name
        self._names: dict[int, BlockName] = {}  # reported blocks, by the pool's reference
        # Events that `take` has not translated; None: `renewed`.
        self._heard: deque[StoredRun | RefArray | _Moved | None] = deque()

    @property
    def held(self) -> set[BlockName]:
        """Names of the blocks that were reported as stored, and not as removed."""
        return set(self._names.values())

    def renewed(self) -> None:
        """Report all blocks held so far as removed: lookups do not find them any more."""
        self._heard.append(None)

    def take(self) -> list[Stored | Removed]:
        """Return the events since the last call, in order."""
        told: list[Stored | Removed] = []
        while self._heard:
            match self._heard.popleft():
                case StoredRun() as run:
                    salt = self._spaces.salt(run.namespace)
                    if salt is not None and (run.parent is None or run.parent in self._names):
                        told.append(self._stored(run, salt))
                case _Moved(refs, old):
                    for ref, before in zip(refs.tolist(), old.tolist(), strict=True):
                        if before in self._names:
                            self._names[ref] = self._names.pop(before)
                case None:
                    if self._names:
                        told.append(Removed(list(self._names.values())))
                    self._names.clear()
                case refs:
                    names = self._names
                    gone = [names.pop(ref) for ref in refs.tolist() if ref in names]
                    if gone:
                        told.append(Removed(gone))
        return told

    def _stored(self, run: StoredRun, salt: str) -> Stored:
        tokens = np.frombuffer(run.data, dtype=np.int32).tolist()
        above = parent = None if run.parent is None else self._names[run.parent]
        names = []
        for at, ref in enumerate(run.refs.tolist()):
            part = tokens[at * self._block : (at + 1) * self._block]
            above = self._names[ref] = self._name(above, part, salt)
            names.append(above)
        return Stored(names, parent, tokens, salt)

    # --- the pool's listener

    def stored(self, run: StoredRun) -> None:
        self._heard.append(run)

    def removed(self, namespace: str, refs: RefArray) -> None:
        self._heard.append(refs)

    def moved(self, run: StoredRun, old: RefArray) -> None:
        self._heard.append(_Moved(run.refs, old))
