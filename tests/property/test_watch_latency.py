"""Percentiles from differences of histograms, for any observations."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from memserve.api.histogram import LATENCY_BOUNDS, Histogram
from memserve.watch.latency import growth, percentiles, quantile
from memserve.watch.snapshot import merged
from tests.watch_harness import seen

SECONDS = st.lists(st.floats(0, 200, allow_nan=False), max_size=30)
SHARES = st.floats(0, 1)


@given(SECONDS, SECONDS)
def test_growth_is_what_was_observed_between(before: list[float], more: list[float]) -> None:
    grown = growth(seen(*before), seen(*before, *more))
    assert grown.counts == seen(*more).counts
    assert abs(grown.sum - sum(more)) < 1e-6


@given(SECONDS, SECONDS)
def test_growth_of_a_process_that_began_anew_is_its_own_count(
    before: list[float], after: list[float]
) -> None:
    old, new = seen(*before), seen(*after)
    grown = growth(old, new)
    assert min(grown.counts) >= 0
    if any(b < a for a, b in zip(old.counts, new.counts, strict=True)):
        assert grown is new


@given(SECONDS, SHARES)
def test_a_quantile_is_in_the_bucket_of_the_observation(values: list[float], share: float) -> None:
    found = quantile(seen(*values), share)
    if not values:
        assert found is None
        return
    ordered = sorted(values)
    rank = max(0, min(len(values) - 1, int(-(-share * len(values) // 1)) - 1))
    real = ordered[rank]
    above = [bound for bound in LATENCY_BOUNDS if bound >= real]
    below = [bound for bound in LATENCY_BOUNDS if bound < real]
    assert found is not None
    assert (below[-1] if below else 0.0) - 1e-9 <= found
    assert found <= (above[0] if above else LATENCY_BOUNDS[-1]) + 1e-9


@given(SECONDS)
def test_percentiles_are_in_order(values: list[float]) -> None:
    found = percentiles(seen(*values))
    assert found.count == len(values)
    if found.p50 is not None:
        assert found.p90 is not None
        assert found.p99 is not None
        assert 0 <= found.p50 <= found.p90 <= found.p99 <= LATENCY_BOUNDS[-1]


@given(st.lists(SECONDS, max_size=4))
def test_merged_is_all_observations(parts: list[list[float]]) -> None:
    every = seen(*(value for part in parts for value in part))
    assert merged(seen(*part) for part in parts).counts == every.counts
    assert merged([]).counts == Histogram().counts
