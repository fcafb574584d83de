"""The snapshot of several gateways, and the bounded history."""

from __future__ import annotations

from memserve.api.status import InstanceState
from memserve.cluster.figures import GatewayTotals
from memserve.types import InstanceId, Role
from memserve.watch import snapshot as snapshots
from memserve.watch.history import History, Point, policies_of
from memserve.watch.latency import GroupLatency
from memserve.watch.snapshot import snapshot_of
from tests.watch_harness import answer_of, busy_cluster, decision, member_of, seen, stats_of

OTHER = "http://127.0.0.1:8001"


def test_several_gateways_make_one_cluster() -> None:
    a, b = member_of("b", pid=1), member_of("a", pid=2)
    one = answer_of(
        10.0,
        [(a, stats_of(1))],
        GatewayTotals(running=1, first_token=seen(0.1)),
        [decision("x", 8)],
    )
    other = answer_of(
        10.0,
        [(a, stats_of(9)), (b, None)],
        GatewayTotals(running=2, first_token=seen(0.2, 5.0)),
        [decision("y", 109)],
        OTHER,
        ahead=100.0,
    )
    both = snapshot_of(10.0, [one, other])
    assert [member.id for member in both.members] == ["a", "b"]
    told = both.find("b")
    assert told is not None
    assert told.stats is not None
    assert told.stats.engine.generated_tokens == 1  # the first gateway's word
    assert both.totals.running == 3
    assert sum(both.totals.first_token.counts) == 3
    assert [(d.view.request, d.made) for d in both.decisions] == [("y", 9.0), ("x", 8.0)]
    assert (both.gateways, both.workers) == ((one.url, OTHER), 2)
    assert snapshot_of(1.0, []).members == ()


def test_decisions_are_bounded() -> None:
    many = [decision(str(i), i) for i in range(2 * snapshots.KEPT_DECISIONS)]
    kept = snapshot_of(0.0, [answer_of(0.0, [], decisions=many)]).decisions
    assert len(kept) == snapshots.KEPT_DECISIONS
    assert kept[0].view.request == str(2 * snapshots.KEPT_DECISIONS - 1)


def test_a_dead_member_runs_nothing() -> None:
    dead = answer_of(0.0, [(member_of("a", state=InstanceState.DEAD), stats_of(running=4))])
    (member,) = snapshot_of(0.0, [dead]).members
    assert (member.running, member.waiting, member.host) == (0, 0, "127.0.0.1")


def test_history_has_a_point_for_each_snapshot_but_the_first() -> None:
    history = History(window=4.0, kept=3)
    assert history.latest is None
    history.add(busy_cluster(20))
    assert history.points == ()
    for at in range(21, 30):
        history.add(busy_cluster(at))
    assert [point.at for point in history.points] == [27, 28, 29]
    point = history.points[-1]
    assert (point.tokens, point.computed, point.cached, point.received) == (150, 300, 100, 400)
    assert (point.answered, point.hit_ratio) == (10, 0.25)
    assert (point.running, point.waiting) == (4, 3)  # one of them waits at the gateway
    assert [p.failovers for p in history.points] == [0, 1, 0]
    assert history.rates.seconds == 4.0
    assert history.rates.of(InstanceId("d0")).tokens == 100
    assert point.latencies[Role.DECODE].first_token.count == 4
    assert point.policies["prompt-tree"].first_token.count == 4


def test_other_gateways_begin_the_rates_anew() -> None:
    history = History()
    history.add(snapshot_of(0.0, [answer_of(0.0, [], GatewayTotals(answered=5))]))
    history.add(snapshot_of(1.0, [answer_of(1.0, [], GatewayTotals(answered=900), url=OTHER)]))
    assert history.points == ()
    history.add(snapshot_of(2.0, [answer_of(2.0, [], GatewayTotals(answered=902), url=OTHER)]))
    assert [point.answered for point in history.points] == [2]


def test_policies_are_those_of_all_points_with_the_unknown_one_last() -> None:
    names = [("unknown", "session"), ("least-load",), ("session", "zone")]
    points = [Point(1.0, policies=dict.fromkeys(each, GroupLatency())) for each in names]
    assert policies_of(points) == ["least-load", "session", "zone", "unknown"]
    assert policies_of([]) == []
