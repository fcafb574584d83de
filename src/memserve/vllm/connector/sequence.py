"""What of one request's KV is where. Pure: knows no pool, and copies nothing.

Blocks are counted from the beginning of the request's tokens. Up to `given` the pool has them, or
a save of them is on its way; each save is published when it is done, unless it was voided
meanwhile, since what it copied may be worth nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from memserve.api.namespaces import is_private
from memserve.types import Namespace, RefArray


class Spaces:
    """Namespaces in the pool's index: a salt, and which weights have computed what is there. KV of
    weights that were changed in place is found no more, whoever still reads it, and whenever it
    comes: what a peer has computed with its own is put where only as many changes lead to.

    `renew` belongs to one thread; the rest to any.
    """

    def __init__(self) -> None:
        self._changes = 0

    def renew(self) -> None:
        """The weights have been changed."""
        self._changes += 1

    def of(self, salt: str) -> Namespace:
        return Namespace(f"{self._changes}:{salt}")

    def salt(self, namespace: str) -> str | None:
        """None: of other weights."""
        changes, _, salt = namespace.partition(":")
        return salt if changes == str(self._changes) else None


def beside(namespace: Namespace, salt: str) -> Namespace:
    """The namespace of another salt, for the same weights."""
    return Namespace(f"{namespace.partition(':')[0]}:{salt}")


class Save(NamedTuple):
    """Blocks `first` to `last`, on their way into the pool's blocks `refs`."""

    first: int
    last: int
    refs: RefArray


class Sequence:
    """One request's."""

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
        """`cacheable`: its KV depends on its tokens and nothing else. `sent`: to a peer, as what
        nobody else will ever use need not be saved."""
        self.salt = salt
        # whether more of it is to be saved
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
        """Whether the pool may be asked. A load that failed is not tried again."""
        return not (self.load_failed or self.loading or self.ended)

    @property
    def over(self) -> bool:
        """Whether nothing of it is on its way any more."""
        return self.ended and not self.pending and not self.loading

    def load_began(self) -> None:
        self.loading = True

    def load_ended(self) -> None:
        self.loading = False

    def fail(self) -> None:
        """What was loaded for it is not valid."""
        self.load_failed = True
        self.void()

    def admitted(self, block_ids: list[list[int]], have: int) -> None:
        """It is scheduled, for the first time or again; the pool has its first `have` blocks."""
        self.block_ids = block_ids
        self.given = have

    def grown(self, fresh: list[list[int]]) -> None:
        """vLLM has given it more blocks."""
        for own, more in zip(self.block_ids, fresh, strict=True):
            own.extend(more)

    def due(self, whole: int) -> range:
        """Which blocks to save when the first `whole` ones are computed."""
        return range(self.given, whole) if self.saves else range(0)

    def ordered(self, job: int, save: Save) -> None:
        self.pending[job] = save
        self.given = save.last

    def saved(self, job: int) -> tuple[Save, bool]:
        """A save that is done, and whether it may be published."""
        save = self.pending.pop(job)
        void = job in self._void
        self._void.discard(job)
        return save, not void

    def void(self) -> None:
        """Publish nothing of what is on its way: it may have been computed from garbage. What it
        would have published, later saves must not be put behind."""
        self._void.update(self.pending)
        self.given = min([self.given, *(save.first for save in self.pending.values())])

    def give_up(self) -> None:
        """Save nothing more."""
        self.saves = False
