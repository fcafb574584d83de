"""Intervals over runs."""

from __future__ import annotations

import numpy as np
import pytest

from memserve.bench.measure import time_left
from memserve.bench.statistics import Estimate, relative_change, t95


def test_an_interval_by_students_t() -> None:
    found = Estimate.of([1.0, 2.0, 3.0])
    assert found is not None
    assert found.mean == pytest.approx(2.0)
    assert found.high - found.mean == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert found.low + found.high == pytest.approx(4.0)


def test_a_single_run_has_no_interval_and_none_has_no_estimate() -> None:
    assert Estimate.of([5.0]) == Estimate(5.0, 5.0, 5.0, 1)
    assert Estimate.of([]) is None


@pytest.mark.parametrize("runs", [3, 8, 40])
def test_the_interval_holds_the_true_mean_about_19_times_in_20(runs: int) -> None:
    rng = np.random.default_rng(runs)
    trials = 2000
    held = 0
    for _ in range(trials):
        found = Estimate.of(rng.normal(10.0, 2.0, runs).tolist())
        assert found is not None
        held += found.low <= 10.0 <= found.high
    assert held / trials == pytest.approx(0.95, abs=0.015)


def test_quantiles_fall_to_the_normals() -> None:
    values = [t95(freedom) for freedom in range(1, 60)]
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(1.96)


def test_a_change_is_taken_pair_by_pair() -> None:
    """Runs differ tenfold among each other, and the change is the same in each pair."""
    found = relative_change([1.0, 10.0, 5.0], [0.5, 5.0, 2.5])
    assert found is not None
    assert (found.low, found.mean, found.high) == pytest.approx((-0.5, -0.5, -0.5))


def test_twice_and_half_are_no_change_together() -> None:
    found = relative_change([1.0, 1.0], [2.0, 0.5])
    assert found is not None
    assert found.mean == pytest.approx(0.0)


def test_pairs_without_a_ratio_are_left_out() -> None:
    found = relative_change([0.0, 2.0], [1.0, 1.0])
    assert found == Estimate(-0.5, -0.5, -0.5, 1)
    assert relative_change([], []) is None


def test_the_time_left_is_that_of_the_pace_so_far() -> None:
    assert time_left(10, 40, 20.0) == ", about 60 s left"
    assert time_left(1, 100, 60.0) == ", about 99 min left"
    assert time_left(40, 40, 20.0) == ""
