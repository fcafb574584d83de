"""States of members, and which of them a request may go to."""

from __future__ import annotations

import json

import msgspec
import pytest

from memserve.api.status import (
    EngineTotals,
    InstanceInfo,
    InstanceState,
    InstanceStats,
    Latencies,
    MediumTotals,
    PoolTotals,
)
from memserve.cluster.membership import MAX_MISSES, Member, Membership
from memserve.types import Epoch, InstanceId, Role

STATS = InstanceStats(
    EngineTotals(0, 0, 0, 0, 0, 0, 0, 0, 0, 0.0),
    PoolTotals(hbm=MediumTotals(total=8, free=8)),
    Latencies(),
)


def info(
    name: str = "p0", epoch: int = 1, state: InstanceState = InstanceState.READY
) -> InstanceInfo:
    return InstanceInfo(InstanceId(name), Epoch(epoch), Role.COLOCATED, state, 42, "m")


class Cluster:
    def __init__(self) -> None:
        self.deaths: list[str] = []
        self.membership = Membership(lambda member: self.deaths.append(member.address))

    def ready(self, address: str, name: str = "p0", epoch: int = 1) -> Member:
        member = self.membership.join(address)
        self.membership.answered(member, info(name, epoch), STATS)
        return member

    def lose(self, member: Member, misses: int = MAX_MISSES) -> None:
        for _ in range(misses):
            self.membership.missed(member)


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


def test_a_member_is_starting_until_it_says_otherwise(cluster: Cluster) -> None:
    member = cluster.membership.join("http://a")
    cluster.lose(member, 10 * MAX_MISSES)  # its process is not there yet
    assert member.state is InstanceState.STARTING
    assert cluster.membership.ready() == []
    cluster.membership.answered(member, info(), STATS)
    assert cluster.membership.ready() == [member]


def test_a_member_is_dead_after_three_misses_and_its_requests_are_given_up(
    cluster: Cluster,
) -> None:
    member = cluster.ready("http://a")
    cluster.lose(member, MAX_MISSES - 1)
    assert (member.state, cluster.deaths) == (InstanceState.READY, [])
    cluster.lose(member)
    assert (member.state, cluster.deaths) == (InstanceState.DEAD, ["http://a"])
    assert cluster.membership.ready() == []


def test_one_answer_makes_up_for_misses(cluster: Cluster) -> None:
    member = cluster.ready("http://a")
    for _ in range(MAX_MISSES):
        cluster.lose(member, MAX_MISSES - 1)
        cluster.membership.answered(member, info(), STATS)
    assert member.state is InstanceState.READY


def test_a_dead_member_that_answers_is_back(cluster: Cluster) -> None:
    member = cluster.ready("http://a")
    cluster.lose(member)
    cluster.membership.answered(member, info(epoch=2), STATS)
    assert cluster.membership.ready() == [member]


def test_a_doubtful_member_gets_requests_only_if_there_is_no_other(cluster: Cluster) -> None:
    first, second = cluster.ready("http://a", "p0"), cluster.ready("http://b", "p1")
    cluster.lose(first, 1)
    assert cluster.membership.ready() == [second]
    cluster.lose(second, 1)
    assert cluster.membership.ready() == [first, second]


def test_the_epoch_grows_with_changes_and_with_nothing_else(cluster: Cluster) -> None:
    membership = cluster.membership
    seen = [membership.epoch]
    member = membership.join("http://a")
    seen.append(membership.epoch)
    for state in (InstanceState.STARTING, InstanceState.READY, InstanceState.DRAINING):
        membership.answered(member, info(state=state), STATS)
        seen.append(membership.epoch)
    cluster.lose(member)
    seen.append(membership.epoch)
    assert seen == sorted(set(seen))
    before = membership.epoch
    membership.join("http://a")
    cluster.lose(member)
    assert membership.epoch == before


def test_a_restart_behind_the_same_address_ends_what_its_former_life_had(cluster: Cluster) -> None:
    member = cluster.ready("http://a", epoch=1)
    cluster.membership.answered(member, info(epoch=2), STATS)
    assert cluster.deaths == ["http://a"]
    assert member.epoch == 2


def test_an_instance_that_comes_back_elsewhere_replaces_its_former_life(cluster: Cluster) -> None:
    old = cluster.ready("http://a", epoch=1)
    new = cluster.ready("http://b", epoch=2)
    assert cluster.membership.members == [new]
    assert cluster.deaths == ["http://a"]
    # The old one's last poll, still on its way, changes nothing.
    cluster.lose(old)
    cluster.membership.answered(old, info(epoch=1), STATS)
    assert cluster.membership.ready() == [new]
    assert cluster.deaths == ["http://a"]


def test_the_view_has_the_published_shape(cluster: Cluster) -> None:
    cluster.ready("http://a")
    cluster.membership.join("http://b")
    view = json.loads(msgspec.json.encode(cluster.membership.view()))
    assert set(view) == {"epoch", "instances"}
    met, unmet = view["instances"]
    keys = {"id", "role", "state", "address", "pid", "hbm", "dram"}
    assert set(met) == set(unmet) == keys
    assert (met["id"], met["pid"], met["hbm"]["total"]) == ("p0", 42, 8)
    assert (unmet["state"], unmet["pid"], unmet["hbm"]) == ("starting", None, {})
