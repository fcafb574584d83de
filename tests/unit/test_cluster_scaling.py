"""What the planner starts has a bound, whatever becomes of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import pytest

from memserve.api.status import InstanceState
from memserve.clock import ManualClock
from memserve.cluster.backend import Group, Place
from memserve.cluster.client import ClusterClient
from memserve.cluster.member import ClusterView, MemberView
from memserve.cluster.planning import PlannerLoop
from memserve.cluster.scaling import Scaling
from memserve.config import PlannerConfig
from memserve.errors import ClusterError
from memserve.types import Epoch, InstanceId, Role
from tests.waiting import PATIENCE

READY, DEAD, DRAINING = InstanceState.READY, InstanceState.DEAD, InstanceState.DRAINING
P, D = Role.PREFILL, Role.DECODE


class Members:
    """A backend's groups, and what gateways show of them: nothing of those that were started."""

    def __init__(self) -> None:
        self.members = {P: ["prefill-0"], D: ["decode-1", "decode-2"]}
        self.started: list[str] = []
        self.states = dict.fromkeys(("prefill-0", "decode-1", "decode-2"), READY)
        self.room = 1000

    async def groups(self) -> tuple[Group, ...]:
        return tuple(Group(str(role), role, tuple(own)) for role, own in self.members.items())

    async def places(self) -> dict[str, Place]:
        return {}

    async def scale(self, group: str, count: int) -> None:
        own = self.members[Role(group)]
        while len(own) < count:
            if not self.room:
                raise ClusterError("no machine has room")
            self.room -= 1
            name = f"{group}-{3 + len(self.started)}"
            self.started.append(name)
            own.append(name)
        del own[count:]

    def give_up(self, name: str) -> None:
        for own in self.members.values():
            if name in own:
                own.remove(name)

    def view(self) -> ClusterView:
        return ClusterView(
            Epoch(1),
            tuple(
                MemberView(InstanceId(name), D, state, f"http://{name}:1")
                for name, state in self.states.items()
            ),
        )

    @property
    def count(self) -> int:
        return sum(map(len, self.members.values()))


async def test_no_more_are_started_than_there_may_be_whether_ready_or_not() -> None:
    members = Members()
    scaling = Scaling(members, 6)
    assert await scaling.scale(D, 2) == 2
    assert await scaling.scale(P, 9) == 1  # as many as there is room for
    for _ in range(3):
        with pytest.raises(ClusterError, match="max_members = 6: the backend has 6 members"):
            await scaling.scale(D, 1)
    assert members.count == 6
    assert await scaling.scale(D, -1) == -1
    assert await scaling.scale(P, 1) == 1


async def test_members_that_no_gateway_shows_and_that_crashed_are_late() -> None:
    members = Members()
    scaling = Scaling(members, 9)
    assert await scaling.late(members.view()) == 0
    await scaling.scale(D, 2)
    assert await scaling.late(members.view()) == 2
    members.states["decode-3"] = READY
    members.states["decode-4"] = DRAINING  # an operator's, who may keep it so
    assert await scaling.late(members.view()) == 0
    members.states["decode-1"] = DEAD
    assert await scaling.late(members.view()) == 1


async def test_a_backend_that_delivers_none_is_not_asked_without_end() -> None:
    members = Members()
    scaling = Scaling(members, 8)
    for _ in range(50):
        if not await scaling.late(members.view()):
            with contextlib.suppress(ClusterError):
                await scaling.scale(D, 2)
        else:
            for name in members.started:
                members.give_up(name)
    assert len(members.started) == 5
    with pytest.raises(ClusterError, match=r"has 3 members.* and 5 that it started were given up"):
        await scaling.scale(D, 1)


async def test_those_that_were_given_up_count_no_more_once_another_one_is_ready() -> None:
    members = Members()
    scaling = Scaling(members, 5)
    await scaling.scale(D, 2)
    members.give_up("decode-3")
    assert await scaling.late(members.view()) == 1
    with pytest.raises(ClusterError, match="1 that it started were given up"):
        await scaling.scale(D, 1)
    members.states["decode-4"] = READY
    assert await scaling.late(members.view()) == 0
    assert await scaling.scale(D, 1) == 1


async def test_those_that_were_started_before_one_failed_count() -> None:
    members = Members()
    members.room = 1
    scaling = Scaling(members, 5)
    with pytest.raises(ClusterError, match="no machine has room"):
        await scaling.scale(D, 2)
    members.give_up("decode-3")
    members.room = 9
    assert await scaling.late(members.view()) == 0
    assert await scaling.scale(D, 2) == 1


async def test_the_planner_looks_where_gateways_are_now() -> None:
    """One that is started again may be on another machine; one look without any does not end it."""
    seen: list[list[str]] = []
    places = [["http://one:1", "http://two:2"], [], ["http://elsewhere:9", "http://two:2"]]
    done = asyncio.Event()

    class Looking(PlannerLoop):
        async def look(self, clients: Sequence[ClusterClient]) -> None:
            seen.append([one._url for one in clients])
            if len(seen) == 2:
                done.set()

    async def urls() -> list[str]:
        if not (found := places.pop(0)):
            raise ClusterError("no gateway listens")
        return found

    told: list[str] = []
    loop = Looking(urls, PlannerConfig(interval=0.001), ManualClock(), tell=told.append)
    running = asyncio.ensure_future(loop.run())
    await asyncio.wait_for(done.wait(), PATIENCE)
    running.cancel()
    await asyncio.wait((running,))
    assert seen == [["http://one:1", "http://two:2"], ["http://elsewhere:9", "http://two:2"]]
    assert told == ["the planner cannot look at the cluster: no gateway listens"]
