"""The scheduler behind a gateway: members come and go, plans are reserved, and times learnt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
import numpy as np
import pytest

from memserve.api.forward import Forward, ForwardPath
from memserve.api.namespaces import salted
from memserve.api.status import InstanceState
from memserve.gateway import global_router, instance_costs
from memserve.scheduler.prompt_tree import PromptTree
from memserve.scheduler.refined_costs import RefinedCosts
from memserve.tokens import from_ids
from memserve.types import InstanceId, RequestId, Role
from tests.metric_page import reported
from tests.router_harness import LIMITS, Routed, call_of, profile_of, routed
from tests.waiting import until

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
    assert isinstance(former, RefinedCosts)
    for _ in range(50):
        former.observe_prefill(1000, 0, 2 * float(former.model.prefill_seconds(1000, 0)))
    world.member("a", epoch=2, limits=None)
    assert world.router.scheduler.load.of(A).idle
    assert world.spec("a").block_tokens == 16
    plan.first_token()
    plan.ended()
    await world.profiled("a")
    assert world.asked == ["a", "a"]
    costs = world.spec("a").costs  # of the same hardware, with what was learnt of it
    assert isinstance(costs, RefinedCosts)
    assert costs.model is former.model
    assert costs.factor("prefill") == former.factor("prefill") > 1.9


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


# --- plans --------------------------------------------------------------------------------------


async def test_a_call_names_a_few_prefill_instances_however_many_there_are() -> None:
    async with routed("round-robin") as world:
        for number in range(3 * global_router.MAX_PREFILL):
            world.member(f"p{number}", Role.PREFILL)
        world.member("d", Role.DECODE)
        seen = []
        for _ in range(3 * global_router.MAX_PREFILL):
            plan = world.plan(call_of())
            assert len({member.id for member in plan.prefill}) == global_router.MAX_PREFILL
            seen.append(plan.prefill[1].id)
            plan.ended()
        # The next ones of a lost instance differ: they do not all come to one.
        assert len(set(seen)) == len(seen)


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
            plan.ended()
    assert seen == {"p0", "p1", "p2"}


async def test_only_the_members_that_are_named_have_a_part(world: Routed) -> None:
    world.member("p", Role.PREFILL)
    d, c = world.member("d", Role.DECODE), world.member("c")
    for members, expected in (([d], "d"), ([c], "c")):
        plan = world.router.plan(call_of(), members)
        assert (plan.member.id, plan.prefill, plan.fetch) == (expected, (), None)
        plan.ended()


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
    plan.ended()
    tree.expire(1e9)  # the expectation
    # Busy for a long time to come: others pull what it has.
    world.member("a", running=7, waiting=500, steps=1)
    await until(lambda: world.router.scheduler.load.of(A).other_prefills == 500, "the look")
    plan = world.plan(long)
    assert plan.member.id == "b"
    assert plan.fetch is not None
    assert plan.fetch.id == "a"
    assert "fetched from a" in plan.explain()
    plan.ended()


async def test_namespaces_have_prefixes_of_their_own(world: Routed) -> None:
    world.member("a")
    held(world.router.tree, A, 96)
    plan = world.plan(call_of(cache_salt="s"))
    assert plan.explain().startswith("a, 0 of 100 tokens cached")
    plan.ended()


async def test_what_was_generated_elsewhere_belongs_to_the_prompt(world: Routed) -> None:
    world.member("a")
    call = msgspec.structs.replace(call_of(tokens=16), resumed=(from_ids((1,) * 12),))
    plan = world.plan(call)
    reservation = world.router.scheduler.load._reservations[RequestId(call.id)]
    assert len(reservation.tokens) == 112
    assert reservation.output_tokens == 4
    plan.ended()


async def test_sessions_stay_where_they_were() -> None:
    async with routed("session") as world:
        for name in "abc":
            world.member(name)
        first = {s: world.plan_and_end(call_of(session=s)) for s in ("x", "y", "z")}
        assert len(set(first.values())) == 3
        for _ in range(3):
            for session, instance in first.items():
                assert world.plan_and_end(call_of(session=session)) == instance


# --- routes -------------------------------------------------------------------------------------


async def test_a_stream_s_route_tells_the_scheduler_once(world: Routed) -> None:
    world.member("a")
    line = world.router.scheduler.load.of(A)
    plan = world.plan(call_of())
    assert (len(line.prefills), line.answers, line.decoding) == (1, 1, 0)
    plan.first_token()
    plan.first_token()
    assert (len(line.prefills), line.answers, line.decoding) == (0, 1, 1)
    plan.ended()
    plan.ended()
    plan.first_token()  # too late to mean anything
    assert line.idle


async def test_an_answer_that_comes_whole_is_computed_when_it_should_be(world: Routed) -> None:
    world.member("a")
    line = world.router.scheduler.load.of(A)
    plan = world.plan(call_of(stream=False))
    plan.first_token()  # its first bytes are its last ones: they say nothing
    assert len(line.prefills) == 1
    await until(lambda: line.decoding == 1, "the predicted time")
    plan.ended()
    assert line.idle


async def test_another_try_does_not_inherit_the_expectations_of_the_first(world: Routed) -> None:
    a, b = world.member("a"), world.member("b")
    call = call_of(stream=False)
    plan = world.router.plan(call, [a])
    timer = plan._expected  # type: ignore[attr-defined]
    plan.ended()
    again = world.router.plan(call, [b])
    assert timer.cancelled()
    assert len(world.router.scheduler.load.of(B).prefills) == 1
    again.ended()


async def test_a_route_outlives_its_instance(world: Routed) -> None:
    a = world.member("a")
    plan = world.plan(call_of())
    world.membership.refused(a)
    plan.first_token()
    plan.ended()
    assert world.known == {}


async def test_metrics_have_the_figures_of_routing(world: Routed) -> None:
    world.member("a")
    held(world.router.tree, A, 96)
    plan = world.plan(call_of())
    world.clock.advance(0.5)
    plan.first_token()
    plan.ended()
    found = reported(world.router.metrics)
    assert found["memserve_scheduler_plans_total", "prompt-tree", "alone"] == 1
    assert found["memserve_scheduler_prompt_tokens_total",] == 100
    assert found["memserve_scheduler_cached_tokens_total",] == 96
    assert found["memserve_scheduler_first_token_seconds_sum",] == 0.5
    assert found["memserve_requests_waiting",] == 0
    assert found["memserve_prompt_tree_held_blocks",] == 6
    assert found["memserve_kv_feed_synchronised", "a"] == 0


async def test_what_is_passed_on_says_nothing_of_what_prefills_take(world: Routed) -> None:
    world.member("a")
    line = world.router.scheduler.load.of(A)
    forward = Forward(ForwardPath.CHAT, b"{}")
    plan = world.plan(msgspec.structs.replace(call_of(), forward=forward))
    assert (len(line.prefills), line.decoding) == (1, 0)
    world.clock.advance(60.0)  # for a grammar, or an image
    plan.first_token()
    assert (len(line.prefills), line.decoding) == (0, 1)
    plan.ended()
    assert reported(world.router.metrics)["memserve_scheduler_first_token_seconds_sum",] == 0


async def test_decisions_are_kept_newest_first(world: Routed) -> None:
    world.member("a")
    calls = [call_of() for _ in range(3)]
    for call in calls:
        world.plan_and_end(call)
    assert [d.request for d in world.router.decisions(2)] == [calls[2].id, calls[1].id]
