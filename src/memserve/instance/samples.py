"""Repeated time measurements, and the choice of those that other processes did not disturb."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

# Maximum share of a clean sample's time that threads waited for a core. OpenMP's threads spin
# for each other, so all lose the time that one of them waits.
_CLEAN = 0.03
_INSTANT = 1e-9

Point = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured time."""

    seconds: float
    waited: float  # seconds that this process's threads waited for a core, per wall second

    @property
    def clean(self) -> bool:
        return self.waited <= _CLEAN


class Samples:
    """Distinct points to measure, and the samples of each."""

    def __init__(self, points: Iterable[Point]) -> None:
        self.points = list(dict.fromkeys(points))
        self.taken: dict[Point, list[Sample]] = {}

    def take(self, point: Point, run: Callable[[int, int], float]) -> None:
        """Add a sample of `point`; `run(*point)` returns its seconds."""
        waited, began = seconds_waited(), time.perf_counter()
        seconds = run(*point)
        wall = max(time.perf_counter() - began, _INSTANT)
        share = (seconds_waited() - waited) / wall
        self.taken.setdefault(point, []).append(Sample(seconds, share))

    @property
    def disturbed(self) -> list[Point]:
        """Return the measured points without a clean sample."""
        return [point for point, took in self.taken.items() if not any(s.clean for s in took)]

    @property
    def believed(self) -> dict[Point, Sample]:
        """Return a sample for each measured point: the median of its clean samples (the lower one
        of two), or else the sample with the least `waited`."""
        return {point: _believe(took) for point, took in self.taken.items()}


def _believe(took: Sequence[Sample]) -> Sample:
    clean = sorted((sample for sample in took if sample.clean), key=lambda s: s.seconds)
    if not clean:
        return min(took, key=lambda s: s.waited)
    return clean[(len(clean) - 1) // 2]


def seconds_waited() -> float:
    """Return the total seconds that this process's live threads have waited for a core so far; 0.0
    if the kernel does not count them."""
    nanoseconds = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        try:
            nanoseconds += int(task.read_text().split()[1])
        except OSError:
            continue  # a thread that has ended
    return nanoseconds * 1e-9
