"""Histograms of latencies and of tokens, also on the wire: counts per bucket and the sum."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

# Upper bounds of the buckets, seconds, the last one open. From one decode step on a fast GPU
# to a long prompt on a CPU.
LATENCY_BOUNDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0),
)
# Upper bounds in tokens: of prompts and answers, up to the longest contexts.
TOKEN_BOUNDS = tuple(digit * 10**power for power in range(7) for digit in (1, 2, 5))[:-2]
_BUCKETS = len(LATENCY_BOUNDS) + 1
_TOKEN_BUCKETS = len(TOKEN_BOUNDS) + 1
# The same, as Prometheus writes them.
_NAMES = (*map(str, LATENCY_BOUNDS), "+Inf")
_TOKEN_NAMES = (*(str(float(bound)) for bound in TOKEN_BOUNDS), "+Inf")
_Observations = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
# One count for each bucket; decoders refuse any other number.
Counts = Annotated[list[_Observations], Meta(min_length=_BUCKETS, max_length=_BUCKETS)]
TokenCounts = Annotated[
    list[_Observations], Meta(min_length=_TOKEN_BUCKETS, max_length=_TOKEN_BUCKETS)
]


class Histogram(msgspec.Struct):
    """Observations in seconds. Not thread-safe: one event loop owns it."""

    bounds: ClassVar[tuple[str, ...]] = _NAMES
    counts: Counts = msgspec.field(default_factory=lambda: [0] * _BUCKETS)
    sum: Annotated[float, Meta(ge=0, lt=1e15)] = 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        self.counts[bisect_left(LATENCY_BOUNDS, seconds)] += times
        self.sum += seconds * times

    def cumulative(self) -> list[int]:
        """Return the observations at or below each of `bounds`."""
        return list(accumulate(self.counts))


class TokenHistogram(msgspec.Struct):
    """Observed numbers of tokens. Not thread-safe: one event loop owns it."""

    bounds: ClassVar[tuple[str, ...]] = _TOKEN_NAMES
    counts: TokenCounts = msgspec.field(default_factory=lambda: [0] * _TOKEN_BUCKETS)
    sum: _Observations = 0

    def observe(self, tokens: int) -> None:
        self.counts[bisect_left(TOKEN_BOUNDS, tokens)] += 1
        self.sum += tokens

    def cumulative(self) -> list[int]:
        """Return the observations at or below each of `bounds`."""
        return list(accumulate(self.counts))
