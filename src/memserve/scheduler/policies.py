"""How one candidate is chosen. A new policy is a function and an entry in `POLICIES`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memserve.errors import ConfigError
from memserve.scheduler.candidates import Candidates
from memserve.scheduler.contract import PromptRequest, Seconds
from memserve.types import InstanceId

# Plans whose predictions differ by less than this part of the prompt's own prefill are equal:
# predictions are not better than that, and equal ones take turns.
NEAR_TIE = 0.01


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a session ran last."""

    answers: InstanceId
    computes: InstanceId


@dataclass(frozen=True, slots=True)
class Situation:
    """What a policy sees. It changes nothing."""

    request: PromptRequest
    candidates: Candidates  # never none
    decode_weight: float  # of a second of decoding, beside one before the first token
    turn: int  # decisions before this one
    session: Placement | None  # of the request's session


@dataclass(frozen=True, slots=True)
class Choice:
    """A candidate and by which figures [candidates] it was chosen, the least being best."""

    candidate: int
    scores: Seconds


@dataclass(frozen=True, slots=True)
class Policy:
    """`fetches`: its plans may pull a longer prefix from a third instance."""

    choose: Callable[[Situation], Choice]
    fetches: bool = False


def prompt_tree(situation: Situation) -> Choice:
    """The least predicted time to the first token plus weighted decode time."""
    candidates = situation.candidates
    weight = situation.decode_weight
    others = candidates.delays + weight * candidates.stall
    scores = weight * candidates.decode
    scores += candidates.first_token
    scores += others[candidates.roster.computes]
    return _least(candidates, scores)


def least_load(situation: Situation) -> Choice:
    """The shortest queues, as if nobody had anything cached."""
    candidates = situation.candidates
    return _least(candidates, _load_scores(situation), candidates.roster.usual)


def session(situation: Situation) -> Choice:
    """Where the session ran before, as long as that is there; else by least load."""
    scores = _load_scores(situation)
    candidates, former = situation.candidates, situation.session
    roster, slots = candidates.roster, candidates.load.slots
    if former is None:
        return _least(candidates, scores, roster.usual)
    answers, computes = slots.get(former.answers), slots.get(former.computes)
    if answers is not None and computes is not None:
        same = roster.find(answers, computes)
        if same is not None and roster.usual[same]:
            return Choice(same, scores)
    for kept, now in ((answers, roster.answers), (computes, roster.computes)):
        partly = roster.usual & (now == kept)
        if kept is not None and partly.any():
            return _least(candidates, scores, partly)
    return _least(candidates, scores, roster.usual)


def round_robin(situation: Situation) -> Choice:
    """One after the other, in each role."""
    candidates, turn = situation.candidates, situation.turn
    roster = candidates.roster
    scores = candidates.first_token
    answers = computes = roster.answering[turn % len(roster.answering)]
    if roster.pairs and roster.find(answers, roster.prefill[0]) is not None:
        # Both sides go round in step; one step more after a whole cycle, so that every pair
        # gets its turn however many there are.
        cycle = math.lcm(len(roster.answering), len(roster.prefill))
        computes = roster.prefill[(turn + turn // cycle) % len(roster.prefill)]
    candidate = roster.find(answers, computes)
    assert candidate is not None  # the roster has every such pair
    return Choice(candidate, scores)


POLICIES: Mapping[str, Policy] = {
    "prompt-tree": Policy(prompt_tree, fetches=True),
    "session": Policy(session),
    "least-load": Policy(least_load),
    "round-robin": Policy(round_robin),
}


def find_policy(name: str) -> Policy:
    """Raises ConfigError, with the names there are."""
    policy = POLICIES.get(name)
    if policy is None:
        raise ConfigError(f"policy {name!r} is none of {', '.join(POLICIES)}")
    return policy


def _load_scores(situation: Situation) -> Seconds:
    candidates = situation.candidates
    scores: Seconds = situation.decode_weight * candidates.decode
    scores += candidates.work[candidates.roster.computes]
    return scores


def _least(
    candidates: Candidates, scores: Seconds, allowed: NDArray[np.bool_] | None = None
) -> Choice:
    """The least score. Of those as good as equal: roles as they are meant and no copies of KV
    that are not needed, then what was used the longest ago."""
    if allowed is not None:
        scores = np.where(allowed, scores, np.inf)
    limit = scores.min() + NEAR_TIE * candidates.whole_prefill
    near = (scores <= limit).nonzero()[0]
    if len(near) == 1:
        return Choice(int(near[0]), scores)
    roster, used = candidates.roster, candidates.load.used
    computes = roster.computes[near]
    turns = used[roster.answers[near]] + used[computes]
    plain = roster.usual[near] & (candidates.fetched[computes] == 0)
    if plain.any():
        turns[~plain] = np.inf
    return Choice(int(near[turns.argmin()]), scores)
