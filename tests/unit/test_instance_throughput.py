"""When a refused client is told to come back."""

from __future__ import annotations

from memserve.clock import ManualClock
from memserve.instance.submission import MAX_RETRY_SECONDS, WINDOW_SECONDS, FinishRate


def test_the_wait_is_that_of_the_queue_at_the_recent_rate() -> None:
    clock = ManualClock()
    rate = FinishRate(clock)
    for _ in range(20):
        clock.advance(0.5)
        rate.record(1)
    assert rate.retry_after(waiting=10) == 5


def test_without_recent_ends_the_guess_is_short() -> None:
    clock = ManualClock()
    rate = FinishRate(clock)
    rate.record(1)
    clock.advance(WINDOW_SECONDS + 1)
    assert rate.retry_after(waiting=1000) == 1


def test_the_wait_has_bounds() -> None:
    clock = ManualClock()
    rate = FinishRate(clock)
    clock.advance(WINDOW_SECONDS)
    rate.record(1)
    assert rate.retry_after(waiting=1000) == MAX_RETRY_SECONDS
    rate.record(10_000)
    assert rate.retry_after(waiting=1) == 1
