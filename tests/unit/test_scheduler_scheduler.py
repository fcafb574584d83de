"""The scheduler chooses the plan that ends first, and counts what it has promised."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from memserve.scheduler.candidates import CandidateSet
from memserve.scheduler.decisions import KEPT_CANDIDATES, Decision
from memserve.scheduler.policies import POLICIES
from memserve.scheduler.refined_costs import RefinedCosts
from memserve.types import SHARED, InstanceId, Namespace, RequestId, Role
from tests.scheduler_harness import Cluster, LinearCosts, request

P0, P1, D0, D1 = (InstanceId(name) for name in ("p0", "p1", "d0", "d1"))


def decided(decision: Decision | None) -> Decision:
    assert decision is not None
    return decision


def test_the_longest_prefix_attracts() -> None:
    cluster = Cluster()
    cluster.add("a", "b", "c")
    cluster.cache(b=512)

    plan = decided(cluster.scheduler.decide(request(1))).plan

    assert plan.instance == "b"
    assert (plan.prompt_tokens, plan.cached_tokens) == (1024, 512)
    assert plan.terms.prefill == pytest.approx(0.512)
    assert cluster.matches.expected == [("b", SHARED, 1024)]


def test_a_queue_outweighs_a_prefix_that_saves_less() -> None:
    cluster = Cluster()
    cluster.add("a", "b")
    cluster.cache(b=512)
    for n in range(2):
        cluster.scheduler.decide(request(n), among=[InstanceId("b")])

    # b: 0.5 s queued twice, 0.5 s to compute; a: 1 s to compute.
    plan = decided(cluster.scheduler.decide(request("third"))).plan

    assert plan.instance == "a"


def test_the_last_token_is_computed_even_if_all_is_cached() -> None:
    cluster = Cluster()
    cluster.add("a")
    cluster.cache(a=1024)

    plan = decided(cluster.scheduler.decide(request(1))).plan

    assert plan.cached_tokens == 1008


def test_a_burst_of_equal_requests_spreads() -> None:
    cluster = Cluster()
    cluster.add(*"abcdefgh")

    chosen = Counter(decided(cluster.scheduler.decide(request(n))).plan.instance for n in range(80))

    assert set(chosen.values()) == {10}


def test_equal_idle_instances_take_turns() -> None:
    cluster = Cluster()
    cluster.add(*"abcd")
    chosen = []
    for n in range(8):
        chosen.append(decided(cluster.scheduler.decide(request(n))).plan.instance)
        cluster.scheduler.prefilled(RequestId(str(n)))
        cluster.scheduler.finished(RequestId(str(n)), 16)

    assert sorted(chosen[:4]) == [*"abcd"]
    assert chosen[:4] == chosen[4:]


def test_a_queue_drains_with_time_but_what_waits_behind_it_does_not() -> None:
    cluster = Cluster()
    cluster.add("a")
    for n in range(2):
        cluster.scheduler.decide(request(n))
    queues = []
    for seconds in (0.0, 0.5, 5.0):
        cluster.clock.advance(seconds)
        queues.append(decided(cluster.scheduler.decide(request("x"))).plan.terms.queue)

    assert queues == pytest.approx([2.048, 1.548, 1.024])


def test_the_next_prompt_starts_when_the_first_is_computed() -> None:
    cluster = Cluster()
    cluster.add("a")
    for n in range(2):
        cluster.scheduler.decide(request(n))
    cluster.clock.advance(0.5)
    cluster.scheduler.prefilled(RequestId("0"))
    cluster.clock.advance(0.25)

    queue = decided(cluster.scheduler.decide(request("x"))).plan.terms.queue

    assert queue == pytest.approx(1.024 - 0.25)


def test_a_short_prompt_passes_a_long_one() -> None:
    cluster = Cluster()
    cluster.add("a")
    cluster.scheduler.decide(request("long", 8192))
    terms = decided(cluster.scheduler.decide(request("short", 512))).plan.terms
    assert terms.queue == pytest.approx(0.512)  # half of each step until it is done
    assert terms.delays == pytest.approx(0.512)

    cluster = Cluster()
    cluster.add("a", short_share=0.0)
    cluster.scheduler.decide(request("long", 8192))
    terms = decided(cluster.scheduler.decide(request("short", 512))).plan.terms
    assert terms.queue == pytest.approx(8.192)
    assert terms.delays == 0.0


def test_a_prompt_goes_where_it_delays_nobody() -> None:
    cluster = Cluster()
    cluster.add("a", "b")
    cluster.cache(a=1024)
    cluster.scheduler.decide(request("long", 8192), among=[InstanceId("a")])

    # On a it would be done in 7.2 + 7.2 s, on b in 8.2 s.
    plan = decided(cluster.scheduler.decide(request("other", np.full(8192, 7, np.int32)))).plan

    assert plan.instance == "b"


def test_a_full_memory_waits_for_answers_to_end() -> None:
    cluster = Cluster()
    cluster.add("a", kv_tokens=2048)
    first = np.full(1500, 7, np.int32)
    cluster.scheduler.decide(request("first", first, output=100))
    cluster.scheduler.prefilled(RequestId("first"))

    # 100 steps of 10.1 ms, and what each context costs.
    terms = decided(cluster.scheduler.decide(request("x", output=100))).plan.terms
    assert terms.queue == pytest.approx(1.01, rel=0.01)

    cluster.add("b", kv_tokens=2048)
    assert decided(cluster.scheduler.decide(request("y", output=100))).plan.instance == "b"


def test_what_is_shared_needs_no_memory_twice() -> None:
    cluster = Cluster()
    cluster.add("a", kv_tokens=2048)
    cluster.cache(a=1008)
    for n in range(3):
        cluster.scheduler.decide(request(n, 1024, output=100))
        cluster.scheduler.prefilled(RequestId(str(n)))

    terms = decided(cluster.scheduler.decide(request("x", 1024, output=100))).plan.terms

    assert terms.queue == 0.0
    assert cluster.scheduler.load.of(InstanceId("a")).residents.kv_tokens < 2048


def test_a_decode_instance_that_will_be_busy_computes_no_prompts() -> None:
    cluster = Cluster(decode_weight=1.0)
    cluster.add("p0", role=Role.PREFILL)
    cluster.add("d0", "d1", role=Role.DECODE)
    for n in range(6):
        among = [P0, D0]
        cluster.scheduler.decide(request(n, 16, output=100), among=among)
        cluster.scheduler.prefilled(RequestId(str(n)))
    cluster.cache(d1=512)

    # d1 decodes nothing, but half of the answers will be there.
    plan = decided(cluster.scheduler.decide(request("x"))).plan

    assert (plan.prefill, plan.instance) == (P0, D1)


def test_prefill_and_decode_instances_share_a_request() -> None:
    cluster = Cluster()
    cluster.add("p0", "p1", role=Role.PREFILL)
    cluster.add("d0", role=Role.DECODE)
    cluster.cache(p1=512, d0=256)

    plan = decided(cluster.scheduler.decide(request(1))).plan

    assert (plan.prefill, plan.instance) == (P1, D0)
    assert plan.cached_tokens == 512
    assert plan.terms.transfer == pytest.approx(768e-6 + 48e-6)  # what d0 lacks
    assert {expected[0] for expected in cluster.matches.expected} == {P1, D0}


def test_a_decode_instance_with_the_prefix_computes_the_rest_itself() -> None:
    cluster = Cluster()
    cluster.add("p0", role=Role.PREFILL, host="here")
    cluster.add("d0", role=Role.DECODE, host="there")
    cluster.cache(d0=1008)

    plan = decided(cluster.scheduler.decide(request(1))).plan

    assert (plan.prefill, plan.instance) == (None, D0)


def test_decode_instances_on_the_same_host_are_nearer() -> None:
    cluster = Cluster()
    link = LinearCosts(bandwidth={"shm": 1e9, "nixl": 1e7})
    cluster.add("p0", role=Role.PREFILL, host="one", costs=link)
    cluster.add("d0", role=Role.DECODE, host="two", costs=link)
    cluster.add("d1", role=Role.DECODE, host="one", costs=link)
    for n in range(3):
        cluster.clock.advance(2)
        plan = decided(cluster.scheduler.decide(request(n, 4096))).plan
        assert (plan.prefill, plan.instance) == (P0, D1)
        cluster.scheduler.finished(RequestId(str(n)))


@pytest.mark.parametrize("policy", ["prompt-tree", "session", "least-load", "round-robin"])
def test_roles_are_soft(policy: str) -> None:
    cluster = Cluster(policy)
    cluster.add("p0", role=Role.PREFILL)
    alone = decided(cluster.scheduler.decide(request(1))).plan
    cluster.scheduler.remove(P0)
    cluster.add("d0", role=Role.DECODE)
    decoding = decided(cluster.scheduler.decide(request(2))).plan

    assert (alone.instance, alone.prefill) == (P0, None)
    assert (decoding.instance, decoding.prefill) == (D0, None)


def test_an_instance_changes_its_role() -> None:
    cluster = Cluster()
    cluster.add("p0", "p1", role=Role.PREFILL)
    cluster.add("p1", role=Role.DECODE)

    plan = decided(cluster.scheduler.decide(request(1))).plan

    assert (plan.prefill, plan.instance) == (P0, P1)


def test_a_full_batch_waits() -> None:
    cluster = Cluster(decode_weight=1.0)
    cluster.add("a", "b", max_running=2)
    cluster.cache(a=512)
    for n in range(2):
        cluster.scheduler.decide(request(n, output=100), among=[InstanceId("a")])
        cluster.scheduler.prefilled(RequestId(str(n)))

    terms = decided(cluster.scheduler.decide(request("x"), among=[InstanceId("a")])).plan.terms

    assert terms.queue == pytest.approx(0.5 * 50 * 0.0102, rel=0.01)
    assert decided(cluster.scheduler.decide(request("y"))).plan.instance == "b"


def test_prefills_and_decodes_slow_each_other_down() -> None:
    cluster = Cluster()
    cluster.add("a")
    alone = decided(cluster.scheduler.decide(request("x"))).plan.terms
    for n in range(4):
        cluster.scheduler.decide(request(n, 16))
        cluster.scheduler.prefilled(RequestId(str(n)))
    beside = decided(cluster.scheduler.decide(request("x"))).plan.terms

    assert beside.prefill > alone.prefill
    assert beside.decode > alone.decode + 4 * alone.prefill


def test_a_longer_prefix_elsewhere_is_fetched_if_that_is_quicker() -> None:
    cluster = Cluster()
    cluster.add("a", "b")
    cluster.cache(a=512)

    plan = decided(cluster.scheduler.decide(request(1), among=None)).plan
    assert plan.fetch is None

    for n in range(3):  # a is busy with something else
        cluster.scheduler.decide(
            request(f"other{n}", np.full(4096, 7, np.int32)), among=[InstanceId("a")]
        )
    plan = decided(cluster.scheduler.decide(request(1))).plan

    assert (plan.instance, plan.fetch) == ("b", "a")
    assert (plan.cached_tokens, plan.fetched_tokens) == (0, 512)
    assert plan.terms.fetch == pytest.approx(512e-6 + 32e-6)
    assert plan.terms.prefill == pytest.approx(0.512)


@pytest.mark.parametrize("kv", ["other", None])
def test_kv_that_means_something_else_is_neither_fetched_nor_handed_over(kv: str | None) -> None:
    cluster = Cluster()
    cluster.add("a", kv=kv)
    cluster.add("b", kv="own")
    cluster.cache(a=512)
    for n in range(3):
        other = request(f"other{n}", np.full(4096, 7, np.int32))
        cluster.scheduler.decide(other, among=[InstanceId("a")])
    plan = decided(cluster.scheduler.decide(request(1))).plan
    assert (plan.instance, plan.fetch) == ("b", None)


@pytest.mark.parametrize("policy", POLICIES)
def test_pairs_are_of_instances_that_hold_the_same_kv(policy: str) -> None:
    cluster = Cluster(policy)
    for kv in ("x", "y"):
        cluster.add(f"p{kv}", role=Role.PREFILL, kv=kv)
        cluster.add(f"d{kv}", role=Role.DECODE, kv=kv)
    cluster.add("none", role=Role.PREFILL, kv=None)
    for n in range(40):
        plan = decided(cluster.scheduler.decide(request(n, np.full(64, n, np.int32)))).plan
        assert plan.prefill in (None, f"p{plan.instance[-1]}")
        assert plan.instance in ("dx", "dy")


def test_a_slow_link_does_not_pay() -> None:
    slow = LinearCosts(bandwidth={"shm": 1e3, "nixl": 1e3})
    cluster = Cluster()
    cluster.add("a", "b", costs=slow)
    cluster.cache(a=512)
    for n in range(3):
        other = request(f"other{n}", np.full(4096, 7, np.int32))
        cluster.scheduler.decide(other, among=[InstanceId("a")])

    assert decided(cluster.scheduler.decide(request(1))).plan.fetch is None


def test_what_is_not_computed_yet_cannot_be_fetched() -> None:
    cluster = Cluster()
    cluster.add("a", "b")
    cluster.cache(a=256)
    for n in range(4):
        cluster.scheduler.decide(request(n), among=[InstanceId("a")])
    cluster.cache(a=1008)  # the tree counts what was routed there

    plan = decided(cluster.scheduler.decide(request("x"), among=None)).plan

    assert (plan.instance, plan.fetch, plan.fetched_tokens) == ("b", "a", 256)


def test_the_wait_for_a_prefix_that_is_being_computed_shrinks_with_time() -> None:
    cluster = Cluster()
    cluster.add("a")
    cluster.scheduler.decide(request(0))
    cluster.cache(a=1008)  # the tree counts what was routed there
    queues = []
    for seconds in (0.0, 0.5, 5.0):
        cluster.clock.advance(seconds)
        queues.append(decided(cluster.scheduler.decide(request("x"))).plan.terms.queue)
        cluster.scheduler.finished(RequestId("x"))

    assert queues == pytest.approx([1.024, 0.524, 0.0])


def test_another_namespace_is_no_promise() -> None:
    cluster = Cluster()
    cluster.add("a", "b")
    cluster.cache(a=256)
    for n in range(4):
        salted = request(n, namespace=Namespace("salt"))
        cluster.scheduler.decide(salted, among=[InstanceId("a")])
    cluster.cache(a=1008)

    plan = decided(cluster.scheduler.decide(request("x"))).plan

    assert (plan.instance, plan.fetch, plan.fetched_tokens) == ("b", "a", 1008)


def test_what_was_learnt_of_an_instance_counts() -> None:
    cluster = Cluster()
    learnt = {name: RefinedCosts(cluster.costs) for name in "ab"}
    for name, costs in learnt.items():
        cluster.add(name, costs=costs)
    for _ in range(100):
        learnt["a"].observe_prefill(1000, 0, 2.0)  # twice what was predicted
    cluster.scheduler.observe(InstanceId("a"), running=0, waiting=0)

    cluster.scheduler.load.refresh()
    assert len(cluster.scheduler.load.cost_groups) == 1
    slow = decided(cluster.scheduler.decide(request(1), among=[InstanceId("a")])).plan
    assert slow.terms.prefill == pytest.approx(2 * 1.024, rel=0.01)
    assert decided(cluster.scheduler.decide(request(2))).plan.instance == "b"


@pytest.mark.parametrize("policy", POLICIES)
def test_of_sessions_no_more_is_kept_than_the_policy_needs(policy: str) -> None:
    cluster = Cluster(policy)
    cluster.add("a")
    for n in range(3):
        decided(cluster.scheduler.decide(request(n, session=f"{n}" * 1_000_000)))
    kept = [*cluster.scheduler._sessions]
    assert [len(key) for key in kept] == ([16] * 3 if policy == "session" else [])


def test_sessions_stay_where_they_are_while_that_lives() -> None:
    cluster = Cluster("session")
    cluster.add("p0", "p1", role=Role.PREFILL)
    cluster.add("d0", "d1", role=Role.DECODE)
    first = decided(cluster.scheduler.decide(request(0, session="s"))).plan
    for n in range(1, 5):
        plan = decided(cluster.scheduler.decide(request(n, session="s"))).plan
        assert (plan.instance, plan.prefill) == (first.instance, first.prefill)
    assert first.prefill is not None
    cluster.scheduler.remove(first.prefill)

    plan = decided(cluster.scheduler.decide(request(9, session="s"))).plan

    assert plan.instance == first.instance
    assert plan.prefill == ({P0, P1} - {first.prefill}).pop()


@pytest.mark.parametrize("policy", ["session", "least-load", "round-robin"])
def test_only_the_prompt_tree_computes_prompts_where_answers_are_decoded(policy: str) -> None:
    cluster = Cluster(policy)
    cluster.add("p0", role=Role.PREFILL)
    cluster.add("d0", role=Role.DECODE)
    cluster.cache(d0=1008)
    plans = [decided(cluster.scheduler.decide(request(n))).plan for n in range(8)]

    assert {(plan.prefill, plan.instance) for plan in plans} == {(P0, D0)}


def test_least_load_ignores_what_is_cached() -> None:
    cluster = Cluster("least-load")
    cluster.add("a", "b")
    cluster.cache(a=1008)

    chosen = Counter(decided(cluster.scheduler.decide(request(n))).plan.instance for n in range(4))

    assert chosen[InstanceId("b")] >= 1


@pytest.mark.parametrize(("prefill", "decode"), [(1, 2), (2, 2), (2, 3), (3, 1), (4, 6)])
def test_round_robin_gives_every_pair_its_turn(prefill: int, decode: int) -> None:
    cluster = Cluster("round-robin")
    cluster.add(*(f"p{n}" for n in range(prefill)), role=Role.PREFILL)
    cluster.add(*(f"d{n}" for n in range(decode)), role=Role.DECODE)
    plans = [
        decided(cluster.scheduler.decide(request(n))).plan for n in range(2 * prefill * decode)
    ]

    pairs = Counter((plan.prefill, plan.instance) for plan in plans)

    assert len(pairs) == prefill * decode
    assert set(pairs.values()) == {2}


def test_what_an_instance_reports_beyond_the_reservations_counts() -> None:
    cluster = Cluster()
    cluster.add("a", "b")
    cluster.scheduler.decide(request(0), among=[InstanceId("a")])
    cluster.scheduler.observe(InstanceId("a"), running=0, waiting=1)  # that is the one above
    assert cluster.scheduler.load.of(InstanceId("a")).other_prefills == 0
    cluster.scheduler.observe(InstanceId("b"), running=9, waiting=30)

    chosen = {decided(cluster.scheduler.decide(request(n))).plan.instance for n in range(1, 3)}

    assert chosen == {"a"}


def test_expected_output_follows_what_answers_took() -> None:
    cluster = Cluster()
    cluster.add("a")
    length = cluster.scheduler.output_length
    for n in range(200):
        cluster.scheduler.decide(request(n, output=100_000))
        cluster.scheduler.finished(RequestId(str(n)), 100_000 if n % 50 == 49 else 20)

    assert 20 <= length.expected < 40
    cluster.scheduler.decide(request("short", output=3))
    assert cluster.scheduler.load.of(InstanceId("a")).output_tokens == 3


def test_a_request_that_is_tried_again_is_counted_once() -> None:
    cluster = Cluster()
    cluster.add("a", "b")
    first = decided(cluster.scheduler.decide(request(1))).plan.instance
    second = decided(
        cluster.scheduler.decide(request(1), among={InstanceId("a"), InstanceId("b")} - {first})
    ).plan.instance

    assert second != first
    assert cluster.scheduler.load.of(first).idle
    assert not cluster.scheduler.load.of(second).idle


def test_a_late_end_does_not_touch_the_next_life_of_an_instance() -> None:
    cluster = Cluster()
    cluster.add("a")
    cluster.scheduler.decide(request("old"))
    cluster.scheduler.remove(InstanceId("a"))
    cluster.add("a")
    cluster.scheduler.decide(request("new"))
    cluster.scheduler.finished(RequestId("old"))

    assert cluster.scheduler.load.of(InstanceId("a")).answers == 1


def test_what_a_prompt_costs_at_admission() -> None:
    cluster = Cluster()
    assert cluster.scheduler.whole_prefill_seconds(1000) == 0.0
    cluster.add("a")
    cluster.add("b", costs=LinearCosts(token_seconds=3e-3))
    assert cluster.scheduler.whole_prefill_seconds(1000) == pytest.approx(2.0)


def test_nobody_there() -> None:
    cluster = Cluster()
    assert cluster.scheduler.decide(request(1)) is None
    cluster.add("a")
    assert cluster.scheduler.decide(request(1), among=[InstanceId("gone")]) is None
    assert cluster.scheduler.load.reserved == 0


def test_the_same_seed_gives_the_same_decisions() -> None:
    def run(seed: int) -> list[InstanceId]:
        cluster = Cluster(seed=seed)
        cluster.add(*"abcdefgh")
        return [decided(cluster.scheduler.decide(request(n))).plan.instance for n in range(20)]

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_decisions_explain_themselves() -> None:
    cluster = Cluster()
    cluster.add(*(f"i{n}" for n in range(20)))
    cluster.cache(i3=512)
    decision = decided(cluster.scheduler.decide(request("r1")))
    for n in range(1005):
        cluster.scheduler.decide(request(n, 16))

    view = decision.view()
    assert view.chosen.instance == "i3"
    assert len(view.candidates) == KEPT_CANDIDATES
    assert view.considered == 20
    assert view.candidates[0].score == min(other.score for other in view.candidates)
    assert "i3, 512 of 1024 tokens cached" in decision.summary()
    assert decision.explanation().count("\n") == KEPT_CANDIDATES
    kept = cluster.scheduler.decisions
    assert [other.request for other in kept.last(2)] == ["1004", "1003"]
    assert len(kept.views()) == len(kept) == 1000


def test_candidates_are_found_by_their_instances() -> None:
    """With several kinds of KV, between which no pair is possible, and an instance without any."""
    cluster = Cluster()
    kinds = {Role.PREFILL: "abab", Role.DECODE: "babca", Role.COLOCATED: "ab"}
    for role, pools in kinds.items():
        for number, kv in enumerate(pools):
            cluster.add(f"{role}-{number}", role=role, kv=kv)
    cluster.add("none-p", role=Role.PREFILL, kv=None)
    cluster.add("none-d", role=Role.DECODE, kv=None)
    load = cluster.scheduler.load
    lines = load.by_slot
    made = CandidateSet(load)
    pairs = {
        (a.slot, c.slot)
        for a in lines
        for c in lines
        if a is not c
        and (a.spec.role, c.spec.role) == (Role.DECODE, Role.PREFILL)
        and a.spec.kv is not None
        and a.spec.kv == c.spec.kv
    }
    alone = {(a.slot, a.slot) for a in lines if a.spec.role is not Role.PREFILL}
    ways = list(zip(made.answers.tolist(), made.computes.tolist(), strict=True))
    assert sorted(ways) == sorted(pairs | alone)
    assert made.pairs == len(pairs) == 2 * 2 + 2 * 2
    for answers in range(len(lines)):
        for computes in range(len(lines)):
            at = ways.index((answers, computes)) if (answers, computes) in ways else None
            assert made.find(answers, computes) == at
