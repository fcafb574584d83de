"""`Decision`: the chosen plan and its best alternatives, for `GET /cluster/decisions` and the log.

A decision keeps the figures of its best candidates as arrays. Plans and text are made from them on
request only, so that explanations do not slow decisions down.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence

import msgspec
import numpy as np

from memserve.scheduler.candidates import Candidates
from memserve.scheduler.choosing import rank
from memserve.scheduler.contract import Plan, Seconds, Terms
from memserve.scheduler.decision_view import CandidateView, DecisionView, Outcome
from memserve.types import IndexArray, InstanceId, RequestId

KEPT_DECISIONS = 1000
KEPT_CANDIDATES = 16  # per decision


class Ranking(msgspec.Struct, frozen=True, eq=False):
    """The best candidates of one decision: the chosen one, then the others, best first."""

    instances: Sequence[InstanceId]  # by slot, at the time of the decision
    stats: IndexArray  # [5, kept]: as `choosing.rank` fills it
    seconds: Seconds  # [7, kept]: the fields of `Terms` in order, and the score
    prompt_tokens: int

    @classmethod
    def of(cls, candidates: Candidates, scores: Seconds, chosen: int) -> Ranking:
        """Return up to KEPT_CANDIDATES candidates; `chosen` is first, with any score."""
        kept = min(len(scores), KEPT_CANDIDATES)
        stats, seconds = np.empty((5, kept), np.int64), np.empty((7, kept))
        c = candidates
        rank.run(
            chosen,
            scores,
            c.candidate_set.table,
            c.prefixes,
            c.instance_terms,
            c.candidate_terms,
            stats,
            seconds,
        )
        return cls(c.load.instances, stats, seconds, c.prompt_tokens)

    @property
    def scores(self) -> Seconds:
        """Scores [kept]; least is best."""
        scores: Seconds = self.seconds[6]
        return scores

    def __len__(self) -> int:
        return int(self.stats.shape[1])

    def plan(self, at: int) -> Plan:
        answers, computes, source, cached, fetched = self.stats[:, at].tolist()
        names = self.instances
        return Plan(
            instance=names[answers],
            prefill=None if answers == computes else names[computes],
            fetch=None if source < 0 else names[source],
            prompt_tokens=self.prompt_tokens,
            cached_tokens=cached,
            fetched_tokens=fetched,
            terms=Terms(*self.seconds[:6, at].tolist()),
        )


class Decision(msgspec.Struct, frozen=True, eq=False):
    """Result of `Scheduler.decide`, which has reserved `plan`."""

    request: RequestId
    policy: str
    at: float
    plan: Plan
    considered: int
    took: float
    ranking: Ranking
    outcome: Outcome = msgspec.field(default_factory=Outcome)

    def view(self) -> DecisionView:
        scores = self.ranking.scores.tolist()
        candidates = tuple(_view(self.ranking.plan(at), s) for at, s in enumerate(scores))
        return DecisionView(
            request=self.request,
            policy=self.policy,
            at=self.at,
            took=self.took,
            chosen=candidates[0],
            considered=self.considered,
            candidates=tuple(sorted(candidates, key=lambda candidate: candidate.score)),
            happened=self.outcome,
        )

    def summary(self) -> str:
        """One line for the log."""
        return f"{self.request}: {_words(self.plan)} ({self.policy}, {self.considered} candidates)"

    def explanation(self) -> str:
        """The summary, and one line per candidate of the ranking."""
        lines = [f"{self.summary()}, decided in {self.took * 1e6:.0f} us"]
        for at, score in enumerate(self.ranking.scores.tolist()):
            lines.append(f"  {score:.4f}: {_words(self.ranking.plan(at))}")
        return "\n".join(lines)


class DecisionLog:
    """The last decisions."""

    def __init__(self, kept: int = KEPT_DECISIONS) -> None:
        self._kept: deque[Decision] = deque(maxlen=kept)

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, decision: Decision) -> None:
        self._kept.append(decision)

    def last(self, n: int = KEPT_DECISIONS) -> list[Decision]:
        """Return the last `n` decisions or fewer, newest first."""
        return list(itertools.islice(reversed(self._kept), max(n, 0)))

    def views(self, n: int = KEPT_DECISIONS) -> list[DecisionView]:
        """Return the last `n` decisions as views, for `GET /cluster/decisions?n=`."""
        return [decision.view() for decision in self.last(n)]


def _view(plan: Plan, score: float) -> CandidateView:
    return CandidateView(**msgspec.structs.asdict(plan), score=score)


def _words(plan: Plan) -> str:
    where = plan.instance if plan.prefill is None else f"{plan.prefill} -> {plan.instance}"
    tokens = f"{plan.cached_tokens} of {plan.prompt_tokens} tokens cached"
    if plan.fetch is not None:
        tokens += f", {plan.fetched_tokens} fetched from {plan.fetch}"
    terms = plan.terms
    parts = {
        "queue": terms.queue,
        "fetch": terms.fetch,
        "prefill": terms.prefill,
        "transfer": terms.transfer,
    }
    listed = " + ".join(f"{name} {seconds:.3f}" for name, seconds in parts.items() if seconds)
    first = f"first token in {terms.first_token:.3f} s"
    return f"{where}, {tokens}, {first} ({listed or 'at once'}), decode {terms.decode:.3f} s"
