"""Compiled operations on the predicted seconds of candidates: weigh, choose the least, rank.

Index of `[instances]` arrays: slot of `Load`; of `[candidates]` arrays: column of `CandidateSet`.
Related arguments are grouped in plain tuples, as in `kernels`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from memserve.scheduler.compiled import compiled, inlined
from memserve.scheduler.contract import Seconds
from memserve.types import IndexArray

# Scores that differ by at most this share of the prompt's whole prefill are ties, because
# predictions are no more exact. Ties go to the least recently chosen, so that instances take turns.
NEAR_TIE = 0.01

_Bools = NDArray[np.bool_]

InstanceTerms = tuple[Seconds, Seconds, Seconds, Seconds, Seconds]
"""`fetch`, `prefill`, `delays`, `stalls`, `work` [instances]."""
CandidateTerms = tuple[Seconds, Seconds, Seconds]
"""`transfer`, `decode`, `first_token` [candidates]."""
Weights = tuple[float, float, float, float, float]
"""Weights of `first_token`, `decode`, `delays`, `stalls`, `work`."""
Prefixes = tuple[IndexArray, IndexArray, IndexArray]
"""`source` (slot or -1), `cached` and `fetched` tokens [instances]."""

_INSTANCE_TERMS = "UniTuple(float64[::1], 5)"
_CANDIDATE_TERMS = "UniTuple(float64[::1], 3)"


@compiled(
    f"void(int64[::1], {_INSTANCE_TERMS}, {_CANDIDATE_TERMS}, UniTuple(float64, 5), float64[::1])"
)
def weigh(
    computes: IndexArray,
    instance_terms: InstanceTerms,
    candidate_terms: CandidateTerms,
    weights: Weights,
    scores: Seconds,
) -> None:
    """Fill `scores` [candidates] with weighted sums. `computes` [candidates]: slots."""
    _, _, delays, stalls, work = instance_terms
    _, decode, first_token = candidate_terms
    of_first_token, of_decode, of_delays, of_stalls, of_work = weights
    for at in range(len(scores)):
        c = computes[at]
        others = of_delays * delays[c] + of_stalls * stalls[c]
        own = of_decode * decode[at] + of_first_token * first_token[at]
        scores[at] = own + others + of_work * work[c]


@compiled(
    "int64(int64[::1], int64[::1], boolean[::1], boolean[::1], int64[::1], float64[:], float64, "
    "float64[::1])"
)
def least(
    answers: IndexArray,
    computes: IndexArray,
    usual: _Bools,
    allowed: _Bools,
    fetched: IndexArray,
    used: Seconds,
    whole_prefill: float,
    scores: Seconds,
) -> int:
    """Number of the candidate with the least score. Near ties (NEAR_TIE): first a `usual` candidate
    without fetch, then the least recently chosen.

    `allowed` [candidates], at least one: the scores of the others become infinite. `fetched`
    [instances]: tokens of the fetch; `used` [instances]: turn of the last choice.
    """
    limit = np.inf
    for at in range(len(scores)):
        if not allowed[at]:
            scores[at] = np.inf
        limit = min(limit, scores[at])
    limit += NEAR_TIE * whole_prefill
    best, best_plain, best_turn = -1, False, np.inf
    for at in range(len(scores)):
        if scores[at] > limit:
            continue
        c = computes[at]
        plain = usual[at] and fetched[c] == 0
        turn = used[answers[at]] + used[c]
        better = turn < best_turn if plain == best_plain else plain
        if best < 0 or better:
            best, best_plain, best_turn = at, plain, turn
    return best


@inlined
def _best_first(scores: Seconds, chosen: int, best: IndexArray) -> None:
    """Fill `best` with `chosen` and then the candidates of the least other scores, ascending."""
    best[0] = chosen
    last, count = len(best) - 1, 1
    for at in range(len(scores)):
        if at == chosen or last == 0:
            continue
        if count <= last:
            place = count
            count += 1
        elif scores[at] < scores[best[last]]:
            place = last
        else:
            continue
        while place > 1 and scores[best[place - 1]] > scores[at]:
            best[place] = best[place - 1]
            place -= 1
        best[place] = at


@compiled(
    f"void(int64, float64[::1], int64[:,::1], UniTuple(int64[::1], 3), {_INSTANCE_TERMS}, "
    f"{_CANDIDATE_TERMS}, int64[:,::1], float64[:,::1])"
)
def rank(
    chosen: int,
    scores: Seconds,
    table: IndexArray,
    prefixes: Prefixes,
    instance_terms: InstanceTerms,
    candidate_terms: CandidateTerms,
    stats: IndexArray,
    seconds: Seconds,
) -> None:
    """Fill `stats` [5, kept] and `seconds` [7, kept] for `chosen` and then the best others; kept <=
    candidates.

    `stats`: slots that answer, compute and are fetched from, cached and fetched tokens; `seconds`:
    the fields of `Terms` in order, and the score. `table` [2, candidates]: slots that answer and
    that compute the prompt.
    """
    source, cached, fetched = prefixes
    fetch, prefill, delays, stalls, _ = instance_terms
    transfer, decode, first_token = candidate_terms
    kept = stats.shape[1]
    best = np.empty(kept, np.int64)
    _best_first(scores, chosen, best)
    for k in range(kept):
        at = best[k]
        c = table[1, at]
        stats[0, k], stats[1, k] = table[0, at], c
        stats[2, k], stats[3, k], stats[4, k] = source[c], cached[c], fetched[c]
        waits = first_token[at] - transfer[at] - (fetch[c] + prefill[c])
        seconds[0, k] = max(waits, 0.0)  # rounding may leave a negative value
        seconds[1, k], seconds[2, k], seconds[3, k] = fetch[c], prefill[c], transfer[at]
        seconds[4, k], seconds[5, k] = decode[at] + stalls[c], delays[c]
        seconds[6, k] = scores[at]
