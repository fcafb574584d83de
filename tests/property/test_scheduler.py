"""Whatever happens to requests and instances: reservations balance, decisions name only who is
there, and a fetch pays."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from memserve.scheduler import kernels
from memserve.scheduler.contract import InstanceSpec
from memserve.scheduler.load import Load
from memserve.scheduler.policies import POLICIES
from memserve.types import InstanceId, RequestId, Role
from tests.scheduler_harness import BLOCK, Cluster, LinearCosts, request

NAMES = [f"i{n}" for n in range(6)]
MODELS = [
    LinearCosts(),
    LinearCosts(token_seconds=3e-3, bandwidth={"shm": 1e6, "nixl": 1e5}),
    LinearCosts(step_seconds=30e-3, bandwidth={"shm": 1e10, "nixl": 1e5}),
]
policies = st.sampled_from(sorted(POLICIES))
specs = st.tuples(
    st.sampled_from(list(Role)),
    st.sampled_from(MODELS),
    st.sampled_from(["here", "there"]),
    st.sampled_from([1, 4, 64]),
)
cached = st.dictionaries(st.sampled_from(NAMES), st.integers(0, 80).map(lambda n: n * BLOCK))


class Life(RuleBasedStateMachine):
    """Instances come, go and change; requests are decided, computed and ended in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.clusters = {policy: Cluster(policy) for policy in POLICIES}
        self.there: set[InstanceId] = set()
        self.requests: list[RequestId] = []

    @rule(name=st.sampled_from(NAMES), spec=specs)
    def put(self, name: str, spec: tuple[Role, LinearCosts, str, int]) -> None:
        role, costs, host, running = spec
        for cluster in self.clusters.values():
            cluster.add(name, role=role, costs=costs, host=host, max_running=running)
        self.there.add(InstanceId(name))

    @precondition(lambda self: self.there)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.there)))
        for cluster in self.clusters.values():
            cluster.scheduler.remove(name)
        self.there.discard(name)

    @rule(
        prompt=st.integers(0, 1300),
        output=st.integers(1, 300),
        held=cached,
        among=st.none() | st.sets(st.sampled_from(NAMES)),
        session=st.none() | st.sampled_from("st"),
    )
    def decide(
        self,
        prompt: int,
        output: int,
        held: dict[str, int],
        among: set[str] | None,
        session: str | None,
    ) -> None:
        named = None if among is None else {InstanceId(name) for name in among}
        allowed = self.there if named is None else self.there & named
        wanted = request(len(self.requests), prompt, output=output, session=session)
        for cluster in self.clusters.values():
            cluster.cache(**held)
            decision = cluster.scheduler.decide(wanted, named)
            assert (decision is not None) == bool(allowed)
            if decision is None:
                continue
            view = decision.view()
            for candidate in (view.chosen, *view.candidates):
                parts = {candidate.instance, candidate.prefill, candidate.fetch} - {None}
                assert parts <= allowed
            plan = decision.plan
            assert plan.cached_tokens + plan.fetched_tokens <= max(prompt - 1, 0)
            terms = plan.terms
            values = (terms.queue, terms.fetch, terms.prefill, terms.transfer, terms.decode)
            assert np.isfinite(values).all()
            assert min(values) >= 0
        self.requests.append(wanted.id)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), ended=st.booleans())
    def progress(self, data: st.DataObject, ended: bool) -> None:
        name = data.draw(st.sampled_from(self.requests))
        for cluster in self.clusters.values():
            if ended:
                cluster.scheduler.finished(name, 10)
            else:
                cluster.scheduler.prefilled(name)

    @rule(name=st.sampled_from(NAMES), running=st.integers(0, 9), waiting=st.integers(0, 9))
    def observe(self, name: str, running: int, waiting: int) -> None:
        for cluster in self.clusters.values():
            cluster.scheduler.observe(InstanceId(name), running=running, waiting=waiting)

    @rule(seconds=st.floats(0, 3))
    def wait(self, seconds: float) -> None:
        for cluster in self.clusters.values():
            cluster.clock.advance(seconds)

    @invariant()
    def arrays_agree_with_lines(self) -> None:
        for cluster in self.clusters.values():
            check_load(cluster.scheduler.load)

    def teardown(self) -> None:
        for cluster in self.clusters.values():
            for name in self.requests:
                cluster.scheduler.finished(name)
            load = cluster.scheduler.load
            assert load.reserved == 0
            assert all(line.idle for line in load.by_slot)


def check_load(load: Load) -> None:
    """The arrays show what the lines hold."""
    load.refresh()
    for at, line in enumerate(load.by_slot):
        assert load.slots[line.spec.id] == line.slot == at
        assert line.answers >= line.decoding >= 0
        figures = load.stats[at]
        assert figures[kernels.RUNNING] == line.decoding + line.other_running
        assert figures[kernels.BATCH] == line.answers + line.other_running
        assert min(line.context_tokens, line.output_tokens) >= 0
        assert list(line.prefills) == [
            request for request in line.prefills if request in line.queue
        ]
        assert len(line.queue) == len(line.prefills)
        promised = sum(each.prefill_seconds for each in line.prefills.values())
        left = sum(line.queue.left())
        assert 0 <= left <= promised + 1e-9
        assert figures[kernels.LEFT_TOTAL] >= left - 1e-9


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@settings(max_examples=60, deadline=None)
@given(st.lists(specs, min_size=1, max_size=6), cached, st.integers(1, 1300))
def test_a_fetch_costs_no_more_than_it_saves(
    shapes: list[tuple[Role, LinearCosts, str, int]], held: dict[str, int], prompt: int
) -> None:
    cluster = Cluster()
    models = {}
    for name, (role, costs, host, running) in zip(NAMES, shapes, strict=False):
        cluster.add(name, role=role, costs=costs, host=host, max_running=running)
        models[name] = (costs, host)
    cluster.cache(**held)
    decision = cluster.scheduler.decide(request(1, prompt))
    assert decision is not None
    for candidate in decision.view().candidates:
        if candidate.fetch is None:
            assert candidate.terms.fetch == candidate.fetched_tokens == 0
            continue
        computes = candidate.prefill or candidate.instance
        costs, host = models[computes]
        source, source_host = models[candidate.fetch]
        have, more = candidate.cached_tokens, candidate.fetched_tokens
        saved = costs.prefill_seconds(prompt, have) - costs.prefill_seconds(prompt, have + more)
        took = source.transfer_seconds(
            more * source.kv_bytes_per_token,
            more // BLOCK,
            "shm" if host == source_host else "nixl",
        )
        assert more > 0
        assert np.isclose(candidate.terms.fetch, took)
        assert took <= saved + 1e-9
        assert have + more <= held[candidate.fetch]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.lists(st.integers(0, 3000), min_size=2, max_size=6))
def test_more_cached_is_never_slower(prompt: int, lengths: list[int]) -> None:
    predicted = []
    for length in sorted(lengths):
        cluster = Cluster()
        cluster.add("a")
        cluster.cache(a=length // BLOCK * BLOCK)
        decision = cluster.scheduler.decide(request(1, prompt))
        assert decision is not None
        predicted.append(decision.plan.terms.prefill)

    assert predicted == sorted(predicted, reverse=True)


@settings(max_examples=40, deadline=None)
@given(policies, st.integers(1, 8), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_a_burst_of_equal_requests_spreads(policy: str, n: int, rounds: int, seed: int) -> None:
    cluster = Cluster(policy, seed=seed)
    cluster.add(*(f"i{number}" for number in range(n)))
    chosen: Counter[InstanceId] = Counter()
    for number in range(n * rounds):
        decision = cluster.scheduler.decide(request(number))
        assert decision is not None
        chosen[decision.plan.instance] += 1

    assert set(chosen.values()) == {rounds}
    assert len(chosen) == n


@settings(max_examples=30, deadline=None)
@given(policies, st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_a_burst_spreads_over_prefill_instances(
    policy: str, prefill: int, decode: int, seed: int
) -> None:
    cluster = Cluster(policy, seed=seed)
    cluster.add(*(f"p{number}" for number in range(prefill)), role=Role.PREFILL)
    cluster.add(*(f"d{number}" for number in range(decode)), role=Role.DECODE)
    computing: Counter[InstanceId] = Counter()
    answering: Counter[InstanceId] = Counter()
    for number in range(4 * prefill * decode):
        decision = cluster.scheduler.decide(request(number))
        assert decision is not None
        computing[decision.plan.computes] += 1
        answering[decision.plan.instance] += 1

    shares = [computing[InstanceId(f"p{number}")] for number in range(prefill)]
    assert max(shares) - min(shares) <= 1
    assert len(answering) == decode


def test_a_changed_spec_takes_effect() -> None:
    cluster = Cluster()
    cluster.add("a")
    slow = InstanceSpec(InstanceId("a"), Role.COLOCATED, MODELS[1], BLOCK, "here")
    before = cluster.scheduler.decide(request(1))
    cluster.scheduler.put(slow)
    after = cluster.scheduler.decide(request(2))

    assert before is not None
    assert after is not None
    assert after.plan.terms.prefill == 3 * before.plan.terms.prefill
