"""Messages between the connector's scheduler side and its workers, with each step of vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


@dataclass(slots=True)
class Copy:
    """A load or save of n blocks: pairs of vLLM's blocks and the pool's. `request` identifies a
    load, `job` a save."""

    request: str
    job: int  # 0 for a load
    own: list[Indices]  # vLLM's block ids [n], for each KV cache group; 0: no block
    pool: Indices  # indices in the pool's host memory [n]


@dataclass(frozen=True, slots=True)
class PoolMemory:
    """One segment of the pool's host memory."""

    first: int  # index of its first block
    blocks: int
    name: str  # of the file in /dev/shm
    nbytes: int


@dataclass(slots=True)
class StepCopies:
    """Copies of a step: loads before its forward pass, saves after it."""

    loads: list[Copy] = field(default_factory=list)
    saves: list[Copy] = field(default_factory=list)
    memory: tuple[PoolMemory, ...] | None = None  # all segments; None: unchanged


@dataclass(slots=True)
class CopiesDone:
    """Saves that have ended: by job the number of workers that report it, and failed jobs."""

    saves: dict[int, int]
    failed: set[int]  # jobs that failed at one worker or more

    def aggregate(self, other: CopiesDone) -> CopiesDone:
        """Return the sum of both. vLLM calls this to merge the reports of workers."""
        saves = dict(self.saves)
        for job, workers in other.saves.items():
            saves[job] = saves.get(job, 0) + workers
        return CopiesDone(saves, self.failed | other.failed)
