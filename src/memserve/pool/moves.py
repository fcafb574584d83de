"""Copies between HBM and DRAM, made without the pool's lock.

A movement of blocks is a generator that runs under the lock and yields each `Copy` that it needs.
`Mover.run` makes the copy with the lock released, then resumes the generator under the lock. A
hold (`Holds`) keeps blocks that the generator needs after the copy: they are pinned, and if the
index replaces one by another block, the hold follows to that block. One movement runs at a time:
two could take each other's blocks, and one could raise OutOfBlocks while the other is about to
free some.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from memserve.pool.blocks import Blocks, Part
from memserve.pool.storage import BlockStore
from memserve.types import IndexArray, RefArray

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Copy:
    """A copy of blocks from one store to another, or within one store."""

    source: BlockStore
    source_index: IndexArray
    target: BlockStore
    target_index: IndexArray

    def make(self) -> None:
        """Copy the bytes; blocks until they are in the target."""
        self.target.copy_from(self.source, self.source_index, self.target_index)


# The code between two yields runs under the pool's lock, each yielded copy without it.
Moving = Generator[Copy, None, T]


class Mover:
    """Runs movements one at a time, under its lock `turn`.

    `turn` is acquired before the pool's lock: a thread that holds the pool's lock must not call
    `run`.
    """

    def __init__(self, lock: threading.RLock) -> None:
        """`lock`: the pool's."""
        self._lock = lock
        self.turn = threading.RLock()

    def run(self, moving: Moving[T]) -> T:
        """Run a movement; return its result. An error of a copy is raised in the generator,
        which cleans up."""
        with self.turn:
            copy: Copy | None = None
            error: BaseException | None = None
            while True:
                with self._lock:
                    try:
                        copy = next(moving) if error is None else moving.throw(error)
                    except StopIteration as end:
                        result: T = end.value
                        return result
                error = None
                try:
                    copy.make()
                except BaseException as failure:  # noqa: BLE001 - raised at once, by the generator
                    error = failure


@dataclass(slots=True, eq=False)
class Hold:
    """One pin on each of the blocks `refs` [n], for a movement or a read."""

    refs: RefArray
    follows: bool  # if the index replaces a held block, hold the other block instead
    prefix: bool  # `refs` is a whole prefix, so no unpinned block is before a held one


class Holds:
    """The open holds of a pool. Callers hold the pool's lock."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        self._open: list[Hold] = []

    def __len__(self) -> int:
        return len(self._open)

    @property
    def parts(self) -> list[Part]:
        """The blocks that open holds pin, once for each hold."""
        return [part for hold in self._open for part in self._blocks.by_medium(hold.refs)]

    @property
    def scattered(self) -> bool:
        """Whether the index may have unpinned blocks before held ones: these cannot be evicted."""
        return any(not hold.prefix for hold in self._open)

    def open(self, refs: RefArray, *, follows: bool = True, prefix: bool = False) -> Hold:
        """Pin CACHED or DETACHED blocks `refs` [n], all distinct; return the hold."""
        for blocks, _, index in self._blocks.by_medium(refs):
            blocks.pin(index)
        hold = Hold(refs.copy(), follows, prefix)
        self._open.append(hold)
        return hold

    def close(self, hold: Hold) -> list[tuple[Part, IndexArray]]:
        """Unpin a hold's blocks; return those that `unpin` reports, for `Tiers.wake`."""
        self._open.remove(hold)
        return [
            (part, part.blocks.unpin(part.indices)) for part in self._blocks.by_medium(hold.refs)
        ]

    def follow(self, old: RefArray, new: RefArray) -> list[tuple[Part, IndexArray]]:
        """Move the pins of following holds from `old` [n] to CACHED blocks `new` [n], which
        replaced them in the index. Returns as `close`."""
        woken = []
        for hold in self._open:
            where = np.flatnonzero(np.isin(hold.refs, old))
            if not (hold.follows and len(where)):
                continue
            order = np.argsort(old)
            held = hold.refs[where]
            later = new[order[np.searchsorted(old, held, sorter=order)]]
            for blocks, _, index in self._blocks.by_medium(later):
                blocks.pin(index)
            woken += [
                (part, part.blocks.unpin(part.indices)) for part in self._blocks.by_medium(held)
            ]
            hold.refs[where] = later
        return woken
