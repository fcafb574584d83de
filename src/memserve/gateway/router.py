"""Where a call runs: the instance that answers it, and who computes its prompt."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from memserve.api.generate import GenerateCall
from memserve.cluster.membership import Member
from memserve.types import Role


@dataclass(frozen=True, slots=True)
class Plan:
    """`member` answers. Its prompt is computed by the first of `prefill` that can, or by
    itself."""

    member: Member
    prefill: tuple[Member, ...] = ()


class Router(Protocol):
    """Chooses among members that would take the call. Called on the event loop, so it is quick."""

    def plan(self, call: GenerateCall, members: Sequence[Member]) -> Plan:
        """A plan for one of `members`, which are ready and not empty."""


class RoundRobin:
    """One after the other, in each role. Roles are soft: where nobody decodes, a prefill
    instance does all of it."""

    def __init__(self) -> None:
        self._turns = itertools.count()

    def plan(self, call: GenerateCall, members: Sequence[Member]) -> Plan:
        prefill = [m for m in members if m.role is Role.PREFILL]
        answering = [m for m in members if m.role is not Role.PREFILL] or prefill
        turn = next(self._turns)
        member = answering[turn % len(answering)]
        if member.role is not Role.DECODE or not prefill:
            return Plan(member)
        # Both sides go round in step; one step more after a whole cycle, so that every pair
        # gets its turn however many there are.
        cycle = math.lcm(len(answering), len(prefill))
        first = (turn + turn // cycle) % len(prefill)
        return Plan(member, (*prefill[first:], *prefill[:first]))
