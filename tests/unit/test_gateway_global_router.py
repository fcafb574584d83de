"""The scheduler behind a gateway: members come and go, plans are reserved, and times learnt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
import numpy as np
import pytest

from memserve.api.namespaces import salted
from memserve.api.status import InstanceState
from memserve.gateway import global_router, instance_costs
from memserve.gateway.instance_costs import UNKNOWN, StepTimes, answer_tokens
from memserve.scheduler.contract import InstanceSpec
from memserve.scheduler.prompt_tree import PromptTree
from memserve.scheduler.refined_costs import RefinedCosts
from memserve.types import InstanceId, RequestId, Role
from tests.kv_events_harness import until
from tests.router_harness import LIMITS, Routed, call_of, profile_of, routed, totals
from tests.scheduler_harness import LinearCosts

A, B = InstanceId("a"), InstanceId("b")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instance_costs, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(global_router, "LOOK_SECONDS", 0.002)


@pytest.fixture
async def world() -> AsyncIterator[Routed]:
    async with routed() as made:
        yield made


def held(tree: PromptTree, instance: InstanceId, tokens: int) -> None:
    """Have the trees know that an instance holds the prompt 0, 1, 2, ... of so many tokens."""
    if instance not in tree:
        tree.join(instance, 16)
    hashes = list(range(tokens // 16))
    tree.stored(instance, salted(""), None, hashes, np.arange(tokens, dtype=np.int32))


# --- members ------------------------------------------------------------------------------------


async def test_members_are_known_while_they_are_there(world: Routed) -> None:
    a = world.member("a", Role.PREFILL, state=InstanceState.STARTING, limits=None)
    assert world.known == {"a": Role.PREFILL}
    assert world.spec("a").host == "127.0.0.1"
    assert world.asked == []  # it has nothing to tell yet
    world.member("a", Role.PREFILL)
    world.member("b", Role.DECODE)
    await world.profiled("a")
    assert "a" in world.asked
    world.member("a", Role.COLOCATED)
    assert world.known == {"a": Role.COLOCATED, "b": Role.DECODE}
    world.membership.leave(a.address)
    assert world.known == {"b": Role.DECODE}
    b = world.membership.find(B)
    assert b is not None
    world.membership.refused(b)
    assert world.known == {}


async def test_what_an_instance_says_of_its_limits_counts_at_once(world: Routed) -> None:
    world.member("a", state=InstanceState.STARTING, limits=None)
    assert world.spec("a").block_tokens == 16
    world.member("a")
    spec = world.spec("a")
    assert (spec.block_tokens, spec.max_running, spec.chunk_tokens, spec.kv_tokens) == (
        LIMITS.block_tokens,
        LIMITS.max_running,
        LIMITS.mixed_batch_tokens,
        LIMITS.pool_tokens,
    )
    # News that come with a poll and without a change of state, too.
    world.member("a", limits=msgspec.structs.replace(LIMITS, max_running=9), steps=1)
    await until(lambda: world.spec("a").max_running == 9, "the new limit")


async def test_a_new_life_has_nothing_of_the_former_one(world: Routed) -> None:
    world.profiles["a"] = profile_of("h100")
    world.member("a")
    await world.profiled("a")
    plan = world.plan(call_of())
    former = world.spec("a").costs
    world.member("a", epoch=2, limits=None)
    assert world.router.scheduler.load.line(A).idle
    assert world.spec("a").block_tokens == 16
    plan.ticket.first_token()
    plan.ticket.ended()
    await world.profiled("a")
    assert world.asked == ["a", "a"]
    assert world.spec("a").costs == former  # of the same hardware, with what was learnt of it


async def test_an_answer_of_a_life_that_is_over_changes_nothing(world: Routed) -> None:
    world.profiles["a"] = profile_of("h100")
    world.member("a")
    asking = world.router._known[A].asking
    assert asking is not None
    world.profiles.clear()
    world.member("a", epoch=2)
    await asyncio.wait((asking,))
    await world.profiled("a")
    assert isinstance(world.spec("a").costs, RefinedCosts)
    assert not world.router._known[A].profiled


async def test_whoever_no_longer_is_in_the_membership_is_not_planned(world: Routed) -> None:
    a, b = world.member("a"), world.member("b")
    world.router.scheduler.remove(A)
    world.router.scheduler.remove(B)
    # Not known to the scheduler, but ready: any order will do, and no decision is explained.
    plans = [world.router.plan(call_of(), [a, b]) for _ in range(2)]
    assert {plan.member.id for plan in plans} == {"a", "b"}
    assert [plan.explain() for plan in plans] == ["by turns"] * 2
    assert world.router.decisions(9) == []


# --- costs --------------------------------------------------------------------------------------


async def test_instances_of_one_fingerprint_share_their_costs(world: Routed) -> None:
    world.profiles.update(a=profile_of("h100"), b=profile_of("h100"), c=profile_of("cpu"))
    for name in "abc":
        world.member(name)
    for name in "abc":
        await world.profiled(name)
    assert world.spec("a").costs is world.spec("b").costs
    assert world.spec("a").costs is not world.spec("c").costs
    assert len(world.router.scheduler.load.cost_groups) == 2


async def test_an_instance_without_a_profile_is_taken_to_be_like_the_others(
    world: Routed,
) -> None:
    world.profiles["a"] = profile_of("h100")
    world.member("b")
    await world.profiled("b")
    assert world.asked == ["b"] * instance_costs.MAX_QUESTIONS
    guessed = world.spec("b").costs
    assert isinstance(guessed, RefinedCosts)
    assert guessed.model == UNKNOWN
    world.member("a")
    await world.profiled("a")
    known, guess = world.spec("a").costs, world.spec("b").costs
    assert isinstance(known, RefinedCosts)
    assert isinstance(guess, RefinedCosts)
    assert guess.model == known.model
    assert guess is not known  # what is learnt of it is its own
    assert len(world.router.scheduler.load.cost_groups) == 1


async def test_a_profile_that_cannot_be_read_is_asked_for_once(world: Routed) -> None:
    world.profiles["a"] = b"\xff{}"
    world.member("a")
    await world.profiled("a")
    assert world.asked == ["a"]
    assert world.plan_and_end(call_of()) == "a"


async def test_first_tokens_teach_what_prefills_cost(world: Routed) -> None:
    world.member("a")
    await world.profiled("a")
    costs = world.spec("a").costs
    assert isinstance(costs, RefinedCosts)
    for _ in range(40):
        plan = world.plan(call_of())
        predicted = float(costs.model.prefill_seconds(100, 0))
        world.clock.advance(2 * predicted)
        plan.ticket.first_token()
        plan.ticket.ended()
    assert 1.5 < costs.factor("prefill") <= 2.01
    # Where most of the wait was something else, nothing is learnt of prefills.
    before = costs.factor("prefill")
    plans = [world.plan(call_of()) for _ in range(8)]
    world.clock.advance(1000.0)
    for plan in plans[1:]:
        plan.ticket.first_token()
    for plan in plans:
        plan.ticket.ended()
    assert costs.factor("prefill") == before


def test_decode_steps_are_learnt_from_polls_that_saw_nothing_else() -> None:
    costs = RefinedCosts(LinearCosts())
    spec = spec_of(costs)
    times = StepTimes()
    figures = {"computed_prompt_tokens": 5, "steps": 0, "generated_tokens": 0}
    step = float(LinearCosts().decode_step_seconds(2, 100))
    times.learn(spec, totals(**figures), 100)
    for number in range(1, 200):  # two steps a poll: too few for one to say much
        figures.update(steps=2 * number, generated_tokens=4 * number)
        times.learn(spec, totals(**figures, busy_seconds=2 * number * step * 3), 100)
    assert 2.5 < costs.factor("decode") < 3.01
    other = RefinedCosts(LinearCosts())
    for number in range(1, 200):  # always with a prompt in between
        figures.update(steps=10 * number, generated_tokens=20 * number)
        figures.update(computed_prompt_tokens=number)
        times.learn(spec_of(other), totals(**figures, busy_seconds=number * 9.0), 100)
    assert other.factor("decode") == 1.0


def test_answers_lengths_are_told_while_a_batch_fills_and_empties() -> None:
    idle = totals()
    assert answer_tokens(idle, totals(generated_tokens=900, running=9)) is None  # none has ended
    steady = totals(running=4, finished=10, generated_tokens=500)
    later = totals(running=4, finished=20, generated_tokens=1000)
    assert answer_tokens(steady, later) == 50
    # Sixty-four at once, of which one has ended: most of the tokens are others'.
    filling = totals(running=63, finished=1, generated_tokens=64 * 20)
    assert answer_tokens(idle, filling) == pytest.approx(64 * 20 / 32.5)
    emptied = totals(finished=64, generated_tokens=64 * 40)
    assert answer_tokens(filling, emptied) == pytest.approx(64 * 20 / 31.5)
    # All were cancelled but one.
    assert answer_tokens(filling, totals(finished=2, generated_tokens=64 * 20)) is None


async def test_polls_teach_the_length_of_answers(world: Routed) -> None:
    expected = world.router.scheduler.output_length
    world.member("p", Role.PREFILL, finished=0, steps=1)
    world.member("a", finished=0, generated_tokens=0, steps=1)
    known = world.router._known
    await until(lambda: all(each.totals is not None for each in known.values()), "the first look")
    before = expected.expected
    world.member("p", Role.PREFILL, finished=100, generated_tokens=100, steps=2)
    seen = known[InstanceId("p")]
    await until(lambda: seen.totals is not None and seen.totals.finished == 100, "the next look")
    assert expected.expected == before  # one token is all that a prefill instance answers
    world.member("a", finished=10, generated_tokens=400, steps=2)
    await until(lambda: expected.expected != before, "the lesson")
    assert expected.expected == pytest.approx((before + 40) / 2)


async def test_others_work_shows_in_the_load(world: Routed) -> None:
    world.member("a", running=5, waiting=3, steps=1)
    line = world.router.scheduler.load.line(A)
    await until(lambda: line.other_running == 5, "the look")
    assert line.other_prefills == 3


# --- plans --------------------------------------------------------------------------------------


async def test_a_pair_is_planned_with_every_other_prefill_instance_behind_it() -> None:
    seen = set()
    async with routed("round-robin") as world:
        for name in ("p0", "p1", "p2"):
            world.member(name, Role.PREFILL)
        world.member("d", Role.DECODE)
        for _ in range(3):
            plan = world.plan(call_of())
            names = [member.id for member in plan.prefill]
            assert plan.member.id == "d"
            assert sorted(names) == ["p0", "p1", "p2"]
            assert plan.explain().startswith(f"{names[0]} -> d, 0 of 100 tokens cached")
            seen.add(names[0])
            plan.ticket.ended()
    assert seen == {"p0", "p1", "p2"}


async def test_only_the_members_that_are_named_have_a_part(world: Routed) -> None:
    world.member("p", Role.PREFILL)
    d, c = world.member("d", Role.DECODE), world.member("c")
    for members, expected in (([d], "d"), ([c], "c")):
        plan = world.router.plan(call_of(), members)
        assert (plan.member.id, plan.prefill, plan.fetch) == (expected, (), None)
        plan.ticket.ended()


async def test_a_prefix_is_used_where_it_is_and_fetched_where_that_is_faster(
    world: Routed,
) -> None:
    world.member("a")
    world.member("b")
    tree = world.router.tree
    held(tree, A, 3968)
    long = call_of(*range(4000), tokens=1)
    plan = world.plan(long)
    assert (plan.member.id, plan.fetch) == ("a", None)
    assert plan.explain().startswith("a, 3968 of 4000 tokens cached")
    plan.ticket.ended()
    tree.expire(1e9)  # the expectation
    # Busy for a long time to come: others pull what it has.
    world.member("a", running=7, waiting=500, steps=1)
    await until(lambda: world.router.scheduler.load.line(A).other_prefills == 500, "the look")
    plan = world.plan(long)
    assert plan.member.id == "b"
    assert plan.fetch is not None
    assert plan.fetch.id == "a"
    assert "fetched from a" in plan.explain()
    plan.ticket.ended()


async def test_namespaces_have_prefixes_of_their_own(world: Routed) -> None:
    world.member("a")
    held(world.router.tree, A, 96)
    plan = world.plan(call_of(cache_salt="s"))
    assert plan.explain().startswith("a, 0 of 100 tokens cached")
    plan.ticket.ended()


async def test_what_was_generated_elsewhere_belongs_to_the_prompt(world: Routed) -> None:
    world.member("a")
    call = msgspec.structs.replace(call_of(tokens=16), resumed=((1,) * 12,))
    plan = world.plan(call)
    reservation = world.router.scheduler.load._reservations[RequestId(call.id)]
    assert len(reservation.tokens) == 112
    assert reservation.output_tokens == 4
    plan.ticket.ended()


async def test_sessions_stay_where_they_were() -> None:
    async with routed("session") as world:
        for name in "abc":
            world.member(name)
        first = {s: world.plan_and_end(call_of(session=s)) for s in ("x", "y", "z")}
        assert len(set(first.values())) == 3
        for _ in range(3):
            for session, instance in first.items():
                assert world.plan_and_end(call_of(session=session)) == instance


# --- tickets ------------------------------------------------------------------------------------


async def test_a_stream_s_ticket_tells_the_scheduler_once(world: Routed) -> None:
    world.member("a")
    line = world.router.scheduler.load.line(A)
    plan = world.plan(call_of())
    assert (len(line.prefills), line.answers, line.decoding) == (1, 1, 0)
    plan.ticket.first_token()
    plan.ticket.first_token()
    assert (len(line.prefills), line.answers, line.decoding) == (0, 1, 1)
    plan.ticket.ended()
    plan.ticket.ended()
    plan.ticket.first_token()  # too late to mean anything
    assert line.idle


async def test_an_answer_that_comes_whole_is_computed_when_it_should_be(world: Routed) -> None:
    world.member("a")
    line = world.router.scheduler.load.line(A)
    plan = world.plan(call_of(stream=False))
    plan.ticket.first_token()  # its first bytes are its last ones: they say nothing
    assert len(line.prefills) == 1
    await until(lambda: line.decoding == 1, "the predicted time")
    plan.ticket.ended()
    assert line.idle


async def test_another_try_does_not_inherit_the_expectations_of_the_first(world: Routed) -> None:
    a, b = world.member("a"), world.member("b")
    call = call_of(stream=False)
    plan = world.router.plan(call, [a])
    timer = plan.ticket._expected  # type: ignore[attr-defined]
    plan.ticket.ended()
    again = world.router.plan(call, [b])
    assert timer.cancelled()
    assert len(world.router.scheduler.load.line(B).prefills) == 1
    again.ticket.ended()


async def test_a_ticket_outlives_its_instance(world: Routed) -> None:
    a = world.member("a")
    plan = world.plan(call_of())
    world.membership.refused(a)
    plan.ticket.first_token()
    plan.ticket.ended()
    assert world.known == {}


async def test_metrics_have_the_figures_of_routing(world: Routed) -> None:
    world.member("a")
    held(world.router.tree, A, 96)
    plan = world.plan(call_of())
    world.clock.advance(0.5)
    plan.ticket.first_token()
    plan.ticket.ended()
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for metric in world.router.metrics.collect()
        for sample in metric.samples
    }
    assert found["memserve_scheduler_plans_total", "prompt-tree", "alone"] == 1
    assert found["memserve_scheduler_prompt_tokens_total",] == 100
    assert found["memserve_scheduler_cached_tokens_total",] == 96
    assert found["memserve_scheduler_first_token_seconds_sum",] == 0.5
    assert found["memserve_scheduler_waiting",] == 0
    assert found["memserve_prompt_tree_held_blocks",] == 6
    assert found["memserve_kv_feed", "a", "synchronised"] == 0


async def test_decisions_are_kept_newest_first(world: Routed) -> None:
    world.member("a")
    calls = [call_of() for _ in range(3)]
    for call in calls:
        world.plan_and_end(call)
    assert [d.request for d in world.router.decisions(2)] == [calls[2].id, calls[1].id]


def spec_of(costs: RefinedCosts) -> InstanceSpec:
    return InstanceSpec(A, Role.COLOCATED, costs, 16, "h")
