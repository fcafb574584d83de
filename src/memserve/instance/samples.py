"""Times taken repeatedly, and which of them to believe: those that nothing else disturbed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

# Of a sample's time that its threads may wait for a core. OpenMP's threads spin for each other:
# what one waits, all lose.
_CLEAN = 0.03
_INSTANT = 1e-9

Point = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Sample:
    """One time, and how much of it threads of this process waited for a core."""

    seconds: float
    waited: float

    @property
    def clean(self) -> bool:
        return self.waited <= _CLEAN


class Samples:
    """Points, each named once, and the times that they took."""

    def __init__(self, points: Iterable[Point]) -> None:
        self.points = list(dict.fromkeys(points))
        self.taken: dict[Point, list[Sample]] = {}

    def take(self, point: Point, run: Callable[[int, int], float]) -> None:
        """Time a point once more."""
        waited, began = seconds_waited(), time.perf_counter()
        seconds = run(*point)
        wall = max(time.perf_counter() - began, _INSTANT)
        share = (seconds_waited() - waited) / wall
        self.taken.setdefault(point, []).append(Sample(seconds, share))

    @property
    def disturbed(self) -> list[Point]:
        """Points without an undisturbed time."""
        return [point for point, took in self.taken.items() if not any(s.clean for s in took)]

    @property
    def believed(self) -> dict[Point, Sample]:
        """Of each point the median of its undisturbed times, or its least disturbed one."""
        return {point: _believe(took) for point, took in self.taken.items()}


def _believe(took: Sequence[Sample]) -> Sample:
    clean = sorted((sample for sample in took if sample.clean), key=lambda s: s.seconds)
    if not clean:
        return min(took, key=lambda s: s.waited)
    return clean[(len(clean) - 1) // 2]


def seconds_waited() -> float:
    """For how long threads of this process have waited for a core so far, in all; 0.0 where the
    kernel does not say."""
    nanoseconds = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        try:
            nanoseconds += int(task.read_text().split()[1])
        except OSError:
            continue  # a thread that has ended
    return nanoseconds * 1e-9
