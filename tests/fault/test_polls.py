"""What one member answers must not end the polls of all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import msgspec
import pytest

from memserve.api.peer_client import PeerClient
from memserve.api.status import InstanceReport, InstanceState
from memserve.cluster import poller as module
from memserve.cluster.membership import Membership
from memserve.cluster.poller import Poller
from memserve.vital import Vitals
from tests.unit.test_cluster_membership import STATS, info
from tests.waiting import until


class Peers:
    """Answers for each address by a function."""

    def __init__(self) -> None:
        self.answers: dict[str, Callable[[], Any]] = {}
        self.asked: list[str] = []

    async def call(self, method: str, url: str, decode: object, **limits: object) -> Any:
        address = url.rpartition("/")[0]
        self.asked.append(address)
        found = msgspec.structs.asdict(self.answers[address]())
        return InstanceReport(**found, stats=STATS)


@pytest.mark.parametrize(
    "failure",
    [
        UnicodeError("label empty or too long"),
        KeyError("location"),
        AssertionError(),
        RecursionError("maximum recursion depth exceeded"),
    ],
    ids=repr,
)
async def test_a_poll_that_fails_as_nobody_expected_ends_no_other(
    failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    peers, vitals = Peers(), Vitals()
    membership = Membership()

    def fails() -> Any:
        raise failure

    peers.answers["http://bad"] = fails
    peers.answers["http://good"] = lambda: info("good")
    bad, good = membership.join("http://bad"), membership.join("http://good")
    running = vitals.task("poller", Poller(membership, cast(PeerClient, peers), vitals).run())
    await until(lambda: good.state is InstanceState.READY, "the other one's answer")
    # Later: deaths are still noticed, and so are those who come back.
    peers.answers["http://good"] = fails
    await until(lambda: good.state is InstanceState.DEAD, "its death")
    peers.answers["http://good"] = lambda: info("good", 2)
    peers.answers["http://bad"] = lambda: info("bad")
    await until(lambda: len(membership.ready()) == 2, "both of them")
    assert vitals.survived["poll"] > 3
    assert not vitals.failed.is_set()
    assert bad.epoch == 1
    running.cancel()
    await asyncio.wait((running,))


async def test_the_polls_of_a_heartbeat_are_spread_over_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A client's request must not wait for a thousand of them."""
    monkeypatch.setattr(module, "POLL_SECONDS", 0.05)
    peers, membership = Peers(), Membership()
    count = 4 * module.SLICES
    for number in range(count):
        address = f"http://{number}"
        peers.answers[address] = partial(info, str(number))
        membership.join(address)
    running = asyncio.ensure_future(Poller(membership, cast(PeerClient, peers)).run())
    most = before = 0
    while len(membership.ready()) < count:
        await asyncio.sleep(0)
        most, before = max(most, len(peers.asked) - before), len(peers.asked)
    assert sorted(peers.asked[:count]) == sorted(peers.answers)  # each once, in the first one
    assert most == count / module.SLICES
    running.cancel()
    await asyncio.wait((running,))


async def test_an_observer_that_fails_is_no_death_of_the_poller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    peers, vitals = Peers(), Vitals()
    membership = Membership()
    peers.answers["http://a"] = lambda: info("a")
    member = membership.join("http://a")

    def observe(change: object) -> None:
        raise msgspec.ValidationError("a scheduler that does not understand")

    membership.on_change(observe)
    running = vitals.task("poller", Poller(membership, cast(PeerClient, peers), vitals).run())
    await until(lambda: member.state is InstanceState.READY, "its answer")
    await until(lambda: len(peers.asked) > 10, "more polls")
    assert not vitals.failed.is_set()
    running.cancel()
    await asyncio.wait((running,))
