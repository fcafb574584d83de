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

    def __init__(self, block_tokens: int, name: NameBlock) -> None:
        self._block = block_tokens
        self._name = name
        self._names: dict[int, BlockName] = {}  # by the pool's reference
        self._heard: deque[StoredRun | RefArray | _Moved] = deque()

    @property
    def held(self) -> set[BlockName]:
        """Blocks that were told of and not taken back."""
        return set(self._names.values())

    def take(self) -> list[Stored | Removed]:
        """What has happened since the last call, in order."""
        told: list[Stored | Removed] = []
        while self._heard:
            match self._heard.popleft():
                case StoredRun() as run:
                    told.append(self._stored(run))
                case _Moved(refs, old):
                    for ref, before in zip(refs.tolist(), old.tolist(), strict=True):
                        self._names[ref] = self._names.pop(before)
                case gone:
                    told.append(Removed([self._names.pop(ref) for ref in gone.tolist()]))
        return told

    def _stored(self, run: StoredRun) -> Stored:
        tokens = np.frombuffer(run.data, dtype=np.int32).tolist()
        above = parent = None if run.parent is None else self._names[run.parent]
        names = []
        for at, ref in enumerate(run.refs.tolist()):
            part = tokens[at * self._block : (at + 1) * self._block]
            above = self._names[ref] = self._name(above, part, run.namespace)
            names.append(above)
        return Stored(names, parent, tokens, run.namespace)

    # --- the pool's listener

    def stored(self, run: StoredRun) -> None:
        self._heard.append(run)

    def removed(self, namespace: str, refs: RefArray) -> None:
        self._heard.append(refs)

    def moved(self, run: StoredRun, old: RefArray) -> None:
        self._heard.append(_Moved(run.refs, old))
