"""What the pool holds, told in vLLM's own KV events.

A block in the pool has the name that vLLM gives the same block in its own cache, with another
medium: whoever follows the events sees one block in two places, and knows that it is still there
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

MEDIUM = "CPU"  # vLLM's word for the host's memory
BlockName = bytes | int
# vLLM's name of a block: of the block before it (None: it begins a prompt), its tokens, the salt.
NameBlock = Callable[[BlockName | None, list[int], str], BlockName]


class Stored(NamedTuple):
    """Consecutive blocks of one prompt. `salt`: of those that begin it."""

    names: list[BlockName]
    parent: BlockName | None
    tokens: list[int]
    salt: str


class Removed(NamedTuple):
    names: list[BlockName]


class _Moved(NamedTuple):
    """Blocks [n] that have taken the place of others."""

    refs: RefArray
    old: RefArray


class TierEvents:
    """The pool's listener, which is called from any thread, under the pool's lock. The rest belongs
    to vLLM's scheduling thread."""

    def __init__(self, block_tokens: int, name: NameBlock, spaces: Spaces) -> None:
        """`spaces`: of the pool; what other weights have computed is not told."""
        self._block = block_tokens
        self._spaces = spaces
        self._name = name
        self._names: dict[int, BlockName] = {}  # by the pool's reference
        self._heard: deque[StoredRun | RefArray | _Moved | None] = deque()  # None: renewed

    @property
    def held(self) -> set[BlockName]:
        """Blocks that were told of and not taken back."""
        return set(self._names.values())

    def renewed(self) -> None:
        """What was held until now is found no more."""
        self._heard.append(None)

    def take(self) -> list[Stored | Removed]:
        """What has happened since the last call, in order."""
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
