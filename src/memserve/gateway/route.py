"""`Route`: the members that a call runs on, as the router chose them."""

from __future__ import annotations

from memserve.cluster.member import Member
from memserve.scheduler.decisions import Decision


class Route:
    """The members of a call's attempt, chosen by turns: nothing is predicted or reserved.

    `member` answers. The first of `prefill` that can computes the prompt, or `member` itself. The
    computing instance first pulls the cached prefix of `fetch`, if given. `decision`: of the
    scheduler, whose `Plan` names the same instances by id; None: it made none.
    """

    __slots__ = ("decision", "fetch", "member", "prefill")

    def __init__(
        self,
        member: Member,
        prefill: tuple[Member, ...] = (),
        fetch: Member | None = None,
        decision: Decision | None = None,
    ) -> None:
        self.member = member
        self.prefill = prefill
        self.fetch = fetch
        self.decision = decision

    def explain(self) -> str:
        """Return the reasons in one line."""
        return "by turns"

    def first_token(self) -> None:
        """The first bytes of a successful answer have come; not called if none come."""

    def ended(self) -> None:
        """The attempt has ended, with any outcome. Called once."""
