"""Virtual time: what happens when, without waiting."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable


class Timeline:
    """A clock (`memserve.clock.Clock`) that jumps from event to event.

    Events of the same time happen in the order in which they were asked for, so that a run
    depends on its inputs alone.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def now(self) -> float:
        """Seconds since the start."""
        return self._now

    def at(self, time: float, act: Callable[[], None]) -> None:
        """Have `act` called at `time`, which must not be over."""
        assert time >= self._now
        heapq.heappush(self._events, (time, next(self._numbers), act))

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        """Have `act` called in so many seconds."""
        self.at(self._now + seconds, act)

    def step(self) -> bool:
        """Let the next event happen; False if there is none."""
        if not self._events:
            return False
        self._now, _, act = heapq.heappop(self._events)
        act()
        return True
