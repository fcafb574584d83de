"""Whether a figure that is sampled over hours stays where it is."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

# Of the run: caches and pools fill, and what is made late is made.
WARM_UP_SHARE = 0.25
# Fewer samples behind the warm-up say nothing.
MIN_SAMPLES = 8
_MOST_SAMPLES = 1_000  # that slopes are taken between: pairs are their square


class Tolerance(msgspec.Struct, frozen=True):
    """How much more the last quarter may have than the first, to be the same: the greater of
    the two."""

    absolute: float
    relative: float  # of the first quarter


class Trend(msgspec.Struct, frozen=True):
    """One figure of one process, behind the warm-up."""

    samples: int
    first: float  # median of the first quarter
    last: float  # of the last
    highest: float
    per_hour: float  # Theil-Sen: the median of the slopes between all pairs of samples
    flat: bool | None  # None: too few samples

    @property
    def growth(self) -> float:
        return self.last - self.first


def trend_of(times: Sequence[float], values: Sequence[float], tolerance: Tolerance) -> Trend | None:
    """`times`: seconds, rising. None without values.

    A figure grows if its last quarter has more than its first one by more than the tolerance,
    and its slope says so as well: a single peak moves neither median, nor slope.
    """
    if not values:
        return None
    begin = times[0] + WARM_UP_SHARE * (times[-1] - times[0])
    behind = [at >= begin for at in times]
    at = np.array(times)[behind]
    seen = np.array(values, dtype=np.float64)[behind]
    quarter = max(1, len(seen) // 4)
    first, last = float(np.median(seen[:quarter])), float(np.median(seen[-quarter:]))
    slope = theil_sen(at, seen)
    flat = None
    if len(seen) >= MIN_SAMPLES:
        allowed = max(tolerance.absolute, tolerance.relative * first)
        flat = last - first <= allowed or slope * float(at[-1] - at[0]) <= allowed
    return Trend(len(seen), first, last, float(seen.max()), slope * 3600, flat)


def theil_sen(times: np.ndarray, values: np.ndarray) -> float:
    """The median slope, per second; robust against up to 29 % of outliers. 0 for one sample."""
    step = -(-len(times) // _MOST_SAMPLES)
    times, values = times[::step], values[::step]
    earlier, later = np.triu_indices(len(times), 1)
    spans = times[later] - times[earlier]
    apart = spans > 0
    if not apart.any():
        return 0.0
    return float(np.median((values[later] - values[earlier])[apart] / spans[apart]))
