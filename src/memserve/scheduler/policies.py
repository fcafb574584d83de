"""How one candidate is chosen. A new policy is a function and an entry in `POLICIES`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from memserve.errors import ConfigError
from memserve.scheduler.candidates import Candidates
from memserve.scheduler.contract import PromptRequest, Seconds
from memserve.types import InstanceId


class Placement(msgspec.Struct, frozen=True):
    """Where a session ran last."""

    answers: InstanceId
    computes: InstanceId


class PolicyInput(msgspec.Struct, frozen=True, eq=False):
    """What a policy sees. It changes nothing."""

    request: PromptRequest
    candidates: Candidates  # never none
    decode_weight: float  # of a second of decoding, beside one before the first token
    turn: int  # decisions before this one
    session: Placement | None  # of the request's session


class Choice(msgspec.Struct, frozen=True, eq=False):
    """A candidate and by which figures [candidates] it was chosen, the least being best."""

    candidate: int
    scores: Seconds


@dataclass(frozen=True, slots=True)
class Policy:
    """`fetches`: its plans may pull a longer prefix from a third instance. `sessions`: it looks
    at where a session ran before, which is kept for no other policy."""

    choose: Callable[[PolicyInput], Choice]
    fetches: bool = False
    sessions: bool = False


def prompt_tree(situation: PolicyInput) -> Choice:
    """The least predicted time to the first token plus weighted decode time."""
    candidates, weight = situation.candidates, situation.decode_weight
    scores = candidates.weigh(first_token=1.0, decode=weight, delays=1.0, stalls=weight)
    return Choice(candidates.least(scores), scores)


def least_load(situation: PolicyInput) -> Choice:
    """The shortest queues, as if nobody had anything cached."""
    candidates, scores = situation.candidates, _load_scores(situation)
    return Choice(candidates.least(scores, candidates.candidate_set.usual), scores)


def session(situation: PolicyInput) -> Choice:
    """Where the session ran before, as long as that is there; else by least load."""
    scores = _load_scores(situation)
    candidates, former = situation.candidates, situation.session
    candidate_set, slots = candidates.candidate_set, candidates.load.slots
    if former is None:
        return Choice(candidates.least(scores, candidate_set.usual), scores)
    answers, computes = slots.get(former.answers), slots.get(former.computes)
    if answers is not None and computes is not None:
        same = candidate_set.find(answers, computes)
        if same is not None and candidate_set.usual[same]:
            return Choice(same, scores)
    for kept, now in ((answers, candidate_set.answers), (computes, candidate_set.computes)):
        partly = candidate_set.usual & (now == kept)
        if kept is not None and partly.any():
            return Choice(candidates.least(scores, partly), scores)
    return Choice(candidates.least(scores, candidate_set.usual), scores)


def round_robin(situation: PolicyInput) -> Choice:
    """One after the other, in each role."""
    candidates, turn = situation.candidates, situation.turn
    candidate_set = candidates.candidate_set
    scores = candidates.first_token
    answers = computes = candidate_set.answering[turn % len(candidate_set.answering)]
    partners = [p for p in candidate_set.prefill if candidate_set.find(answers, p) is not None]
    if partners and answers not in partners:
        # Both sides go round in step; one step more after a whole cycle, so that every pair
        # gets its turn however many there are.
        cycle = math.lcm(len(candidate_set.answering), len(partners))
        computes = partners[(turn + turn // cycle) % len(partners)]
    candidate = candidate_set.find(answers, computes)
    assert candidate is not None  # alone, or one of its pairs
    return Choice(candidate, scores)


POLICIES: Mapping[str, Policy] = {
    "prompt-tree": Policy(prompt_tree, fetches=True),
    "session": Policy(session, sessions=True),
    "least-load": Policy(least_load),
    "round-robin": Policy(round_robin),
}


def find_policy(name: str) -> Policy:
    """Raises ConfigError, with the names there are."""
    policy = POLICIES.get(name)
    if policy is None:
        raise ConfigError(f"policy {name!r} is none of {', '.join(POLICIES)}")
    return policy


def _load_scores(situation: PolicyInput) -> Seconds:
    return situation.candidates.weigh(decode=situation.decode_weight, work=1.0)
