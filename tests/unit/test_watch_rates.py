"""Rates between two snapshots: the right value, also when processes begin anew."""

from __future__ import annotations

import msgspec
import pytest

from memserve.api.status import FetchTotals, InstanceState, Latencies, PeerMoves, PoolTotals
from memserve.cluster.figures import ClusterFigures, GatewayTotals
from memserve.cluster.member import ClusterView
from memserve.types import Epoch, InstanceId, Role
from memserve.watch.latency import GroupLatency, Percentiles
from memserve.watch.rates import Flow, FlowKind, failovers_between, rates_between
from memserve.watch.snapshot import UNKNOWN, GatewaySeen, Snapshot, snapshot_of
from tests.watch_harness import answer_of, busy_cluster, member_of, seen, snapshot, stats_of

A, B = InstanceId("a"), InstanceId("b")


def test_rates_of_a_steady_cluster() -> None:
    rates = rates_between(busy_cluster(10), busy_cluster(14))
    assert rates.of(InstanceId("d0")).tokens == 100
    assert rates.of(InstanceId("d0")).hit_ratio is None  # everything was received
    assert (rates.of(InstanceId("p0")).computed, rates.of(InstanceId("p0")).cached) == (300, 100)
    assert rates.of(InstanceId("p0")).hit_ratio == 0.25
    assert (rates.whole.tokens, rates.whole.received, rates.whole.hit_ratio) == (150, 400, 0.25)
    assert (rates.answered, rates.refused, rates.failed) == (10, 1, 0)
    assert rates.flows == (
        Flow(InstanceId("p0"), InstanceId("d0"), FlowKind.FORWARD, 1 << 20),
        Flow(InstanceId("d0"), InstanceId("p0"), FlowKind.RETURN, 1 << 10),
        Flow(InstanceId("d0"), InstanceId("d1"), FlowKind.FORWARD, 1 << 19),
    )
    assert rates.kv_bytes == (1 << 20) + (1 << 10) + (1 << 19)


def test_latencies_are_of_a_role_and_of_the_time_between() -> None:
    before = Latencies(first_token=seen(50.0))
    after = Latencies(first_token=seen(50.0, 0.02, 0.02), whole=seen(0.8))
    first, second = (
        snapshot(at, [(member_of("a", Role.DECODE), stats_of(latencies=times))])
        for at, times in ((0.0, before), (1.0, after))
    )
    found = rates_between(first, second).latencies
    assert set(found) == {Role.DECODE}
    told = found[Role.DECODE]
    assert (told.first_token.count, told.whole.count, told.inter_token.count) == (2, 1, 0)
    assert told.first_token.p99 is not None
    assert 0.01 < told.first_token.p99 <= 0.025
    assert told.inter_token.p50 is None


def test_a_restarted_member_counts_from_zero() -> None:
    before = snapshot(0.0, [(member_of("a", pid=1), stats_of(1000, moves={B: PeerMoves(500)}))])
    after = snapshot(2.0, [(member_of("a", pid=2), stats_of(2000, moves={B: PeerMoves(600)}))])
    rates = rates_between(before, after)
    assert rates.of(A).tokens == 1000  # 2000 in two seconds
    assert rates.flows == (Flow(B, A, FlowKind.FORWARD, 300),)


def test_fallen_counters_count_from_zero_within_one_life_too() -> None:
    member = member_of("a")
    rates = rates_between(
        snapshot(0.0, [(member, stats_of(1000))], GatewayTotals(failovers=7, answered=9)),
        snapshot(2.0, [(member, stats_of(40))], GatewayTotals(failovers=2, answered=4)),
    )
    assert (rates.of(A).tokens, rates.answered) == (20, 2)


@pytest.mark.parametrize("state", [InstanceState.STARTING, InstanceState.DEAD])
def test_a_member_without_figures_has_no_rates(state: InstanceState) -> None:
    told = (member_of("a"), stats_of(5))
    untold = (member_of("a", state=state), None)
    for before, after in ((told, untold), (untold, told), (untold, untold)):
        rates = rates_between(snapshot(0.0, [before]), snapshot(1.0, [after]))
        assert rates.members == {}
        assert rates.whole.tokens == 0


def test_a_new_member_has_rates_from_its_second_snapshot_on() -> None:
    rates = rates_between(snapshot(0.0, []), snapshot(1.0, [(member_of("a"), stats_of(10**6))]))
    assert rates.whole.tokens == 0


def test_statistics_that_are_the_same_ones_give_no_rate() -> None:
    same = snapshot(5.0, [(member_of("a"), stats_of(10))])
    assert rates_between(same, same).of(A).tokens == 0


def test_failovers() -> None:
    one, two = (snapshot(float(n), [], GatewayTotals(failovers=n)) for n in (3, 5))
    assert failovers_between(one, two) == 2
    assert failovers_between(two, one) == 3  # a gateway that begins anew


def test_cached_tokens_are_told_by_where_they_were() -> None:
    """Blocks that came back from DRAM, or from a third instance, are cached when they are used."""
    before, after = (
        snapshot(
            float(at),
            [
                (
                    member_of("a"),
                    msgspec.structs.replace(
                        stats_of(cached=at * 1000),
                        pool=PoolTotals(swapped_in=at * 10),
                        fetch=FetchTotals(blocks_received=at * 5),
                    ),
                )
            ],
        )
        for at in (1, 2)
    )
    rates = rates_between(before, after).whole
    assert (rates.in_hbm, rates.from_dram, rates.fetched) == (760, 160, 80)


def told(*seconds: float) -> GatewayTotals:
    """A gateway whose streams began after so many seconds, and went on ten times as fast."""
    tenth = seen(*(each / 10 for each in seconds))
    return GatewayTotals(
        first_token=seen(*seconds), inter_token=tenth, per_token=tenth, whole=seen(*seconds)
    )


def test_gateways_of_one_policy_are_one_group() -> None:
    def at(now: float, *figures: tuple[str, str | None, GatewayTotals]) -> Snapshot:
        answers = [
            answer_of(now, [], totals, url=url, policy=policy) for url, policy, totals in figures
        ]
        return snapshot_of(now, answers)

    before = at(
        0.0,
        ("a", "session", told(50.0)),
        ("b", "session", told()),
        ("c", "least-load", told()),
        ("d", None, told()),
    )
    after = at(
        1.0,
        ("a", "session", told(50.0, 0.02)),
        ("b", "session", told(0.02, 0.02)),
        ("c", "least-load", told(2.0)),
        ("d", None, told()),
    )
    found = rates_between(before, after).policies
    assert {name: each.first_token.count for name, each in found.items()} == {
        "session": 3,
        "least-load": 1,
        UNKNOWN: 0,
    }
    assert found[UNKNOWN].whole == Percentiles()
    session, other = found["session"], found["least-load"]
    for each in (session.first_token, session.whole):
        assert each.p99 is not None
        assert 0.01 < each.p99 <= 0.025  # not the 50 s of before
    for each in (session.inter_token, session.per_token):
        assert each.count == 3
        assert each.p50 is not None
        assert 0.001 < each.p50 <= 0.0025
    assert other.first_token.p50 is not None
    assert 1.0 < other.first_token.p50 <= 2.5


def test_a_gateway_that_began_anew_counts_from_zero_and_disturbs_no_other() -> None:
    """In the sum of both, nothing would have fallen, and the restart would be unseen."""
    old, new = told(50.0), told(0.02)
    before = snapshot_of(
        0.0,
        [
            answer_of(0.0, [], each, url=url, policy="session")
            for url, each in (("a", old), ("b", told()))
        ],
    )
    restarted = snapshot_of(
        1.0,
        [
            answer_of(1.0, [], each, url=url, policy="session")
            for url, each in (("a", new), ("b", told(50.0)))
        ],
    )
    found = rates_between(before, restarted).policies["session"]
    assert found.first_token.count == 2
    changed = snapshot_of(1.0, [answer_of(1.0, [], new, url="a", policy="least-load")])
    found = rates_between(before, changed).policies["least-load"]
    assert found.first_token.count == 1
    assert set(rates_between(before, changed).policies) == {"least-load"}
    assert rates_between(changed, before).policies.keys() == {"session"}  # "b" is new: not told


def test_an_older_gateway_names_no_policy() -> None:
    figures = msgspec.json.decode(
        b'{"now": 1.0, "members": [], "workers": [{"answered": 3}]}', type=ClusterFigures
    )
    assert figures.policy is None
    (sums,) = snapshot_of(
        1.0, [GatewaySeen("a", 1.0, ClusterView(Epoch(1), ()), figures)]
    ).by_gateway
    assert (sums.policy, sums.workers[0].answered) == (UNKNOWN, 3)


def of_workers(at: float, *workers: GatewayTotals) -> Snapshot:
    return snapshot_of(at, [answer_of(at, [], workers[0], policy="session", others=workers[1:])])


def worker(life: int, slow: int, fast: int) -> GatewayTotals:
    """A worker's totals after so many streams of either kind."""
    told_of = told(*[9.0] * slow, *[0.04] * fast)
    return msgspec.structs.replace(
        told_of, life=Epoch(life), answered=slow + fast, refused=slow, failovers=slow
    )


@pytest.mark.parametrize("lives", [(1, 2), (0, 0)], ids=["named", "older gateway"])
@pytest.mark.parametrize("missed", ["before", "after"])
def test_a_worker_that_misses_a_poll_is_not_counted_anew(
    lives: tuple[int, int], missed: str
) -> None:
    """The other one goes on, if they can be told apart; its slow streams are long over."""
    a, b = lives
    before = [worker(a, 0, 100), worker(b, 90, 10)]
    after = [worker(a, 0, 105), worker(b, 90, 15)]
    del (before if missed == "before" else after)[1]
    rates = rates_between(of_workers(0.0, *before), of_workers(1.0, *after))
    found = rates.policies["session"]
    expected = 5 if a else 0
    for each in (found.first_token, found.inter_token, found.per_token, found.whole):
        assert each.count == expected
    assert rates.first_token == found.first_token
    assert (rates.answered, rates.refused) == (expected, 0)
    assert failovers_between(of_workers(0.0, *before), of_workers(1.0, *after)) == 0
    if a:
        assert found.whole.p99 is not None
        assert found.whole.p99 <= 0.05


def test_a_worker_that_was_restarted_is_told_from_the_one_before() -> None:
    """In the sums, nothing would have fallen."""
    before = of_workers(0.0, worker(1, 0, 100), worker(2, 1, 9))
    after = of_workers(1.0, worker(1, 0, 103), worker(3, 50, 50))
    last = of_workers(2.0, worker(1, 0, 103), worker(3, 50, 54))
    assert rates_between(before, after).policies["session"].whole.count == 3
    assert rates_between(after, last).policies["session"].whole.count == 4


def test_a_gateway_whose_workers_are_all_new_has_no_latencies_yet() -> None:
    before, after = of_workers(0.0, worker(0, 0, 9)), of_workers(1.0, worker(1, 0, 9))
    assert rates_between(before, after).policies == {"session": GroupLatency()}
