"""When a process that crashed is started again, and when that has no use any more."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from memserve.clock import Clock

# The first restart comes at once, for a crash that does not repeat. A process that crashes while
# it starts is given up after the pauses and so many starts: within a minute for a small model.
FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 30.0
MAX_CRASHES = 5
WINDOW_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class RestartLimits:
    """Pauses double from `first_pause` to `longest_pause`; `max_crashes` within `window` are
    too many. Seconds."""

    first_pause: float = FIRST_PAUSE_SECONDS
    longest_pause: float = LONGEST_PAUSE_SECONDS
    max_crashes: int = MAX_CRASHES
    window: float = WINDOW_SECONDS


class Restarts:
    """The crashes of one process's lives."""

    def __init__(self, limits: RestartLimits, clock: Clock) -> None:
        self._limits = limits
        self._clock = clock
        self._crashes: deque[float] = deque()

    @property
    def longest_pause(self) -> float:
        return self._limits.longest_pause

    def crashed(self) -> float | None:
        """Count a crash. Seconds to wait before the next start; None: give it up."""
        now = self._clock.now()
        self._crashes.append(now)
        while now - self._crashes[0] > self._limits.window:
            self._crashes.popleft()
        count = len(self._crashes)
        if count >= self._limits.max_crashes:
            return None
        pause: float = self._limits.first_pause * 2 ** (count - 1)
        return min(self._limits.longest_pause, pause)
