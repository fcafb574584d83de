"""Where a call runs: the instance that answers it, and who computes its prompt."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from memserve.api.generate import GenerateCall
from memserve.cluster.membership import Member
from memserve.types import Role


class Ticket(Protocol):
    """What a router hears of a plan of its own. Called on the event loop."""

    def first_token(self) -> None:
        """The first bytes of an answer have come; not called for plans that came to nothing."""

    def ended(self) -> None:
        """The plan is over, however it ended. Called once."""


class _NoTicket:
    def first_token(self) -> None:
        pass

    def ended(self) -> None:
        pass


NO_TICKET: Ticket = _NoTicket()


def _by_turns() -> str:
    return "by turns"


@dataclass(frozen=True, slots=True)
class Plan:
    """`member` answers. Its prompt is computed by the first of `prefill` that can, or by
    itself, after the prefix that `fetch` has longest was pulled from there. `explain` says why,
    in one line, to those who ask."""

    member: Member
    prefill: tuple[Member, ...] = ()
    fetch: Member | None = None
    ticket: Ticket = NO_TICKET
    explain: Callable[[], str] = _by_turns


class Router(Protocol):
    """Chooses among members that would take the call. Called on the event loop, so it is quick."""

    def plan(self, call: GenerateCall, members: Sequence[Member]) -> Plan:
        """A plan for one of `members`, which are ready and not empty.

        `call.resumed` has what earlier plans for this call, which have ended, brought about.
        """


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
