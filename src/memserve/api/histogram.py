"""A latency histogram, also on the wire: counts per bucket and the sum, in seconds."""

from __future__ import annotations

from bisect import bisect_left
from typing import Annotated

import msgspec
from msgspec import Meta

# Upper bounds of the buckets, seconds, the last one open. From one decode step on a fast GPU
# to a long prompt on a CPU.
LATENCY_BOUNDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0),
)
_BUCKETS = len(LATENCY_BOUNDS) + 1
# One count for each bucket; decoders refuse any other number.
Counts = Annotated[
    list[Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]],
    Meta(min_length=_BUCKETS, max_length=_BUCKETS),
]


class Histogram(msgspec.Struct):
    """Observations in seconds. Not thread-safe: one event loop owns it."""

    counts: Counts = msgspec.field(default_factory=lambda: [0] * _BUCKETS)
    sum: Annotated[float, Meta(ge=0, lt=1e15)] = 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        self.counts[bisect_left(LATENCY_BOUNDS, seconds)] += times
        self.sum += seconds * times

    def cumulative(self) -> list[tuple[str, float]]:
        """Return Prometheus' buckets: (upper bound, observations at or below it)."""
        buckets = []
        total = 0
        for bound, count in zip((*map(str, LATENCY_BOUNDS), "+Inf"), self.counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        return buckets
