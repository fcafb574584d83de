"""Pauses before a crashed process is started again, and the limit of crashes."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from memserve.clock import Clock

# The first pause is short, for a crash that does not repeat. A small model's process that crashes
# at each start is given up within a minute.
FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 30.0
MAX_CRASHES = 5
WINDOW_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class RestartLimits:
    """Pauses double from `first_pause` to `longest_pause`; a process with `max_crashes` within
    `window` is given up. Times in seconds."""

    first_pause: float = FIRST_PAUSE_SECONDS
    longest_pause: float = LONGEST_PAUSE_SECONDS
    max_crashes: int = MAX_CRASHES
    window: float = WINDOW_SECONDS


class Restarts:
    """Counts the crashes of one supervised process."""

    def __init__(self, limits: RestartLimits, clock: Clock) -> None:
        self._limits = limits
        self._clock = clock
        self._crashes: deque[float] = deque()

    @property
    def longest_pause(self) -> float:
        return self._limits.longest_pause

    def crashed(self) -> float | None:
        """Count a crash. Return the seconds to wait before the next start; None: give it up."""
        now = self._clock.now()
        self._crashes.append(now)
        while now - self._crashes[0] > self._limits.window:
            self._crashes.popleft()
        count = len(self._crashes)
        if count >= self._limits.max_crashes:
            return None
        pause: float = self._limits.first_pause * 2 ** (count - 1)
        return min(self._limits.longest_pause, pause)
