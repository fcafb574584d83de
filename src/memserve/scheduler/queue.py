"""`PrefillQueue`: the prompts queued or in prefill on one instance, and the seconds left of each.

An instance gives `short_share` of each step to the prompt with the least left, and the rest to the
oldest. With 0 it computes prompts in order of arrival, as vLLM does.
"""

from __future__ import annotations

from collections.abc import Iterable

from memserve.types import RequestId


class PrefillQueue:
    """Predicted seconds left of each prompt, in order of arrival, advanced with the clock."""

    __slots__ = ("_left", "_shortest", "_updated", "short_share")

    def __init__(self, short_share: float) -> None:
        self.short_share = short_share
        self._left: dict[RequestId, float] = {}
        self._shortest: RequestId | None = None  # with the least left; None: to be searched
        self._updated = 0.0

    def __len__(self) -> int:
        return len(self._left)

    def __contains__(self, request: RequestId) -> bool:
        return request in self._left

    @property
    def updated(self) -> float:
        """Time of the figures, seconds of the caller's clock."""
        return self._updated

    def left(self) -> Iterable[float]:
        """Seconds left of each prompt at `updated`, the oldest first. A prompt that takes longer
        than predicted has 0 until `discard`."""
        return self._left.values()

    def append(self, request: RequestId, seconds: float, now: float) -> None:
        self._advance(now)
        shortest = self._shortest
        if shortest is not None and seconds < self._left[shortest]:
            self._shortest = request
        self._left[request] = seconds

    def discard(self, request: RequestId, now: float) -> bool:
        """Remove a prompt: it is computed, or given up. Returns False if it is not queued."""
        if request not in self._left:
            return False
        self._advance(now)
        del self._left[request]
        if request == self._shortest:
            self._shortest = None
        return True

    def under_way(self) -> float:
        """Seconds left, at `updated`, of the prompts in prefill: the oldest and the shortest."""
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
        # A prompt with 0 left keeps its share until `discard`: the others do not advance.
        oldest, shortest = self._served()
        if oldest == shortest:
            left[oldest] = max(0.0, left[oldest] - elapsed)
        else:
            left[oldest] = max(0.0, left[oldest] - elapsed * (1 - share))
            left[shortest] = max(0.0, left[shortest] - elapsed * share)
        known = self._shortest
        if known is not None and left[oldest] <= left[known]:
            self._shortest = oldest  # ties: the oldest
