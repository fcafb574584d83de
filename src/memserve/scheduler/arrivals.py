"""`Arrivals`: how many requests came, and the last ones' prompts, for whoever plans capacity."""

from __future__ import annotations

from collections import deque

import msgspec

KEPT_ARRIVALS = 1024  # enough for a mean over prompts of which few are very long


class Arrival(msgspec.Struct, frozen=True, array_like=True):
    """One request when its place was decided."""

    at: float  # seconds of the scheduler's clock
    prompt_tokens: int
    cached_tokens: int  # on the instance that computes the prompt, or fetched to it


class Arrivals:
    """Counts requests and keeps the last KEPT_ARRIVALS of them."""

    def __init__(self, kept: int = KEPT_ARRIVALS) -> None:
        self.total = 0  # since the start; a request that is decided again counts again
        self._last: deque[Arrival] = deque(maxlen=kept)

    def add(self, at: float, prompt_tokens: int, cached_tokens: int) -> None:
        self.total += 1
        self._last.append(Arrival(at, prompt_tokens, cached_tokens))

    def since(self, time: float) -> tuple[Arrival, ...]:
        """Return the kept requests that came after `time`, oldest first."""
        found = []
        for arrival in reversed(self._last):
            if arrival.at <= time:
                break
            found.append(arrival)
        return tuple(reversed(found))
