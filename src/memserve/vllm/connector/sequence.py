"""State of one request in the connector: its blocks, its load, its saves. Pure.

Blocks are counted from the beginning of the request's tokens. The pool has the first `given`
blocks, or a save of them is in flight. A save is published to the pool's index when it is done,
unless it was voided meanwhile because its source blocks may be invalid.
"""

from __future__ import annotations

from typing import NamedTuple

from memserve.api.namespaces import is_private
from memserve.types import Namespace, RefArray


class Spaces:
    """Namespaces in the pool's index: `COUNT:SALT`, where COUNT is the number of weight changes.

    After a change of weights in place, lookups do not find KV of the previous weights, even KV
    that arrives later: a peer's push keeps its own COUNT, and is found only by an equal one.

    Only one thread calls `renew`; any thread calls the rest.
    """

    def __init__(self) -> None:
        self._changes = 0

    def renew(self) -> None:
        """Count a change of the weights."""
        self._changes += 1

    def of(self, salt: str) -> Namespace:
        return Namespace(f"{self._changes}:{salt}")

    def salt(self, namespace: str) -> str | None:
        """Return the salt of a namespace; None if it belongs to other weights."""
        changes, _, salt = namespace.partition(":")
        return salt if changes == str(self._changes) else None


def beside(namespace: Namespace, salt: str) -> Namespace:
    """Return the namespace of `salt` with the weights of `namespace`."""
    return Namespace(f"{namespace.partition(':')[0]}:{salt}")


class Save(NamedTuple):
    """A save in flight: the request's blocks `first` to `last` (exclusive) go into `refs`."""

    first: int
    last: int
    refs: RefArray


class Sequence:
    """State of one request, from its arrival until it has ended and no copy is in flight."""

    __slots__ = (
        "_void",
        "block_ids",
        "ended",
        "given",
        "load_failed",
        "loading",
        "pending",
        "salt",
        "saves",
    )

    def __init__(self, salt: str, cacheable: bool, sent: bool = False) -> None:
        """`cacheable`: the KV depends on tokens and nothing else. `sent`: the KV goes to a peer, so
        it is saved even in a private namespace, which no other request can use."""
        self.salt = salt
        # whether more blocks are to be saved
        self.saves = cacheable and (sent or not is_private(salt))
        self.load_failed = not cacheable
        self.loading = False
        self.given = 0
        self.block_ids: list[list[int]] = []  # vLLM's, for each KV cache group
        self.pending: dict[int, Save] = {}  # by job
        self._void: set[int] = set()
        self.ended = False

    @property
    def may_load(self) -> bool:
        """Whether the pool may be looked up. A load that failed is not tried again."""
        return not (self.load_failed or self.loading or self.ended)

    @property
    def over(self) -> bool:
        """Whether the request has ended and no copy of it is in flight."""
        return self.ended and not self.pending and not self.loading

    def load_began(self) -> None:
        self.loading = True

    def load_ended(self) -> None:
        self.loading = False

    def fail(self) -> None:
        """Record that loaded blocks are invalid: allow no more loads, void the saves in flight."""
        self.load_failed = True
        self.void()

    def admitted(self, block_ids: list[list[int]], have: int) -> None:
        """Set vLLM's blocks when the request is scheduled for the first time, or resumed; the pool
        has its first `have` blocks."""
        self.block_ids = block_ids
        self.given = have

    def grown(self, fresh: list[list[int]]) -> None:
        """Append blocks that vLLM has allocated, for each KV cache group."""
        for own, more in zip(self.block_ids, fresh, strict=True):
            own.extend(more)

    def due(self, whole: int) -> range:
        """Return the blocks to save when the first `whole` blocks are computed."""
        return range(self.given, whole) if self.saves else range(0)

    def ordered(self, job: int, save: Save) -> None:
        self.pending[job] = save
        self.given = save.last

    def saved(self, job: int) -> tuple[Save, bool]:
        """Remove and return a save that is done, and whether it may be published."""
        save = self.pending.pop(job)
        void = job in self._void
        self._void.discard(job)
        return save, not void

    def void(self) -> None:
        """Void the saves in flight, whose KV may be computed from invalid blocks. Later saves begin
        again at the first voided block, so that no gap is published."""
        self._void.update(self.pending)
        self.given = min([self.given, *(save.first for save in self.pending.values())])

    def give_up(self) -> None:
        """Save nothing more."""
        self.saves = False
