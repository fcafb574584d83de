"""Copies between HBM and DRAM, made without the pool's lock.

What moves blocks is written as a generator that runs under the lock and yields each copy that it
needs: `Mover.run` makes it with the lock given up, and goes on. What it will still need by then is
held (`Holds`): held blocks are neither evicted nor moved, and where the index takes another block
for one of them, the hold follows it there. One mover at a time: two could take each other's
blocks, and running out of them must not be found out while another one is about to free some.
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
    """Blocks of one store into blocks of another, or of the same."""

    source: BlockStore
    source_index: IndexArray
    target: BlockStore
    target_index: IndexArray

    def make(self) -> None:
        """Returns when the bytes are there."""
        self.target.copy_from(self.source, self.source_index, self.target_index)


# Steps under the lock; a copy without it after each.
Moving = Generator[Copy, None, T]


class Mover:
    """Runs movements. Owns the lock that makes them come one after the other; it is taken before
    the pool's, so nobody may move anything while he holds that one."""

    def __init__(self, lock: threading.RLock) -> None:
        """`lock`: the pool's."""
        self._lock = lock
        self.turn = threading.RLock()

    def run(self, moving: Moving[T]) -> T:
        """The result. What a copy raises is raised in the generator, to be tidied up there."""
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
    """One pin on each of these blocks, of whoever moves or reads them."""

    refs: RefArray
    follows: bool  # to where the index has their KV, if it takes other blocks for it
    prefix: bool  # they are all that is before any of them


class Holds:
    """The holds that are open. Callers hold the pool's lock."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        self._open: list[Hold] = []

    def __len__(self) -> int:
        return len(self._open)

    @property
    def parts(self) -> list[Part]:
        """What is pinned by them."""
        return [part for hold in self._open for part in self._blocks.by_medium(hold.refs)]

    @property
    def scattered(self) -> bool:
        """Whether unpinned blocks may be before pinned ones, and so stay with them."""
        return any(not hold.prefix for hold in self._open)

    def open(self, refs: RefArray, *, follows: bool = True, prefix: bool = False) -> Hold:
        """Pin blocks [n] that are the index's or its readers', each named once."""
        for blocks, _, index in self._blocks.by_medium(refs):
            blocks.pin(index)
        hold = Hold(refs.copy(), follows, prefix)
        self._open.append(hold)
        return hold

    def close(self, hold: Hold) -> list[tuple[Part, IndexArray]]:
        """Unpin; returns what nobody reads any more, to be woken."""
        self._open.remove(hold)
        return [
            (part, part.blocks.unpin(part.indices)) for part in self._blocks.by_medium(hold.refs)
        ]

    def follow(self, old: RefArray, new: RefArray) -> list[tuple[Part, IndexArray]]:
        """The index has CACHED blocks `new` [n] where `old` were: so have holds. Returns as
        `close`."""
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
