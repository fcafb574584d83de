"""What a gateway takes its instances to cost, and what it learns of that."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from memserve.api.status import LinkTotals
from memserve.gateway import global_router, instance_costs
from memserve.gateway.instance_costs import UNKNOWN, LinkTimes, StepTimes, answer_tokens
from memserve.scheduler.admission import NOBODY
from memserve.scheduler.contract import InstanceSpec
from memserve.scheduler.refined_costs import RefinedCosts
from memserve.types import InstanceId, Role
from tests.gateway_harness import Client
from tests.router_harness import Routed, call_of, profile_of, routed, totals
from tests.scheduler_harness import LinearCosts
from tests.waiting import until

A = InstanceId("a")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instance_costs, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(global_router, "LOOK_SECONDS", 0.002)


@pytest.fixture
async def world() -> AsyncIterator[Routed]:
    async with routed() as made:
        yield made


async def test_instances_of_one_fingerprint_share_their_model_and_learn_on_their_own(
    world: Routed,
) -> None:
    world.profiles.update({name: profile_of("h100") for name in "abd"}, c=profile_of("cpu"))
    for name in "abc":
        world.member(name)
        await world.profiled(name)
    a, b, c = (refined(world, name) for name in "abc")
    assert a.model is b.model
    assert a.model is not c.model
    load = world.router.scheduler.load
    load.refresh()
    assert len(load.cost_groups) == 2
    for _ in range(50):  # the machine of `a` is busy with something else
        a.observe_prefill(1000, 0, 2 * float(a.model.prefill_seconds(1000, 0)))
    assert a.factor("prefill") == pytest.approx(2.0, rel=0.01)
    assert b.factor("prefill") == 1.0
    # One that joins later begins with what was learnt of the first.
    world.member("d")
    await world.profiled("d")
    d = refined(world, "d")
    assert d.factor("prefill") == a.factor("prefill")
    for _ in range(100):
        d.observe_prefill(1000, 0, float(a.model.prefill_seconds(1000, 0)))
    assert d.factor("prefill") == pytest.approx(1.0, rel=0.01)
    assert a.factor("prefill") == pytest.approx(2.0, rel=0.01)


def refined(world: Routed, name: str) -> RefinedCosts:
    costs = world.spec(name).costs
    assert isinstance(costs, RefinedCosts)
    return costs


async def test_a_link_that_is_slower_than_assumed_is_learnt_from_a_members_totals(
    world: Routed,
) -> None:
    """1 Gbit/s between hosts, and what is assumed within a host."""
    world.profiles.update({name: profile_of("h100") for name in "ab"})
    for name in "ab":
        world.member(name)
        await world.profiled(name)
    a, b = refined(world, "a"), refined(world, "b")
    size, pieces, counted = 64 << 20, 64, 0
    near = float(a.model.transfer_seconds(size, pieces, "shm"))
    wanted = size / 125e6

    def is_learnt_from_more() -> bool:
        nonlocal counted
        seen = world.router._known[A].links._last.get("nixl", LinkTotals())
        if seen.bytes < counted * size:
            return False  # the last totals were not looked at yet
        counted += 1
        links = {
            # By layer: each is written on its own.
            "nixl": LinkTotals(32 * counted, counted * size, counted * pieces, counted * wanted),
            "shm": LinkTotals(counted, counted * size, counted * pieces, counted * near),
        }
        world.member("a", links=links)
        return float(a.transfer_seconds(size, pieces, "nixl")) > 0.98 * wanted

    await until(is_learnt_from_more, "the link's speed")
    assert float(a.transfer_seconds(size, pieces, "nixl")) == pytest.approx(wanted, rel=0.02)
    assert a.factor("shm") == pytest.approx(1.0)
    assert b.factor("nixl") == 1.0
    # Too little to tell a link's speed.
    learner = LinkTimes()
    few = {"nixl": LinkTotals(1, 15 << 20, 1, 10.0)}
    for _ in range(10):
        learner.learn(world.spec("b"), few)
    assert b.factor("nixl") == 1.0


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
    load = world.router.scheduler.load
    load.refresh()
    assert len(load.cost_groups) == 1


async def test_a_cluster_that_starts_changes_the_scheduler_a_few_times_for_each_member(
    world: Routed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for each pair of them: a thousand members would never be ready."""
    put, changes, count = world.router.scheduler.put, 0, 40
    load = world.router.scheduler.load
    rebuild, rebuilt = load._rebuild, 0

    def counted(spec: InstanceSpec) -> None:
        nonlocal changes
        changes += 1
        put(spec)

    def rebuilding() -> None:
        nonlocal rebuilt
        rebuilt += 1
        rebuild()

    monkeypatch.setattr(world.router.scheduler, "put", counted)
    monkeypatch.setattr(load, "_rebuild", rebuilding)
    names = [f"m{number}" for number in range(count)]
    world.profiles.update(dict.fromkeys(names, profile_of("h100")))
    for name in names:
        world.member(name)
    assert rebuilt == 0
    for name in names:
        await world.profiled(name)
    # It is met, says its limits and its costs; and the first profile is everybody's best guess.
    assert changes <= 6 * count
    before = rebuilt
    world.plan_and_end(call_of())
    assert rebuilt <= before + 1


async def test_guessed_costs_do_not_hold_requests_back(world: Routed) -> None:
    world.member("a")
    await world.profiled("a")
    calls = [call_of(*range(4000)) for _ in range(64)]
    for call in calls:  # on the machine that is guessed, more than a minute's work
        await world.router.queue.enter(call, NOBODY, Client().reply)
    assert world.router.queue.waiting == 0
    for call in calls:
        world.router.queue.leave(call.id)
    # An instance that says that it is such a machine gets no more than it can do.
    world.profiles["b"] = profile_of("cpu")
    world.member("b")
    await world.profiled("b")
    seconds = world.router.scheduler.whole_prefill_seconds(4000)
    world.router.queue.resize(1)
    entering = []
    while not world.router.queue.waiting:
        call = call_of(*range(4000))
        entering.append(asyncio.create_task(world.router.queue.enter(call, NOBODY, Client().reply)))
        await asyncio.sleep(0)
    assert len(entering) * seconds > 10.0
    assert len(entering) < 64
    world.router.queue.stop()
    await asyncio.wait(entering)


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
        plan.first_token()
        plan.ended()
    assert 1.5 < costs.factor("prefill") <= 2.01
    # Where most of the wait was something else, nothing is learnt of prefills.
    before = costs.factor("prefill")
    plans = [world.plan(call_of()) for _ in range(8)]
    world.clock.advance(1000.0)
    for plan in plans[1:]:
        plan.first_token()
    for plan in plans:
        plan.ended()
    assert costs.factor("prefill") == before


def test_decode_steps_are_learnt_of_steps_without_prompts() -> None:
    costs = RefinedCosts(LinearCosts())
    spec = spec_of(costs)
    times = StepTimes()
    figures = {"decode_steps": 0, "decode_tokens": 0, "decode_context_tokens": 0}
    step = float(LinearCosts().decode_step_seconds(2, 100))
    times.learn(spec, totals(**figures))
    for number in range(1, 200):  # two steps a poll: too few for one to say much
        figures.update(decode_steps=2 * number, decode_tokens=4 * number)
        figures.update(decode_context_tokens=200 * number)
        times.learn(spec, totals(**figures, decode_seconds=2 * number * step * 3))
    assert 2.5 < costs.factor("decode") < 3.01
    other = RefinedCosts(LinearCosts())
    for number in range(1, 200):  # all of them computed prompts, too
        alone = totals(steps=10 * number, generated_tokens=20 * number, busy_seconds=9.0 * number)
        times.learn(spec_of(other), alone)
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
    world.member("a", finished=3, generated_tokens=6, steps=2)
    seen = known[InstanceId("a")]
    await until(lambda: seen.totals is not None and seen.totals.finished == 3, "the next look")
    assert expected.expected == before  # nor do proofs of hand-overs say how long answers are
    world.member("a", finished=13, generated_tokens=406, steps=2)
    await until(lambda: expected.expected != before, "the lesson")
    assert expected.expected == pytest.approx((before + 40) / 2)


async def test_others_work_shows_in_the_load(world: Routed) -> None:
    world.member("a", running=5, waiting=3, steps=1)
    line = world.router.scheduler.load.of(A)
    await until(lambda: line.other_running == 5, "the look")
    assert line.other_prefills == 3


def spec_of(costs: RefinedCosts) -> InstanceSpec:
    return InstanceSpec(A, Role.COLOCATED, costs, 16, "h")
