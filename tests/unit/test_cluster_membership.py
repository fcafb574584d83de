"""States of members, and which of them a request may go to."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from memserve.api.status import (
    EngineTotals,
    InstanceInfo,
    InstanceState,
    InstanceStats,
    Latencies,
    MediumTotals,
    PoolTotals,
)
from memserve.clock import ManualClock
from memserve.cluster import membership as module
from memserve.cluster.member import Member
from memserve.cluster.membership import FORGET_SECONDS, MAX_MISSES, Change, MemberChange, Membership
from memserve.errors import ClusterError
from memserve.types import Epoch, InstanceId, Role

STATS = InstanceStats(
    EngineTotals(),
    PoolTotals(hbm=MediumTotals(total=8, free=8)),
    Latencies(),
)


def info(
    name: str = "p0",
    epoch: int = 1,
    state: InstanceState = InstanceState.READY,
    role: Role = Role.COLOCATED,
) -> InstanceInfo:
    return InstanceInfo(InstanceId(name), Epoch(epoch), role, state, 42, "m")


class Cluster:
    def __init__(self) -> None:
        self.deaths: list[str] = []
        self.clock = ManualClock()
        self.membership = Membership(lambda member: self.deaths.append(member.address), self.clock)

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


def test_an_instance_that_comes_back_elsewhere_replaces_its_dead_life(cluster: Cluster) -> None:
    """Whatever the clocks say: epochs have no order."""
    old = cluster.ready("http://a", epoch=2)
    cluster.membership.refused(old)
    new = cluster.ready("http://b", epoch=1)
    assert cluster.membership.find(InstanceId("p0")) is new
    assert cluster.membership.ready() == [new]
    assert cluster.deaths == ["http://a"]
    # The old one's last poll, still on its way, changes nothing.
    cluster.membership.answered(old, info(epoch=2), STATS)
    assert cluster.membership.ready() == [new]
    assert cluster.deaths == ["http://a"]


def test_the_view_has_the_published_shape(cluster: Cluster) -> None:
    cluster.ready("http://a")
    cluster.membership.join("http://b")
    view = json.loads(msgspec.json.encode(cluster.membership.view()))
    assert set(view) == {"epoch", "instances"}
    met, unmet = view["instances"]
    keys = {"id", "role", "kind", "pool", "state", "address", "pid", "hbm", "dram"}
    assert set(met) == set(unmet) == keys
    assert (met["id"], met["pid"], met["hbm"]["total"]) == ("p0", 42, 8)
    assert (unmet["state"], unmet["pid"], unmet["hbm"]) == ("starting", None, {})


def test_a_process_that_has_gone_is_dead_at_once(cluster: Cluster) -> None:
    member = cluster.ready("http://a")
    cluster.membership.refused(member)
    assert (member.state, cluster.deaths) == (InstanceState.DEAD, ["http://a"])
    # One that nobody has met yet, and that joined by itself, was there and has gone.
    cluster.membership.refused(cluster.membership.join("http://b", lasting=False))
    cluster.membership.refused(cluster.membership.join("http://c"))  # configured: not there yet
    assert [m.address for m in cluster.membership.members] == ["http://a", "http://c"]


def test_a_doubtful_member_is_avoided_and_asked_about(cluster: Cluster) -> None:
    asked: list[Member] = []
    cluster.membership.on_question(asked.append)
    first, second = cluster.ready("http://a", "p0"), cluster.ready("http://b", "p1")
    asked.clear()
    for _ in range(2 * MAX_MISSES):  # requests that failed together are no misses in a row
        cluster.membership.doubt(first)
    assert set(asked) == {first}
    assert cluster.membership.ready() == [second]
    cluster.membership.answered(first, info("p0"), STATS)
    assert cluster.membership.ready() == [first, second]


def test_one_that_leaves_is_gone_at_once_and_a_late_leave_takes_no_later_life(
    cluster: Cluster,
) -> None:
    member = cluster.ready("http://a", epoch=2)
    assert not cluster.membership.leave("http://a", Epoch(1))
    assert cluster.membership.members == [member]
    assert cluster.membership.leave("http://a", Epoch(2))
    assert cluster.membership.members == []
    assert cluster.deaths == []  # what it runs comes to an end
    cluster.membership.answered(member, info(epoch=2), STATS)  # a poll that was on its way
    assert cluster.membership.members == []
    assert not cluster.membership.leave("http://a")


def test_the_dead_are_shown_for_a_while_and_then_forgotten(cluster: Cluster) -> None:
    membership = cluster.membership
    for address, lasting in (("http://a", False), ("http://b", True), ("http://c", False)):
        member = membership.join(address, lasting=lasting)
        membership.answered(member, info(address), STATS)
        if address != "http://c":
            cluster.lose(member)
    cluster.clock.advance(FORGET_SECONDS)
    membership.forget()
    assert len(membership.members) == 3
    cluster.clock.advance(1)
    membership.forget()
    # Without `c`, which lives, and `b`, which was configured, whatever has become of it.
    assert [m.address for m in membership.members] == ["http://b", "http://c"]


@pytest.mark.parametrize("epoch", [1, 3])  # what a rogue chooses, or a clock says
def test_nobody_takes_the_name_of_a_member_that_lives(
    cluster: Cluster, epoch: int, caplog: pytest.LogCaptureFixture
) -> None:
    membership, name = cluster.membership, InstanceId("p0")
    first = cluster.ready("http://a", epoch=2)
    rogue = membership.join("http://b")
    for _ in range(3):
        membership.answered(rogue, info(epoch=epoch), STATS)
    assert membership.ready() == [first]
    assert membership.find(name) is first
    assert cluster.deaths == []
    assert (rogue.epoch, rogue.limits, rogue.stats) == (None, None, None)
    assert len([r for r in caplog.records if "is not let in" in r.message]) == 1
    shown = json.loads(msgspec.json.encode(membership.view()))["instances"]
    assert [each.get("conflict") for each in shown] == [None, "'p0' is the instance at http://a"]
    # It is told so when it registers, and its holder is asked whether it is there.
    asked: list[Member] = []
    membership.on_question(asked.append)
    assert membership.claim(name, Epoch(epoch), "http://b") is first
    assert asked == [first]
    assert membership.claim(name, Epoch(2), "http://a") is None
    assert membership.claim(name, Epoch(2), "http://localhost") is None  # the same life
    # Dead, or away, it holds nothing any more.
    cluster.lose(first)
    assert membership.claim(name, Epoch(epoch), "http://b") is None
    membership.answered(rogue, info(epoch=epoch), STATS)
    assert membership.ready() == [rogue]
    assert "conflict" not in json.loads(msgspec.json.encode(membership.view()))["instances"][-1]
    # And who wakes up again has been replaced.
    membership.answered(first, info(epoch=2), STATS)
    assert membership.ready() == [rogue]
    assert membership.claim(name, Epoch(2), "http://a") is rogue


def test_a_member_that_takes_on_the_name_of_another_is_not_believed(cluster: Cluster) -> None:
    told: list[tuple[Change, str]] = []
    first, second = cluster.ready("http://a", "p0"), cluster.ready("http://b", "p1", 2)
    cluster.membership.on_change(lambda change: told.append((change.change, change.id)))
    del told[:]
    cluster.membership.answered(second, info("p0", 3), STATS)
    assert told == [(Change.DIED, "p1")]
    assert cluster.membership.ready() == [first]
    cluster.membership.answered(second, info("p1", 4), STATS)
    assert told[1:] == [(Change.JOINED, "p1")]


def test_one_life_at_two_addresses_is_one_member(cluster: Cluster) -> None:
    first = cluster.ready("http://127.0.0.1:1", epoch=1)
    cluster.ready("http://localhost:1", epoch=1)
    assert cluster.membership.ready() == [first]


def test_addresses_that_nobody_was_met_at_are_bounded(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_MEMBERS", 4)
    kept = [cluster.ready("http://a", "p0"), cluster.membership.join("http://fixed")]
    for number in range(20):
        cluster.clock.advance(1)
        cluster.membership.join(f"http://unmet-{number}", lasting=False)
    addresses = [member.address for member in cluster.membership.members]
    assert addresses == [*(m.address for m in kept), "http://unmet-18", "http://unmet-19"]
    cluster.ready("http://unmet-18", "p1")
    cluster.ready("http://unmet-19", "p2")
    with pytest.raises(ClusterError, match="4 members"):
        cluster.membership.join("http://more", lasting=False)


def test_an_observer_hears_of_each_change_once_and_in_order(cluster: Cluster) -> None:
    told: list[MemberChange] = []
    early = cluster.ready("http://a", "p0")
    forget = cluster.membership.on_change(told.append)
    member = cluster.membership.join("http://b")
    for state, role in (
        (InstanceState.STARTING, Role.PREFILL),
        (InstanceState.READY, Role.PREFILL),
        (InstanceState.READY, Role.PREFILL),
        (InstanceState.READY, Role.DECODE),
        (InstanceState.DRAINING, Role.DECODE),
    ):
        cluster.membership.answered(member, info("p1", 1, state, role), STATS)
    cluster.membership.answered(member, info("p1", 2), STATS)
    cluster.lose(early)
    cluster.lose(early)
    cluster.membership.leave("http://b")
    assert [(c.change, c.id, c.epoch) for c in told] == [
        (Change.JOINED, "p0", 1),  # was here before the observer
        (Change.JOINED, "p1", 1),
        (Change.STATE, "p1", 1),
        (Change.ROLE, "p1", 1),
        (Change.STATE, "p1", 1),
        (Change.DIED, "p1", 1),
        (Change.JOINED, "p1", 2),
        (Change.DIED, "p0", 1),
        (Change.LEFT, "p1", 2),
    ]
    forget()
    cluster.ready("http://c", "p2")
    assert len(told) == 9


class MembershipMachine(RuleBasedStateMachine):
    """Whatever happens: an observer that follows the changes knows who is there."""

    addresses = st.sampled_from([f"http://{name}" for name in "abc"])
    names = st.sampled_from(["p0", "p1"])

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.deaths = 0
        self.membership = Membership(self._die, self.clock)
        self.here: dict[tuple[str, int], MemberChange] = {}
        self.membership.on_change(self._follow)

    def _die(self, member: Member) -> None:
        self.deaths += 1

    def _follow(self, change: MemberChange) -> None:
        life = (change.id, change.epoch)
        assert (change.change is Change.JOINED) == (life not in self.here)
        if change.change in (Change.LEFT, Change.DIED):
            del self.here[life]
            self.deaths -= change.change is Change.DIED
        else:
            assert change.state is not InstanceState.DEAD
            self.here[life] = change

    @rule(address=addresses, lasting=st.booleans())
    def join(self, address: str, lasting: bool) -> None:
        self.membership.join(address, lasting=lasting)

    @rule(
        address=addresses,
        name=names,
        epoch=st.integers(1, 3),
        state=st.sampled_from(InstanceState),
        role=st.sampled_from(Role),
    )
    def answer(self, address: str, name: str, epoch: int, state: InstanceState, role: Role) -> None:
        if (member := self.membership.at(address)) is not None:
            # Ids and epochs that no two processes have at once: one life, one address.
            epoch = 10 * epoch + ord(address[-1]) % 10
            self.membership.answered(member, info(name, epoch, state, role), STATS)

    @rule(address=addresses, how=st.sampled_from(["missed", "refused", "doubt"]))
    def trouble(self, address: str, how: str) -> None:
        if (member := self.membership.at(address)) is not None:
            {
                "missed": self.membership.missed,
                "refused": self.membership.refused,
                "doubt": self.membership.doubt,
            }[how](member)

    @rule(address=addresses)
    def leave(self, address: str) -> None:
        self.membership.leave(address)

    @rule()
    def time_passes(self) -> None:
        self.clock.advance(FORGET_SECONDS + 1)
        self.membership.forget()

    @invariant()
    def what_is_kept_for_requests_is_what_the_members_are(self) -> None:
        members = self.membership.members
        ready = [member for member in members if member.state is InstanceState.READY]
        assert self.membership.ready() == ([m for m in ready if not m.misses] or ready)
        for name in {"p0", "p1", *(member.id for member in members)}:
            alike = [member for member in members if member.id == name]
            alive = [member for member in alike if member.state is not InstanceState.DEAD]
            found = self.membership.find(InstanceId(name))
            assert found in (alive or alike or [None])

    @invariant()
    def observers_know_who_is_there(self) -> None:
        alive = {
            (m.id, m.epoch): (m.address, m.role, m.state)
            for m in self.membership.members
            if m.epoch is not None and m.state is not InstanceState.DEAD
        }
        followed = {life: (c.address, c.role, c.state) for life, c in self.here.items()}
        assert followed == alive
        assert self.deaths == 0  # one call of `on_death` for each life that died
        assert len({m.id for m in self.membership.members if m.joined}) == len(alive)


TestMembershipMachine = MembershipMachine.TestCase
TestMembershipMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
