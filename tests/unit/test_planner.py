"""What the planner decides where the answer is plain, and how it counts what arrives."""

from __future__ import annotations

import msgspec
import pytest
from rich.console import Console

from memserve.cli_cluster import planner_lines, planner_table
from memserve.config import PlannerConfig
from memserve.planner.contract import Action, LoadReport, Split
from memserve.planner.demand import (
    MEMORY_SECONDS,
    TURN_ANSWERS,
    TURN_SECONDS,
    DemandMeter,
    Traffic,
)
from memserve.planner.planner import ADD_LOOKS, LOOKS, REMOVE_LOOKS, merged
from memserve.scheduler.arrivals import KEPT_ARRIVALS, Arrival, Arrivals
from memserve.types import Role, SchedulerId
from tests.planner_harness import COSTS, ONE, Cluster, members_of

TIGHT = PlannerConfig(ttft=3.0, tpot=0.025, percentile=90)
EVEN = [*[Role.PREFILL] * 4, *[Role.DECODE] * 4]


def test_long_prompts_get_prefill_members_and_long_answers_decode_members() -> None:
    config = PlannerConfig(ttft=3.0, tpot=0.025, percentile=90, colocated=False)
    reading = Cluster(config, members_of(*EVEN), prompt=2000, output=50, rate=50)
    assert [one.action for one in reading.looks(10)] == [Action.ROLES]
    assert Split.of(reading.roles).prefill > 4
    writing = Cluster(config, members_of(*EVEN), prompt=500, output=1500, rate=6)
    assert [one.action for one in writing.looks(10)] == [Action.ROLES]
    assert Split.of(writing.roles).decode > 4


def test_a_load_that_turns_is_followed_and_back() -> None:
    config = PlannerConfig(ttft=3.0, tpot=0.025, percentile=90, colocated=False)
    cluster = Cluster(config, members_of(*EVEN), prompt=2000, output=50, rate=50)
    cluster.looks(10)
    first = Split.of(cluster.roles)
    cluster.prompt, cluster.output, cluster.rate = 500, 1500, 6
    cluster.looks(30)
    second = Split.of(cluster.roles)
    assert second.decode > first.decode
    cluster.prompt, cluster.output, cluster.rate = 2000, 50, 50
    cluster.looks(30)
    assert Split.of(cluster.roles).prefill > second.prefill


def test_nothing_changes_while_objectives_are_met_with_room() -> None:
    cluster = Cluster(TIGHT, members_of(*EVEN), prompt=500, output=50, rate=0.5)
    assert not cluster.looks(40)
    assert "worth" in cluster.decisions[-1].reason or "no other" in cluster.decisions[-1].reason


def test_the_first_look_that_wants_a_change_does_not_make_it() -> None:
    cluster = Cluster(TIGHT, members_of(*EVEN), prompt=2000, output=50, rate=50)
    actions = [cluster.look().action for _ in range(LOOKS + 2)]
    assert actions.index(Action.ROLES) == LOOKS  # one look to count arrivals, LOOKS to want it


def test_without_requests_nothing_is_decided() -> None:
    cluster = Cluster(TIGHT, members_of(*EVEN), rate=0)
    assert {cluster.look().action for _ in range(5)} == {Action.NOTHING}
    assert cluster.decisions[-1].reason == "no requests"
    assert cluster.decisions[-1].present.headroom > 1  # below 1 is an alert


def test_members_are_added_when_no_split_suffices_and_removed_when_fewer_do() -> None:
    config = PlannerConfig(ttft=3.0, tpot=0.025, max_members=12, min_members=4)
    cluster = Cluster(config, members_of(*EVEN), prompt=4000, output=200, rate=20)
    added = [one for one in cluster.looks(ADD_LOOKS + 20) if one.action is Action.ADD]
    assert added
    assert 8 < len(cluster.members) <= 12
    cluster.rate = 0.5
    removed = cluster.looks(9 * (REMOVE_LOOKS + 3))
    assert {one.action for one in removed} == {Action.REMOVE}
    assert len(cluster.members) == 4


@pytest.mark.parametrize("before", [0.0, 5.0])
def test_a_cluster_without_requests_shrinks_to_its_bounds(before: float) -> None:
    """Whether it has never had any, or has them no more."""
    config = PlannerConfig(
        ttft=3.0, tpot=0.025, max_members=12, min_members=3, min_decode=2, colocated=False
    )
    cluster = Cluster(config, members_of(*EVEN), rate=before)
    cluster.looks(10)
    cluster.rate = 0.0
    first = len(cluster.decisions)
    removed = cluster.looks(8 * (REMOVE_LOOKS + 3))
    assert [one.action for one in removed] == [Action.REMOVE] * 5
    assert all(one.count == 1 for one in removed)
    assert Split.of(cluster.roles) == Split(prefill=1, decode=2)
    actions = [one.action for one in cluster.decisions[first:]]
    assert actions.index(Action.REMOVE) >= REMOVE_LOOKS - 10


def test_roles_alone_without_requests_remove_nobody() -> None:
    cluster = Cluster(TIGHT, members_of(*EVEN), rate=0)
    assert not cluster.looks(2 * REMOVE_LOOKS)


def test_members_stay_while_what_arrives_is_not_known() -> None:
    """A gateway that starts again before each look has counted nothing, and may have been busy."""
    config = PlannerConfig(ttft=3.0, tpot=0.025, max_members=12, min_members=2)
    cluster = Cluster(config, members_of(*EVEN))
    for life in range(2 * REMOVE_LOOKS):
        report = msgspec.structs.replace(
            _report(cluster, 5.0 * life), scheduler=SchedulerId(str(life))
        )
        decision = cluster.planner.look(5.0 * life, [report], COSTS)
        assert decision.action is Action.NOTHING
    assert decision.reason == "requests are not counted yet"


def test_a_gateway_that_is_asked_at_two_urls_counts_once() -> None:
    cluster = Cluster(TIGHT, members_of(*EVEN))
    cluster.planner.look(0.0, [_report(cluster, 0.0)], COSTS)
    once = _report(cluster, 5.0, 250)
    decision = cluster.planner.look(5.0, [once, once], COSTS)
    assert decision.demand.requests_per_second == pytest.approx(50)


def test_members_that_start_are_waited_for() -> None:
    config = PlannerConfig(ttft=3.0, tpot=0.025, max_members=12)
    cluster = Cluster(config, members_of(*EVEN), prompt=4000, output=200, rate=20)
    cluster.looks(ADD_LOOKS - 2)
    report = _report(cluster, 1000.0)
    for _ in range(20):
        cluster.now += 5
        report = _report(cluster, report.now + 5, report.requests + 100)
        decision = cluster.planner.look(cluster.now, [report], COSTS, starting=1)
        assert decision.action is not Action.ADD


def test_without_a_backend_s_limit_no_member_is_added() -> None:
    cluster = Cluster(TIGHT, members_of(*EVEN), prompt=4000, output=200, rate=200)
    assert Action.ADD not in {one.action for one in cluster.looks(40)}


def test_a_decision_is_explained() -> None:
    cluster = Cluster(TIGHT, members_of(*EVEN), prompt=2000, output=50, rate=50)
    (decision,) = cluster.looks(10)
    assert decision.summary().startswith("roles: ")
    assert "4P4D" in decision.summary()
    assert str(decision.considered[0].split) in decision.reason
    assert decision.demand.requests_per_second == pytest.approx(50, rel=0.05)
    assert decision.demand.prompt_tokens == pytest.approx(2000)


# --- what arrives ---------------------------------------------------------------------------------


def test_rate_and_prompts_are_weighted_alike_when_a_load_turns() -> None:
    """Few long prompts behind many short ones: long ones at the short ones' rate would be a load
    that never was."""
    meter = DemandMeter()
    now = requests = 0.0
    work = []
    for rate, tokens in [*[(300, 100)] * 20, *[(3, 10_000)] * 20]:
        now += 5
        requests += rate * 5
        arrivals = tuple(Arrival(now - 4 + 0.01 * at, tokens, 0) for at in range(15))
        report = LoadReport(
            scheduler=ONE, now=now, members=(), requests=int(requests), arrivals=arrivals
        )
        traffic = meter.look(now, [report])
        if traffic is not None:
            mean = sum(
                w * one.prompt_tokens
                for w, one in zip(traffic.weights, traffic.prompts, strict=True)
            ) / sum(traffic.weights)
            work.append(traffic.rate * mean)
    assert max(work) <= 30_000 * 1.01
    assert min(work) >= 30_000 * 0.99
    assert traffic is not None
    assert traffic.rate == pytest.approx(3, rel=0.05)


def test_a_scheduler_that_starts_again_is_no_burst_of_requests() -> None:
    meter = DemandMeter()
    lives = ("first", "first", "second", "second")
    for life, now, requests in zip(lives, range(0, 20, 5), (1000, 1050, 1060, 1110), strict=True):
        traffic = meter.look(now, [_counted(life, now, requests)])
    assert traffic is not None
    assert traffic.rate == pytest.approx(10)


@pytest.mark.parametrize("absent", [set(), {"a"}, {"b"}])
def test_reports_come_in_any_order_and_not_from_all(absent: set[str]) -> None:
    """Counters of 100 and of 5,000, of which each grows by 5 in a look: 2 requests a second."""
    meter = DemandMeter()
    for look in range(12):
        now = 5.0 * look
        reports = [
            _counted("a", now, 100 + 5 * look),
            _counted("b", now + 1000, 5000 + 5 * look),
        ]
        if look in (4, 5, 8):
            reports = [one for one in reports if one.scheduler not in absent]
        traffic = meter.look(now, reports[:: (-1) ** look])
        if look and traffic is not None:
            assert 0.99 <= traffic.rate <= 2.01
    assert traffic is not None
    assert traffic.settled
    assert absent or traffic.rate == pytest.approx(2)


def test_answers_of_a_gateway_that_comes_are_none_of_a_load_that_has_just_turned() -> None:
    meter = DemandMeter()
    requests = 0
    for look in range(6):
        requests += 20 if look < 5 else 2000
        meter.look(5.0 * look, [_counted("a", 5.0 * look, requests)])
    both = [
        [
            _counted("a", now, requests + 2000 * more),
            msgspec.structs.replace(_counted("b", now, 0), answers=10 * TURN_ANSWERS),
        ]
        for more, now in ((1, 30.0), (2, 35.0))
    ]
    for reports in both:
        traffic = meter.look(reports[0].now, reports)
        assert traffic is not None
        assert not traffic.settled


def _counted(scheduler: str, now: float, requests: int) -> LoadReport:
    return LoadReport(
        scheduler=SchedulerId(scheduler),
        now=now,
        members=(),
        requests=requests,
        arrivals=(Arrival(now - 1, 10, 0),),
    )


def test_several_schedulers_add_up() -> None:
    meter = DemandMeter()
    for now in (0.0, 5.0):
        reports = [
            _counted(str(rate), now + skew, int(now * rate))
            for rate, skew in ((2, 0.0), (4, 1000.0))
        ]
        traffic = meter.look(now, reports)
    assert traffic is not None
    assert traffic.rate == pytest.approx(6)


def test_arrivals_are_bounded_and_counted() -> None:
    arrivals = Arrivals()
    for at in range(KEPT_ARRIVALS + 10):
        arrivals.add(float(at), 5, 0)
    assert arrivals.total == KEPT_ARRIVALS + 10
    assert [one.at for one in arrivals.since(KEPT_ARRIVALS + 7)] == [
        KEPT_ARRIVALS + 8,
        KEPT_ARRIVALS + 9,
    ]
    assert len(arrivals.since(-1.0)) == KEPT_ARRIVALS


def test_reservations_of_several_gateways_are_added_up() -> None:
    (one,) = members_of(Role.PREFILL)
    first = msgspec.structs.replace(one, queue_seconds=1.0, answers=3)
    second = msgspec.structs.replace(one, queue_seconds=2.0, answers=4)
    reports = [
        LoadReport(scheduler=ONE, now=0, members=(each,), requests=0) for each in (first, second)
    ]
    (both,) = merged(reports)
    assert both.queue_seconds == 3.0
    assert both.answers == 4  # each counts the other's, too


def test_old_loads_are_forgotten() -> None:
    meter = DemandMeter()
    report = LoadReport(scheduler=ONE, now=0.0, members=(), requests=0)
    meter.look(0.0, [report])
    arrivals = (Arrival(1.0, 10, 0),)
    assert meter.look(
        5.0, [LoadReport(scheduler=ONE, now=5.0, members=(), requests=9, arrivals=arrivals)]
    )
    later = 5.0 + 10 * MEMORY_SECONDS
    assert meter.look(later, [LoadReport(scheduler=ONE, now=later, members=(), requests=9)]) is None


def _report(cluster: Cluster, now: float, requests: int = 0) -> LoadReport:
    return LoadReport(
        scheduler=ONE,
        now=now,
        members=tuple(cluster.members),
        requests=requests,
        arrivals=tuple(Arrival(now - 1 + 0.01 * at, 4000, 0) for at in range(64)),
        output_tokens=200,
    )


class Counted:
    """A scheduler's counters, look by look, each 5 s after the one before."""

    def __init__(self) -> None:
        self.meter = DemandMeter()
        self.now = 0.0
        self.requests = 0
        self.answers = 0

    def look(self, rate: float, answers: int = 0) -> Traffic | None:
        self.now += 5.0
        self.requests += int(5 * rate)
        self.answers += answers
        report = LoadReport(
            scheduler=ONE,
            now=self.now,
            members=(),
            requests=self.requests,
            arrivals=(Arrival(self.now - 1, 100, 0),),
            answers=self.answers,
        )
        return self.meter.look(self.now, [report])


def test_a_load_that_turns_is_seen_at_the_next_look() -> None:
    counted = Counted()
    for _ in range(20):
        counted.look(4)
    more = counted.look(300)
    assert more is not None
    assert more.rate == pytest.approx(300)
    assert not more.settled
    less = counted.look(4)
    assert less is not None
    assert less.rate == pytest.approx(4)


def test_a_load_that_varies_is_no_turn() -> None:
    counted = Counted()
    for rate in (100, 110, 90, 120, 85, 100) * 3:
        traffic = counted.look(rate)
    assert traffic is not None
    assert traffic.settled
    assert traffic.rate == pytest.approx(100, rel=0.1)


@pytest.mark.parametrize("answers", [0, TURN_ANSWERS // 2])
def test_after_a_turn_nothing_is_decided_until_answers_are_known(answers: int) -> None:
    counted = Counted()
    for _ in range(5):
        counted.look(4)
    turned = counted.look(300)
    assert turned is not None
    assert not turned.settled
    looks = [counted.look(300, answers) for _ in range(7)]
    settled = [one is not None and one.settled for one in looks]
    first = 1 if answers else int(TURN_SECONDS // 5) - 1
    assert settled == [False] * first + [True] * (7 - first)


def test_the_command_shows_the_present_split_the_others_and_what_was_decided() -> None:
    cluster = Cluster(TIGHT, members_of(*EVEN), prompt=2000, output=50, rate=50)
    (decision,) = cluster.looks(10)
    console = Console(width=200)
    with console.capture() as captured:
        console.print(planner_table(decision))
        for line in planner_lines(decision):
            console.print(line)
    page = captured.get()
    assert "50.00 requests/s of 2000 tokens" in page
    assert "* 4P4D" in page
    assert str(decision.considered[0].split) in page
    assert f"roles: {decision.reason}" in page
    for change in decision.changes:
        assert f"{change.member}: {change.before} -> {change.after}" in page


def test_learnt_times_count_of_members_that_do_such_work() -> None:
    """A prefill member knows nothing of decode steps, and one that has just become a decode member
    has not learnt."""
    members = members_of(Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE)
    slow = [
        msgspec.structs.replace(members[0], step_factor=1.0),
        members[1],
        msgspec.structs.replace(members[2], step_factor=5.0),
        members[3],
    ]
    config = PlannerConfig(ttft=30.0, tpot=1.0)
    found = []
    for some in (members, slow):
        cluster = Cluster(config, some, rate=1.0)
        cluster.look()
        found.append(cluster.look().present.tpot)
    plain, busy = found
    assert plain is not None
    assert busy is not None
    assert busy > 4.5 * plain
