"""Corrections converge to what is real, and do not run away."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.scheduler.contract import TransferPath
from memserve.scheduler.hardware import cost_model
from memserve.scheduler.refined_costs import RefinedCosts

MODEL = cost_model("h800", "llama2-13b", tp=2)


def feed(refined: RefinedCosts, ratios: list[float]) -> None:
    rng = np.random.default_rng(0)
    for ratio in ratios:
        prompt = int(rng.integers(64, 8192))
        cached = int(prompt * rng.uniform(0, 0.9))
        refined.observe_prefill(
            prompt, cached, ratio * float(MODEL.prefill_seconds(prompt, cached))
        )


def test_nothing_is_corrected_at_first() -> None:
    refined = RefinedCosts(MODEL)
    assert float(refined.prefill_seconds(4096, 512)) == float(MODEL.prefill_seconds(4096, 512))
    assert refined.kv_bytes_per_token == MODEL.kv_bytes_per_token
    feed(refined, [3.0] * 4)  # too few to go by
    assert refined.factor("prefill") == 1.0


@pytest.mark.parametrize("real", [0.4, 0.8, 1.0, 1.7, 5.0])
def test_the_factor_converges(real: float) -> None:
    refined = RefinedCosts(MODEL)
    rng = np.random.default_rng(1)
    feed(refined, (real * rng.lognormal(0, 0.1, 200)).tolist())
    assert refined.factor("prefill") == pytest.approx(real, rel=0.1)
    assert float(refined.prefill_seconds(4096, 0)) == pytest.approx(
        real * float(MODEL.prefill_seconds(4096, 0)), rel=0.1
    )


def test_waiting_is_not_taken_for_computing() -> None:
    """A third of the requests waited for something, much longer than they computed."""
    refined = RefinedCosts(MODEL)
    rng = np.random.default_rng(2)
    ratios = 1.3 * rng.lognormal(0, 0.05, 300)
    waited = rng.random(300) < 0.33
    ratios[waited] += rng.exponential(10, int(waited.sum()))
    feed(refined, ratios.tolist())
    assert refined.factor("prefill") == pytest.approx(1.3, rel=0.1)


def test_a_change_is_followed_within_some_dozens_of_requests() -> None:
    refined = RefinedCosts(MODEL)
    feed(refined, [1.0] * 200)
    feed(refined, [2.0] * 64)
    assert refined.factor("prefill") == pytest.approx(2.0, rel=0.1)
    feed(refined, [1.0] * 64)
    assert refined.factor("prefill") == pytest.approx(1.0, rel=0.1)


def test_kinds_are_corrected_apart() -> None:
    refined = RefinedCosts(MODEL)
    for _ in range(60):
        refined.observe_decode_step(8, 9000, 2 * float(MODEL.decode_step_seconds(8, 9000)))
        refined.observe_transfer(
            10**8, 100, "nixl", 3 * float(MODEL.transfer_seconds(10**8, 100, "nixl"))
        )
    assert refined.factor("prefill") == 1.0
    assert refined.factor("decode") == pytest.approx(2.0, rel=0.05)
    assert refined.factor("nixl") == pytest.approx(3.0, rel=0.05)
    assert refined.factor("shm") == 1.0
    assert float(refined.decode_step_seconds(4, 100)) == pytest.approx(
        2 * float(MODEL.decode_step_seconds(4, 100)), rel=0.05
    )
    assert float(refined.transfer_seconds(10**6, 1, "nixl")) == pytest.approx(
        3 * float(MODEL.transfer_seconds(10**6, 1, "nixl")), rel=0.05
    )
    paths: tuple[TransferPath, ...] = ("shm", "host")
    for path in paths:
        whole = float(MODEL.transfer_seconds(10**6, 1, path))
        assert float(refined.transfer_seconds(10**6, 1, path)) == whole


def test_a_link_may_be_a_hundred_times_slower_than_assumed() -> None:
    """As an Ethernet of 1 Gbit/s is, beside an adapter of 400 Gbit/s."""
    refined = RefinedCosts(MODEL)
    for _ in range(60):
        whole = float(MODEL.transfer_seconds(10**8, 100, "nixl"))
        refined.observe_transfer(10**8, 100, "nixl", 300 * whole)
    assert refined.factor("nixl") == pytest.approx(300.0, rel=0.05)


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=80))
def test_nothing_that_is_observed_makes_predictions_useless(seconds: list[float]) -> None:
    refined = RefinedCosts(MODEL)
    for value in seconds:
        refined.observe_prefill(1000, 0, value)
    assert 1 / 8.001 < refined.factor("prefill") < 8.001
