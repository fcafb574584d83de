"""`Timeline`: a virtual clock with a queue of events."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable


class Timeline:
    """A `memserve.clock.Clock` that jumps from event to event.

    Events of equal time run in the order in which they were added, so that a run is deterministic.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def now(self) -> float:
        """Seconds since the start."""
        return self._now

    def at(self, time: float, act: Callable[[], None]) -> None:
        """Call `act` at `time`, seconds since the start, which must not be in the past."""
        assert time >= self._now
        heapq.heappush(self._events, (time, next(self._numbers), act))

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        """Call `act` after `seconds`."""
        self.at(self._now + seconds, act)

    def step(self) -> bool:
        """Run the next event; False if there is none."""
        if not self._events:
            return False
        self._now, _, act = heapq.heappop(self._events)
        act()
        return True
