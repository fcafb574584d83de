"""What travels between vLLM's scheduler and its workers, with each step."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


@dataclass(slots=True)
class Copy:
    """Blocks of vLLM and of the pool, pair by pair. `request` names a load, `job` a save."""

    request: str
    job: int
    own: list[Indices]  # vLLM's block ids [n], for each KV cache group; 0: that group has none
    pool: Indices  # indices in the pool's host memory [n]


@dataclass(frozen=True, slots=True)
class PoolMemory:
    """One segment of the pool's host memory."""

    first: int  # index of its first block
    blocks: int
    name: str  # of the shared memory
    nbytes: int


@dataclass(slots=True)
class StepCopies:
    """What workers copy in a step: loads before its forward pass, saves after it."""

    loads: list[Copy] = field(default_factory=list)
    saves: list[Copy] = field(default_factory=list)
    memory: tuple[PoolMemory, ...] | None = None  # where it has changed


@dataclass(slots=True)
class CopiesDone:
    """How many workers are through with each save, and the saves that one of them has not done."""

    saves: dict[int, int]
    failed: set[int]

    def aggregate(self, other: CopiesDone) -> CopiesDone:
        """Of several workers."""
        saves = dict(self.saves)
        for job, workers in other.saves.items():
            saves[job] = saves.get(job, 0) + workers
        return CopiesDone(saves, self.failed | other.failed)
