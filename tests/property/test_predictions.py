"""The compiled arithmetic of a decision, against a plain statement of the same formulas."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memserve.scheduler import choosing, kernels
from memserve.scheduler.candidates import Candidates, CandidateSet
from memserve.scheduler.contract import Costs, PromptRequest
from memserve.scheduler.decisions import KEPT_CANDIDATES, Ranking
from memserve.scheduler.refined_costs import RefinedCosts
from memserve.types import InstanceId, RequestId, Role
from tests.prediction_oracle import NEAR_TIE, Oracle
from tests.scheduler_harness import BLOCK, Cluster, LinearCosts, request

NAMES = [f"i{n}" for n in range(6)]
MODELS = [
    LinearCosts(),
    LinearCosts(token_seconds=3e-3, bandwidth={"shm": 1e6, "nixl": 1e5, "host": 1e6}),
    LinearCosts(step_seconds=30e-3, bandwidth={"shm": 1e10, "nixl": 1e5, "host": 1e9}),
]
COMPILED = [
    kernels.survey,
    kernels.survey_sources,
    kernels.predict,
    choosing.weigh,
    choosing.least,
    choosing.rank,
]
specs = st.tuples(
    st.sampled_from(list(Role)),
    st.sampled_from(MODELS),
    st.sampled_from([None, 0.5, 3.0]),  # what is learnt of it
    st.sampled_from(["here", "there"]),
    st.sampled_from([1, 3, 64]),
    st.sampled_from([None, 3000, 100_000]),
    st.sampled_from([0.0, 0.3, 0.5]),
    st.sampled_from(["same", "same", "other", None]),  # what KV it holds
)
prompts = st.tuples(st.integers(0, 1300), st.integers(0, 80))  # tokens, blocks of a known prompt
cached = st.dictionaries(st.sampled_from(NAMES), st.integers(0, 80).map(lambda n: n * BLOCK))
past = st.lists(
    st.tuples(
        prompts,
        cached,
        st.integers(1, 300),  # output tokens
        st.sampled_from(["waits", "decodes", "ended"]),
        st.floats(0, 1),  # seconds until the next one
    ),
    max_size=12,
)
others = st.dictionaries(
    st.sampled_from(NAMES), st.tuples(st.integers(0, 9), st.integers(0, 70)), max_size=3
)


def learnt(model: Costs, ratio: float | None) -> Costs:
    if ratio is None:
        return model
    refined = RefinedCosts(model)
    for _ in range(10):
        refined.observe_prefill(1000, 0, ratio * float(model.prefill_seconds(1000, 0)))
        refined.observe_decode_step(4, 900, ratio * float(model.decode_step_seconds(4, 900)))
        near = float(model.transfer_seconds(10**6, 9, "shm"))
        refined.observe_transfer(10**6, 9, "shm", near / ratio)
        far = float(model.transfer_seconds(10**6, 9, "nixl"))
        refined.observe_transfer(10**6, 9, "nixl", far * ratio * ratio)
    return refined


def asking(name: object, prompt: tuple[int, int], output: int) -> PromptRequest:
    """Half of them begin as another does, and then go on alone."""
    tokens, known = prompt
    own = np.arange(tokens, dtype=np.int32) + 10_000
    own[: known * BLOCK] -= 10_000
    return request(name, own, output=output)


@contextmanager
def as_python() -> Iterator[None]:
    """Without machine code."""
    runs = [kernel.run for kernel in COMPILED]
    for kernel in COMPILED:
        kernel.run = kernel.python
    try:
        yield
    finally:
        for kernel, run in zip(COMPILED, runs, strict=True):
            kernel.run = run


def choices(oracle: Oracle, candidate_set: CandidateSet, scores: list[float]) -> set[int]:
    """Those that may be chosen, as far as rounding decides."""
    load, chosen = oracle.load, set()
    ways = list(zip(candidate_set.answers.tolist(), candidate_set.computes.tolist(), strict=True))
    whole = min(here.whole for here in oracle.here)
    for rounding in (1 - 1e-9, 1.0, 1 + 1e-9):
        limit = (min(scores) + NEAR_TIE * whole) * rounding
        near = [at for at, score in enumerate(scores) if score <= limit]
        plain = [
            at for at in near if candidate_set.usual[at] and not oracle.here[ways[at][1]].fetched
        ]
        if near:
            turns = {at: sum(load.by_slot[slot].used for slot in ways[at]) for at in plain or near}
            chosen.add(min(turns, key=turns.__getitem__))
    return chosen


@dataclass(frozen=True)
class Asked:
    """A scheduler with a past, a request, and what is known of its prompt."""

    cluster: Cluster
    request: PromptRequest
    output: int
    matches: dict[InstanceId, int]
    in_host: dict[InstanceId, int]
    among: set[InstanceId] | None
    fetches: bool
    overlapped: bool

    def predict(self, candidates: Candidates) -> None:
        candidates.predict(
            self.request,
            self.output,
            self.matches,
            self.in_host,
            self.cluster.clock.now(),
            fetches=self.fetches,
            overlapped=self.overlapped,
        )

    def oracle(self, candidate_set: CandidateSet) -> Oracle:
        return Oracle(
            self.cluster.scheduler.load,
            self.request,
            self.output,
            self.matches,
            self.in_host,
            self.cluster.clock.now(),
            allowed=candidate_set.allowed,
            computing=sorted(set(candidate_set.computes.tolist())),
            answering=candidate_set.answering,
            fetches=self.fetches,
            overlapped=self.overlapped,
        )


@st.composite
def questions(draw: st.DrawFn) -> Asked:
    cluster = Cluster()
    scheduler = cluster.scheduler
    instances = draw(st.lists(specs, min_size=1, max_size=len(NAMES)))
    for name, spec in zip(NAMES, instances, strict=False):
        role, model, ratio, host, running, room, share, kv = spec
        cluster.add(
            name,
            role=role,
            costs=learnt(model, ratio),
            host=host,
            max_running=running,
            kv_tokens=room,
            short_share=share,
            kv=kv,
        )
    for number, (prompt, found, output, state, pause) in enumerate(draw(past)):
        cluster.cache(**found)
        scheduler.decide(asking(number, prompt, output))
        cluster.clock.advance(pause)
        if state != "waits":
            scheduler.prefilled(RequestId(str(number)))
        if state == "ended":
            scheduler.finished(RequestId(str(number)), output)
    for name, (running, waiting) in draw(others).items():
        scheduler.observe(InstanceId(name), running=running, waiting=waiting)
    output = draw(st.integers(1, 300))
    request = asking("new", draw(prompts), output)
    matches = {InstanceId(n): min(held, len(request.tokens)) for n, held in draw(cached).items()}
    in_host = {id_: n for id_, n in matches.items() if n and draw(st.booleans())}
    some = st.sets(st.sampled_from(NAMES[: len(instances)]).map(InstanceId), min_size=1)
    among = draw(st.none() | some)
    return Asked(
        cluster, request, output, matches, in_host, among, draw(st.booleans()), draw(st.booleans())
    )


def close(actual: object, expected: object) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)


@given(asked=questions(), weight=st.sampled_from([0.0, 0.1, 2.0]))
@settings(max_examples=200, deadline=None)
def test_predictions_are_what_the_formulas_say(asked: Asked, weight: float) -> None:
    load = asked.cluster.scheduler.load
    candidate_set = CandidateSet(load, asked.among)
    candidates, oracle = Candidates(load, candidate_set), asked.oracle(candidate_set)
    asked.predict(candidates)
    here = oracle.here
    close(candidates.cached, [each.cached for each in here])
    close(candidates.source, [each.source for each in here])
    close(candidates.fetched, [each.fetched for each in here])
    close(candidates.fetch, [each.fetch for each in here])
    close(candidates.prefill, [each.prefill for each in here])
    close(candidates.delays, [each.delays for each in here])
    close(candidates.stalls, [each.stalls for each in here])
    close(candidates.work, [each.work for each in here])
    close(candidates.whole_prefill, min(each.whole for each in here))
    ways = list(zip(candidate_set.answers.tolist(), candidate_set.computes.tolist(), strict=True))
    close(candidates.transfer, [oracle.transfer(*way) for way in ways])
    close(candidates.first_token, [oracle.first_token(*way) for way in ways])
    close(candidates.decode, [oracle.decode(*way) for way in ways])

    scores = candidates.weigh(first_token=1.0, decode=weight, delays=1.0, stalls=weight, work=0.5)
    expected = []
    for a, c in ways:
        decoding = weight * (oracle.decode(a, c) + here[c].stalls)
        beside = here[c].delays + 0.5 * here[c].work
        expected.append(oracle.first_token(a, c) + decoding + beside)
    close(scores, expected)
    assert candidates.least(scores) in choices(oracle, candidate_set, expected)
    ranking = Ranking.of(candidates, scores, len(ways) - 1)
    others = sorted(scores[:-1].tolist())[: KEPT_CANDIDATES - 1]
    assert ranking.scores.tolist() == [scores[-1], *others]


@given(asked=questions())
@settings(max_examples=50, deadline=None)
def test_machine_code_computes_what_python_does(asked: Asked) -> None:
    """To the last bit: a decision does not depend on whether there is a compiler."""
    load = asked.cluster.scheduler.load
    candidates = Candidates(load, CandidateSet(load, asked.among))

    def figures() -> list[list[float]]:
        asked.predict(candidates)
        scores = candidates.weigh(first_token=1.0, decode=0.1, delays=1.0, stalls=0.1)
        ranking = Ranking.of(candidates, scores, candidates.least(scores))
        return [*ranking.stats.tolist(), *ranking.seconds.tolist()]

    compiled = figures()
    with as_python():
        assert figures() == compiled


def test_a_set_of_former_members_is_refused() -> None:
    """Compiled code would write behind the ends of its arrays."""
    cluster = Cluster()
    cluster.add("a")
    load = cluster.scheduler.load
    candidates = Candidates(load, CandidateSet(load))
    cluster.add("b")
    with pytest.raises(RuntimeError, match="members have changed"):
        candidates.predict(request("r"), 1, {}, {}, 0.0, fetches=True)
