"""Loads of made-up clusters, for tests of the planner."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from memserve.config import PlannerConfig
from memserve.planner.contract import Action, Decision, LoadReport, MemberLoad
from memserve.planner.planner import Planner
from memserve.scheduler.arrivals import Arrival
from memserve.scheduler.hardware import cost_model
from memserve.types import InstanceId, Role, SchedulerId

COSTS = cost_model("h800", "llama2-13b", 1)
KV_TOKENS = 56_000.0
ONE = SchedulerId("one")  # the only one, where there is one


def members_of(*roles: Role, moves: bool = True) -> list[MemberLoad]:
    return [
        MemberLoad(
            id=InstanceId(f"{role}-{at}"),
            role=role,
            kv_capacity=KV_TOKENS,
            max_running=256,
            chunk_tokens=2048,
            moves=moves,
        )
        for at, role in enumerate(roles)
    ]


class Cluster:
    """A cluster whose members do what the planner decides, at once, and a load that stays."""

    def __init__(
        self,
        config: PlannerConfig,
        members: Sequence[MemberLoad],
        prompt: int = 1000,
        cached: int = 0,
        output: float = 100.0,
        rate: float = 10.0,
    ) -> None:
        self.config = config
        self.planner = Planner(config)
        self.members = list(members)
        self.prompt, self.cached, self.output, self.rate = prompt, cached, output, rate
        self.now = 0.0
        self.requests = 0.0
        self.decisions: list[Decision] = []

    @property
    def roles(self) -> list[Role]:
        return [one.role for one in self.members]

    def look(self) -> Decision:
        before = self.now
        self.now += self.config.interval
        self.requests += self.rate * self.config.interval
        count = min(64, int(self.requests))
        step = self.config.interval / (count + 1)
        arrivals = tuple(
            Arrival(before + step * (at + 1), self.prompt, self.cached) for at in range(count)
        )
        report = LoadReport(
            scheduler=ONE,
            now=self.now,
            members=tuple(self.members),
            requests=int(self.requests),
            arrivals=arrivals,
            output_tokens=self.output,
        )
        decision = self.planner.look(self.now, [report], COSTS)
        self.decisions.append(decision)
        self._obey(decision)
        return decision

    def looks(self, count: int) -> list[Decision]:
        """Return those of the next decisions that change something."""
        return [one for _ in range(count) if (one := self.look()).action is not Action.NOTHING]

    def _obey(self, decision: Decision) -> None:
        wanted = {change.member: change.after for change in decision.changes}
        self.members = [
            msgspec.structs.replace(one, role=wanted.get(one.id, one.role)) for one in self.members
        ]
        if decision.role is None:
            return
        for number in range(decision.count):
            if decision.action is Action.ADD:
                (new,) = members_of(decision.role)
                name = InstanceId(f"added-{len(self.decisions)}-{number}")
                self.members.append(msgspec.structs.replace(new, id=name))
            else:
                gone = next(one for one in self.members if one.role is decision.role)
                self.members.remove(gone)
