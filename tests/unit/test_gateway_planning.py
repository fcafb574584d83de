"""What a gateway's worker reports of the planner's decisions, and for how long."""

from __future__ import annotations

from memserve.api.metric import page_of
from memserve.clock import ManualClock
from memserve.gateway.planning import STALE_INTERVALS, PlannerBoard
from memserve.planner.contract import Action, Decision, Demand, LoadReport, Prediction, Split

SHORT = Prediction(split=Split(prefill=1, decode=1), headroom=0.5, served=0.25)


def no_load() -> LoadReport:
    raise AssertionError("it is not asked for")


def decision(interval: float) -> Decision:
    return Decision(
        at=0.0,
        action=Action.NOTHING,
        reason="as told",
        demand=Demand(),
        present=SHORT,
        interval=interval,
    )


async def test_a_worker_that_the_planner_left_does_not_show_its_old_headroom() -> None:
    """The next decisions reach another worker, or none any more."""
    clock = ManualClock()
    board = PlannerBoard(no_load, clock)
    assert b"\nmemserve_planner_headroom_ratio " not in await page_of([board])
    for interval in (2.0, 60.0):
        board.post(decision(interval))
        clock.advance(STALE_INTERVALS * interval)
        page = await page_of([board])
        assert b"memserve_planner_headroom_ratio 0.5\n" in page
        assert b"memserve_planner_served_ratio 0.25\n" in page
        clock.advance(1.0)
        page = await page_of([board])
        assert b"\nmemserve_planner_headroom_ratio " not in page
        assert b"\nmemserve_planner_served_ratio " not in page
        assert b"memserve_planner_age_seconds %.1f\n" % (STALE_INTERVALS * interval + 1) in page
    assert b'memserve_planner_decisions_total{action="nothing"} 2.0\n' in page
