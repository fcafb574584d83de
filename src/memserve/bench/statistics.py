"""Means over repeated runs, with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

# Student's t, two-sided 95 %, for 1, 2, 3 ... degrees of freedom; beyond them, the normal value.
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_NORMAL95 = 1.960


class Estimate(msgspec.Struct, frozen=True):
    """The mean of a figure over runs, and its 95 % confidence interval.

    For one run, `low` and `high` are the mean.
    """

    mean: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate | None:
        """Return the estimate by Student's t, since runs are few; None without values."""
        if not values:
            return None
        mean = float(np.mean(values))
        if len(values) == 1:
            return cls(mean, mean, mean, 1)
        half = t95(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
        return cls(mean, mean - half, mean + half, len(values))

    def shown(self, scale: float = 1.0) -> str:
        """Return the mean and half the interval, as `0.21 ±0.03`."""
        text = f"{self.mean * scale:.3g}"
        return text if self.runs == 1 else f"{text} ±{(self.high - self.mean) * scale:.2g}"


def t95(freedom: int) -> float:
    """Return Student's t for a two-sided 95 % interval; `freedom`: degrees of freedom, from 1."""
    return _T95[freedom - 1] if freedom <= len(_T95) else _NORMAL95


def relative_change(before: Sequence[float], after: Sequence[float]) -> Estimate | None:
    """Return the relative change from `before` to `after` over pairs of runs: -0.3 is 30 % less.

    Each pair has the same arrivals, whose effect on both cancels out. The mean is the geometric
    mean of ratios, so that 2 and 0.5 together are no change.
    """
    logs = [math.log(y / x) for x, y in zip(before, after, strict=True) if x > 0 and y > 0]
    found = Estimate.of(logs)
    if found is None:
        return None
    low, mean, high = (math.exp(value) - 1 for value in (found.low, found.mean, found.high))
    return Estimate(mean, low, high, found.runs)
