"""The router's contract: a plan of the instances that answer a call and compute its prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from memserve.api.generate import GenerateCall
from memserve.cluster.member import Member
from memserve.scheduler.decisions import Decision


class Ticket(Protocol):
    """Callbacks to the router about one of its plans. Called on the event loop."""

    def first_token(self) -> None:
        """The first bytes of a successful answer have come; not called if none come."""

    def ended(self) -> None:
        """The plan has ended, with any outcome. Called once."""


class _NoTicket:
    def first_token(self) -> None:
        pass

    def ended(self) -> None:
        pass


NO_TICKET: Ticket = _NoTicket()


def _by_turns() -> str:
    return "by turns"


class Plan(msgspec.Struct, frozen=True, eq=False):
    """`member` answers. The first of `prefill` that can computes the prompt, or `member` itself.
    The computing instance first pulls the cached prefix of `fetch`, if given. `explain` returns
    the reasons of the plan, in one line; `decision` has them, if the scheduler decided."""

    member: Member
    prefill: tuple[Member, ...] = ()
    fetch: Member | None = None
    ticket: Ticket = NO_TICKET
    explain: Callable[[], str] = _by_turns
    decision: Decision | None = None


class Router(Protocol):
    """Chooses among members that may take a call. Runs on the event loop, so it must be quick."""

    def plan(self, call: GenerateCall, members: Sequence[Member]) -> Plan:
        """Return a plan for one of `members`, which are ready and at least one.

        `call.resumed` has the tokens generated under earlier plans of this call; these have ended.
        """
