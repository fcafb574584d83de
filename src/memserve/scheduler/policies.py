"""Policies: functions that choose a candidate. To add one, write a function and an entry in
`POLICIES`."""

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
    """The instances that ran a session's last request."""

    answers: InstanceId
    computes: InstanceId


class PolicyInput(msgspec.Struct, frozen=True, eq=False):
    """Input of a policy, which must not change it."""

    request: PromptRequest
    candidates: Candidates  # at least one
    decode_weight: float  # weight of a second of decoding; a second of TTFT has weight 1
    turn: int  # decisions before this one
    session: Placement | None  # last placement of the request's session


class Choice(msgspec.Struct, frozen=True, eq=False):
    """The chosen candidate, and the scores [candidates] of the choice; the least is best."""

    candidate: int
    scores: Seconds


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy and its requirements. `fetches`: its plans may pull a longer prefix from a third
    instance. `sessions`: it reads the session's last placement; else none is recorded."""

    choose: Callable[[PolicyInput], Choice]
    fetches: bool = False
    sessions: bool = False


def prompt_tree(given: PolicyInput) -> Choice:
    """Choose the least predicted TTFT + delays of other prompts + weighted decode time."""
    candidates, weight = given.candidates, given.decode_weight
    scores = candidates.weigh(first_token=1.0, decode=weight, delays=1.0, stalls=weight)
    return Choice(candidates.least(scores), scores)


def least_load(given: PolicyInput) -> Choice:
    """Choose the least queued work + weighted decode time; cached prefixes do not count."""
    candidates, scores = given.candidates, _load_scores(given)
    return Choice(candidates.least(scores, candidates.candidate_set.usual), scores)


def session(given: PolicyInput) -> Choice:
    """Choose the session's last instances; if they are no candidate now, the least loaded one that
    keeps the answering or else the computing instance; else the least loaded one."""
    scores = _load_scores(given)
    candidates, former = given.candidates, given.session
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


def round_robin(given: PolicyInput) -> Choice:
    """Choose instances in turn, in each role."""
    candidates, turn = given.candidates, given.turn
    candidate_set = candidates.candidate_set
    scores = candidates.first_token
    answers = computes = candidate_set.answering[turn % len(candidate_set.answering)]
    partners = [p for p in candidate_set.prefill if candidate_set.find(answers, p) is not None]
    if partners and answers not in partners:
        # Both sides advance together, so only some pairs would ever occur if the two counts
        # have a common factor: shift the prefill side by one after each cycle.
        cycle = math.lcm(len(candidate_set.answering), len(partners))
        computes = partners[(turn + turn // cycle) % len(partners)]
    candidate = candidate_set.find(answers, computes)
    assert candidate is not None  # an instance alone, or one of its pairs
    return Choice(candidate, scores)


POLICIES: Mapping[str, Policy] = {
    "prompt-tree": Policy(prompt_tree, fetches=True),
    "session": Policy(session, sessions=True),
    "least-load": Policy(least_load),
    "round-robin": Policy(round_robin),
}


def find_policy(name: str) -> Policy:
    """Return the policy of a name. Raises ConfigError, which lists the known names."""
    policy = POLICIES.get(name)
    if policy is None:
        raise ConfigError(f"unknown policy {name!r}; known: {', '.join(POLICIES)}")
    return policy


def _load_scores(given: PolicyInput) -> Seconds:
    return given.candidates.weigh(decode=given.decode_weight, work=1.0)
