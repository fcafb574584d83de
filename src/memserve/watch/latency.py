"""The four latencies that are shown, and their percentiles between two snapshots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from memserve.api.histogram import LATENCY_BOUNDS, Histogram


class Percentiles(msgspec.Struct, frozen=True):
    """Seconds, and the number of observations. None: there were none."""

    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    count: int = 0


class GroupLatency(msgspec.Struct, frozen=True):
    """Latencies in seconds: of sequences at the members of one role, or of requests at the gateways
    of one policy."""

    first_token: Percentiles = Percentiles()
    inter_token: Percentiles = Percentiles()
    per_token: Percentiles = Percentiles()  # TPOT: means of sequences
    whole: Percentiles = Percentiles()


class LatencyKind(NamedTuple):
    """One of a group's latencies."""

    name: str
    title: str
    of: Callable[[GroupLatency], Percentiles]


LATENCIES = (
    LatencyKind("TTFT", "Time to first token (TTFT)", lambda group: group.first_token),
    LatencyKind("inter-token", "Between two tokens of a sequence", lambda group: group.inter_token),
    LatencyKind("TPOT", "Time per output token (TPOT)", lambda group: group.per_token),
    LatencyKind("JCT", "Arrival to the end (JCT)", lambda group: group.whole),
)


def growth(before: Histogram, after: Histogram) -> Histogram:
    """Return the observations between two readings; all of `after` if its process has begun anew
    (a count has fallen)."""
    counts = [b - a for a, b in zip(before.counts, after.counts, strict=True)]
    if min(counts) < 0:
        return after
    return Histogram(counts, max(after.sum - before.sum, 0.0))


def quantile(histogram: Histogram, share: float) -> float | None:
    """Return the seconds below which `share` of the observations are, interpolated within a bucket
    as Prometheus does; at most the largest finite bound. None without observations."""
    total = sum(histogram.counts)
    if not total:
        return None
    wanted, seen, low = share * total, 0, 0.0
    for bound, count in zip(LATENCY_BOUNDS, histogram.counts, strict=False):
        if count and seen + count >= wanted:
            return low + (bound - low) * max(wanted - seen, 0.0) / count
        seen, low = seen + count, bound
    return LATENCY_BOUNDS[-1]


def percentiles(histogram: Histogram) -> Percentiles:
    p50, p90, p99 = (quantile(histogram, share) for share in (0.5, 0.9, 0.99))
    return Percentiles(p50, p90, p99, sum(histogram.counts))


def worst(values: Sequence[float | None]) -> float | None:
    """Return the largest of the values that are known."""
    known = [value for value in values if value is not None]
    return max(known) if known else None
