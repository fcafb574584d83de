"""Rate at which sequences finish, for the `Retry-After` of refused requests."""

from __future__ import annotations

import math
from collections import deque

from memserve.clock import Clock

WINDOW_SECONDS = 30.0
MAX_RETRY_SECONDS = 60  # longer guesses are worth nothing


class FinishRate:
    """Finish times of sequences in the last `WINDOW_SECONDS`."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._started = clock.now()
        self._ends: deque[float] = deque()

    def record(self, count: int) -> None:
        now = self._clock.now()
        self._ends.extend([now] * count)
        self._forget(now)

    def retry_after(self, waiting: int) -> int:
        """Estimate the seconds until `waiting` sequences have finished: 1..MAX_RETRY_SECONDS."""
        now = self._clock.now()
        self._forget(now)
        if not self._ends:
            return 1
        rate = len(self._ends) / max(min(now - self._started, WINDOW_SECONDS), 1.0)
        return max(1, min(math.ceil(waiting / rate), MAX_RETRY_SECONDS))

    def _forget(self, now: float) -> None:
        while self._ends and self._ends[0] < now - WINDOW_SECONDS:
            self._ends.popleft()
