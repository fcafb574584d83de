"""Figures as short text, and reasons in words."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.scheduler.contract import Terms
from memserve.scheduler.decision_view import DecisionView, Outcome
from memserve.types import InstanceId
from memserve.watch import text
from memserve.watch.reasons import others, predicted, reason, state
from tests.watch_harness import decision


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (0, "0"),
        (0.25, "0.2"),
        (9.96, "10"),
        (999, "999"),
        (999.9, "1.0 k"),
        (1234, "1.2 k"),
        (35_400_000, "35 M"),
        (-1500, "-1.5 k"),
    ],
)
def test_numbers_are_short(value: float | None, shown: str) -> None:
    assert text.short(value) == shown


def test_units() -> None:
    assert text.size(2_300_000) == "2.3 MB"
    assert text.size(12) == "12 B"
    assert [text.seconds(s) for s in (None, 0.0004, 0.0304, 0.9996, 12.34, 250)] == [
        *("-", "0.4 ms", "30 ms", "1.0 s", "12.3 s", "250 s")
    ]
    assert [text.age(s) for s in (-1, 59.9, 61, 7300)] == ["0 s", "59 s", "1 min", "2 h"]
    assert (text.share(None), text.share(0.256)) == ("-", "26%")


def test_a_sparkline_goes_from_zero_to_the_largest() -> None:
    assert text.sparkline([0, 5, None, 10], 6) == "  ▁▅ █"
    assert text.sparkline([1.0] * 50, 3) == "███"
    assert text.sparkline([0, 0], 2) == "▁▁"
    assert text.sparkline([], 3) == "   "


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=6), st.integers(6, 60))
def test_cells_add_up_and_show_whatever_there_is(counts: list[int], width: int) -> None:
    given_ = text.cells(counts, width)
    assert sum(given_) == (width if any(counts) else 0)
    for count, cells in zip(counts, given_, strict=True):
        assert (cells > 0) is (count > 0)
        if sum(counts):
            assert abs(cells - count * width / sum(counts)) < len(counts) + 1


def alone(view: DecisionView) -> DecisionView:
    return msgspec.structs.replace(view, candidates=(view.chosen,))


def test_a_reason_names_what_set_the_chosen_one_apart() -> None:
    view = decision("x")
    assert reason(view) == "64 of 100 tokens cached; 200 ms less prefill than d1"
    assert reason(alone(view)) == "64 of 100 tokens cached; the only candidate"
    assert [c.instance for c in others(view)] == ["d1"]
    swapped = msgspec.structs.replace(
        view, chosen=view.candidates[1], policy="round-robin", candidates=view.candidates
    )
    assert reason(swapped) == (
        "0 of 100 tokens cached; round-robin, though p0 → d0 is 400 ms better"
    )
    same = msgspec.structs.replace(view.candidates[1], terms=Terms(), score=0.5)
    tied = msgspec.structs.replace(view.chosen, terms=Terms())
    both = msgspec.structs.replace(view, chosen=tied, candidates=(tied, same))
    assert reason(both).endswith("as good as d1")


def test_where_names_who_gives_computes_and_answers() -> None:
    fetched = msgspec.structs.replace(
        decision("x").chosen, fetch=InstanceId("p9"), fetched_tokens=32
    )
    assert fetched.path == "p9 ⇢ p0 → d0"
    view = msgspec.structs.replace(decision("x"), chosen=fetched, candidates=(fetched,))
    assert reason(view) == "64 of 100 tokens cached, 32 fetched; the only candidate"


def test_states_and_predictions() -> None:
    assert predicted(decision("x").chosen) == (pytest.approx(0.35), pytest.approx(1.35))
    states = [state(decision("x", 0.0, o)) for o in (None, Outcome(0.1), Outcome(None, 2.0))]
    assert states == ["runs", "streams", "ended"]
