"""Wire form of decisions, in `GET /cluster/decisions`. Imports nothing heavy, for clients."""

from __future__ import annotations

import msgspec

from memserve.scheduler.contract import Plan
from memserve.types import RequestId


class CandidateView(Plan, frozen=True, omit_defaults=True, kw_only=True):
    """One candidate: a plan and its score in weighted seconds; the least is best."""

    score: float

    @property
    def path(self) -> str:
        """The plan's instances as text: source of a fetch ⇢ prefill → decode."""
        words = self.instance if self.prefill is None else f"{self.prefill} → {self.instance}"
        return words if self.fetch is None else f"{self.fetch} ⇢ {words}"


class Outcome(msgspec.Struct, omit_defaults=True):
    """Outcome of a plan, in seconds since it was made. The router's event loop fills it in."""

    first_token: float | None = None  # of a stream; None: not received
    whole: float | None = None  # end of the answer, complete or not; None: still running


class DecisionView(msgspec.Struct, frozen=True):
    """One decision in `GET /cluster/decisions`."""

    request: RequestId
    policy: str
    at: float  # seconds of the scheduler's clock
    took: float  # seconds that the decision took to compute
    chosen: CandidateView
    considered: int  # number of all candidates
    candidates: tuple[CandidateView, ...]  # the best ones, best first
    happened: Outcome = msgspec.field(default_factory=Outcome)
