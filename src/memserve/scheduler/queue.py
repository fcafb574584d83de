"""The prompts that wait or are computed on one instance, and how much of each is left.

An instance gives `short_share` of each step to the prompt of which the least is left, and the
rest to the oldest. With 0 it computes one after the other, as vLLM does.
"""

from __future__ import annotations

from collections.abc import Iterable

from memserve.types import RequestId


class PrefillQueue:
    """Predicted seconds of each prompt, in order of arrival, as time goes on."""

    __slots__ = ("_left", "_shortest", "_updated", "short_share")

    def __init__(self, short_share: float) -> None:
        self.short_share = short_share
        self._left: dict[RequestId, float] = {}
        self._shortest: RequestId | None = None  # of which the least is left; None: look for it
        self._updated = 0.0

    def __len__(self) -> int:
        return len(self._left)

    def __contains__(self, request: RequestId) -> bool:
        return request in self._left

    @property
    def updated(self) -> float:
        """The time of the figures."""
        return self._updated

    def left(self) -> Iterable[float]:
        """Seconds of each prompt, the oldest first, at `updated`. One that takes longer than
        predicted has none left until it is removed."""
        return self._left.values()

    def append(self, request: RequestId, seconds: float, now: float) -> None:
        self._advance(now)
        shortest = self._shortest
        if shortest is not None and seconds < self._left[shortest]:
            self._shortest = request
        self._left[request] = seconds

    def discard(self, request: RequestId, now: float) -> bool:
        """Computed, or given up. False: neither waits nor runs here."""
        if request not in self._left:
            return False
        self._advance(now)
        del self._left[request]
        if request == self._shortest:
            self._shortest = None
        return True

    def under_way(self) -> float:
        """Seconds of what can be computed before one of them has ended, at `updated`."""
        if not self._left:
            return 0.0
        oldest, shortest = self._served()
        seconds = self._left[oldest]
        return seconds if oldest == shortest else seconds + self._left[shortest]

    def _served(self) -> tuple[RequestId, RequestId]:
        oldest = next(iter(self._left))
        if not self.short_share or len(self._left) == 1:
            return oldest, oldest
        if self._shortest is None:
            self._shortest = min(self._left, key=self._left.__getitem__)
        return oldest, self._shortest

    def _advance(self, now: float) -> None:
        elapsed = now - self._updated
        self._updated = now
        left, share = self._left, self.short_share
        if not left or elapsed <= 0:
            return
        # One that should have ended keeps its place until it has: the others do not go on.
        oldest, shortest = self._served()
        if oldest == shortest:
            left[oldest] = max(0.0, left[oldest] - elapsed)
        else:
            left[oldest] = max(0.0, left[oldest] - elapsed * (1 - share))
            left[shortest] = max(0.0, left[shortest] - elapsed * share)
        known = self._shortest
        if known is not None and left[oldest] <= left[known]:
            self._shortest = oldest  # of equal ones the first
