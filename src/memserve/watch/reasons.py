"""Why a decision went as it did, in words, from what its candidates were predicted to take."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from memserve.scheduler.contract import Terms
from memserve.scheduler.decision_view import CandidateView, DecisionView
from memserve.watch import text

_SAME = 1e-9  # seconds, or weighted seconds: rounding


def terms_of(terms: Terms) -> dict[str, float]:
    """Return the predicted seconds by cause, in the order in which they pass."""
    return msgspec.structs.asdict(terms)


def others(decision: DecisionView) -> list[CandidateView]:
    """Return the candidates that were not chosen, best first."""
    left = list(decision.candidates)
    if decision.chosen in left:
        left.remove(decision.chosen)
    return left


def reason(decision: DecisionView) -> str:
    """Return one sentence: what set the chosen candidate apart from the next best."""
    chosen, rest = decision.chosen, others(decision)
    cached = f"{chosen.cached_tokens} of {chosen.prompt_tokens} tokens cached"
    if chosen.fetch is not None:
        cached += f", {chosen.fetched_tokens} fetched"
    if not rest:
        return f"{cached}; the only candidate"
    best = rest[0]
    if best.score < chosen.score - _SAME:
        lost = text.seconds(chosen.score - best.score)
        return f"{cached}; {decision.policy}, though {best.path} is {lost} better"
    gains = _gains(chosen.terms, best.terms)
    if not gains:
        return f"{cached}; as good as {best.path}"
    name, saved = max(gains, key=lambda gain: gain[1])
    return f"{cached}; {text.seconds(saved)} less {name} than {best.path}"


def state(decision: DecisionView) -> str:
    """Return how far the request is: waits, streams, or has ended."""
    happened = decision.happened
    if happened.whole is not None:
        return "ended"
    return "runs" if happened.first_token is None else "streams"


def predicted(candidate: CandidateView) -> tuple[float, float]:
    """Return the seconds until the first token and until the end, as predicted."""
    first = candidate.terms.first_token
    return first, first + candidate.terms.decode


def _gains(chosen: Terms, other: Terms) -> list[tuple[str, float]]:
    ours, theirs = terms_of(chosen), terms_of(other)
    gains: Iterable[tuple[str, float]] = ((name, theirs[name] - ours[name]) for name in ours)
    return [(name, gain) for name, gain in gains if gain > _SAME]
