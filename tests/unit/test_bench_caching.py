"""What the comparison of caching steps reduces its records to."""

from __future__ import annotations

import pytest

from memserve.api.request_stats import RequestStats
from memserve.api.status import HandoffTotals
from memserve.bench.caching import by_turn, sum_of
from memserve.bench.loadgen import RequestRecord


def record(turn: int, cached: int, first: float, end: float, error: str | None) -> RequestRecord:
    figures = RequestStats(cached, cached // 2, 0, 3, 300, 200, 0, 0, 0, 0, 0, 0)
    times = (1.0, 1.0, first, (first, end), end)
    return RequestRecord("s", turn, *times, 100, cached, 2, error, figures)


def test_turns_are_reduced_apart_and_without_failures() -> None:
    records = [
        record(0, 0, 2.0, 4.0, None),
        record(1, 80, 1.5, 2.0, None),
        record(1, 40, 1.25, 3.0, None),
        record(1, 0, 9.0, 9.0, "HTTP 503"),
    ]
    first, second = by_turn(records)
    assert (first.turn, first.requests, first.cached_ratio) == (0, 1, 0.0)
    assert (second.turn, second.requests) == (1, 2)
    assert second.cached_ratio == pytest.approx(0.6)
    assert second.cached_ratio_decode == pytest.approx(0.3)
    assert second.computed_tokens == pytest.approx(40)
    assert (second.blocks_sent, second.bytes_sent, second.bytes_avoided) == (6, 600, 400)
    assert second.ttft is not None
    assert second.ttft.mean == pytest.approx(0.375)
    assert second.jct is not None
    assert second.jct.mean == pytest.approx(1.5)


def test_decode_instances_are_added_up_but_not_their_block_size() -> None:
    one = HandoffTotals(asked=2, blocks_received=3, prefill_seconds=0.5, block_bytes=64)
    two = HandoffTotals(asked=1, blocks_returned=4, prefill_seconds=0.25, block_bytes=64)
    assert sum_of([one, two]) == HandoffTotals(
        asked=3, blocks_received=3, blocks_returned=4, prefill_seconds=0.75, block_bytes=64
    )
    assert sum_of([]) == HandoffTotals()
