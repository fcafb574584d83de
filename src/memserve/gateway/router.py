"""Where a call runs: the instance that answers it, and who computes its prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from memserve.api.generate import GenerateCall
from memserve.cluster.membership import Member


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


class Plan(msgspec.Struct, frozen=True, eq=False):
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
