"""`Arrivals`: the number of requests, and the last ones' prompt lengths, for capacity planning."""

from __future__ import annotations

from collections import deque

import msgspec

KEPT_ARRIVALS = 1024  # enough for a mean over prompt lengths with few very long prompts


class Arrival(msgspec.Struct, frozen=True, array_like=True):
    """One request, as its routing decision saw it."""

    at: float  # seconds of the scheduler's clock
    prompt_tokens: int
    cached_tokens: int  # on the instance that computes the prompt, or fetched to it


class Arrivals:
    """Counts requests and keeps the last KEPT_ARRIVALS of them."""

    def __init__(self, kept: int = KEPT_ARRIVALS) -> None:
        self.total = 0  # decisions since the start; a retried request counts again
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
