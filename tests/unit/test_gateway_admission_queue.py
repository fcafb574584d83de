"""Where requests wait for room: who goes next, who is refused, and that nobody is forgotten."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memserve.api.errors import ApiError
from memserve.api.generate import GenerateCall
from memserve.clock import ManualClock
from memserve.gateway.admission_queue import AdmissionQueue, ClientLeft
from memserve.scheduler.admission import NOBODY, Admission, AdmissionLimits, Grant, tenant_id
from tests.gateway_harness import Client
from tests.router_harness import call_of

INSTANCE_WAIT = 30.0  # seconds

# One request at a time for each instance, and room for two of a tenant to wait.
LIMITS = AdmissionLimits(requests=1, waiting=2, waiting_of_all=3)


class Office:
    """A queue, and everybody who has come to it. A token's prefill takes a second."""

    def __init__(self, limits: AdmissionLimits = LIMITS, instances: int = 1) -> None:
        self.clock = ManualClock(10.0)
        self.admission = Admission(limits)
        self.queue = AdmissionQueue(self.admission, float, self.clock, INSTANCE_WAIT)
        self.queue.resize(instances)
        self.calls: dict[str, GenerateCall] = {}
        self.clients: dict[str, Client] = {}
        self.entering: dict[str, asyncio.Task[None]] = {}
        self.given: dict[str, GenerateCall] = {}  # as instances get it
        self.order: list[str] = []  # in which they were let through

    async def comes(
        self, name: str, tenant: str = "t", *, tokens: int = 100, priority: int = 0
    ) -> None:
        call = self.calls[name] = call_of(*range(tokens), priority=priority)
        client = self.clients[name] = Client()

        async def enter() -> None:
            self.given[name] = await self.queue.enter(
                call, tenant_id(tenant.encode()), client.reply
            )
            self.order.append(name)

        self.entering[name] = asyncio.create_task(enter())
        await turns()

    async def prefilled(self, name: str) -> None:
        self.queue.prefilled(self.calls[name].id)
        await turns()

    async def leaves(self, name: str) -> None:
        """It does not wait any more, and is over: what the gateway's handler says of everyone."""
        assert self.entering[name].done()
        self.queue.leave(self.calls[name].id)
        await turns()

    async def hangs_up(self, name: str) -> None:
        self.clients[name].reply.hung_up()
        await turns()

    def error(self, name: str) -> BaseException | None:
        task = self.entering[name]
        return task.exception() if task.done() else None

    def refusal(self, name: str) -> ApiError:
        error = self.error(name)
        assert isinstance(error, ApiError)
        return error

    def nobody_is_left(self) -> None:
        assert not self.queue._tickets
        assert not self.queue._waiters
        assert (self.admission.waiting, self.admission.admitted) == (0, 0)
        assert self.admission.prefill_seconds == 0.0


async def turns() -> None:
    """What has been made possible happens."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_those_who_wait_go_when_others_leave() -> None:
    office = Office()
    for name in ("first", "second", "third"):
        await office.comes(name)
    assert office.order == ["first"]
    assert office.queue.waiting == 2
    await office.leaves("first")
    assert office.order == ["first", "second"]
    await office.leaves("second")
    await office.leaves("third")
    assert office.order == ["first", "second", "third"]
    office.nobody_is_left()


async def test_a_prompt_that_is_computed_makes_room_for_the_next() -> None:
    office = Office(AdmissionLimits(prefill_seconds=50.0, requests=9))
    await office.comes("first")
    await office.comes("second")
    assert office.order == ["first"]
    await office.prefilled("first")
    assert office.order == ["first", "second"]
    await office.prefilled("first")  # twice, and one that waits not at all
    office.queue.prefilled("nobody")
    for name in office.order:
        await office.leaves(name)
    office.nobody_is_left()


async def test_more_instances_make_room() -> None:
    office = Office(instances=0)
    for name in ("a", "b"):
        await office.comes(name, tokens=5)
    assert office.order == []
    office.queue.resize(2)
    await turns()
    assert office.order == ["a", "b"]


async def test_tenants_take_turns_and_priorities_order_their_own() -> None:
    office = Office(AdmissionLimits(requests=1))
    await office.comes("running")
    await office.comes("t0")
    await office.comes("t1", priority=1)
    await office.comes("t2", priority=-1)
    await office.comes("u", "other", priority=9)
    for _ in range(5):
        await office.leaves(office.order[-1])
    assert office.order == ["running", "u", "t2", "t0", "t1"]


async def test_a_full_queue_says_when_to_come_back() -> None:
    office = Office()
    for name in ("running", "a", "b"):
        await office.comes(name)
    await office.comes("refused")
    error = office.refusal("refused")
    assert (error.status, error.detail.code) == (429, "queue_full")
    # Half of what waits: two prompts of a hundred seconds.
    assert (b"retry-after", b"100") in error.headers()
    shape = json.loads(error.body())["error"]
    assert (shape["type"], shape["param"]) == ("rate_limit_error", None)
    assert "2 requests of this tenant are waiting; at most 2 may wait" in shape["message"]
    # Others' queues are their own, but for what all may have together.
    await office.comes("c", "other")
    await office.comes("too many", "third")
    assert "3 requests of all tenants" in office.refusal("too many").detail.message
    await office.leaves("refused")
    for _ in range(4):
        await office.leaves(office.order[-1])
    office.nobody_is_left()


async def test_a_client_that_leaves_makes_room_for_others() -> None:
    office = Office()
    for name in ("running", "a", "b"):
        await office.comes(name)
    await office.hangs_up("a")
    assert isinstance(office.error("a"), ClientLeft)
    assert office.queue.waiting == 1
    await office.leaves("running")
    assert office.order == ["running", "b"]
    assert office.clients["b"].reply.on_gone is None  # whoever answers decides about it now
    await office.leaves("b")
    office.nobody_is_left()


async def test_a_client_that_had_left_before_does_not_wait() -> None:
    office = Office()
    await office.comes("running")
    call, client = call_of(), Client()
    client.reply.hung_up()
    with pytest.raises(ClientLeft):
        await office.queue.enter(call, NOBODY, client.reply)
    await office.leaves("running")
    office.nobody_is_left()


async def test_whoever_leaves_as_it_is_let_through_holds_nothing() -> None:
    office = Office()
    for name in ("running", "a", "b"):
        await office.comes(name)
    office.clients["a"].reply.hung_up()  # in one turn of the loop with
    office.queue.leave(office.calls["running"].id)
    await turns()
    assert office.order == ["running", "b"]
    await office.leaves("b")
    office.nobody_is_left()


async def test_a_gateway_that_stops_tells_those_who_wait_and_those_who_come() -> None:
    office = Office()
    await office.comes("running")
    await office.comes("waiting")
    office.queue.stop()
    await turns()
    await office.comes("late")
    for name in ("waiting", "late"):
        error = office.refusal(name)
        assert (error.status, error.detail.code) == (503, "gateway_stopping")
        assert (b"connection", b"close") in error.headers()
    await office.leaves("running")
    office.nobody_is_left()


async def test_without_any_instance_one_waits_for_a_while() -> None:
    office = Office()
    await office.comes("running")
    await office.comes("lucky")
    office.queue.resize(0)
    office.clock.advance(INSTANCE_WAIT - 1)
    office.queue.resize(0)
    await office.leaves("running")
    assert not office.entering["lucky"].done()
    office.queue.resize(1)
    await turns()
    assert office.order == ["running", "lucky"]
    await office.comes("unlucky")
    office.queue.resize(0)
    office.clock.advance(INSTANCE_WAIT)
    office.queue.resize(0)
    await turns()
    assert office.refusal("unlucky").detail.code == "no_instance"
    await office.leaves("lucky")
    office.nobody_is_left()


async def test_costs_are_asked_for_once_a_size_and_again_when_prices_change() -> None:
    asked: list[int] = []

    def price(tokens: int) -> float:
        asked.append(tokens)
        return 1.0

    queue = AdmissionQueue(Admission(), price, ManualClock(), INSTANCE_WAIT)
    queue.resize(1)
    for tokens in (100, 101, 500):
        await queue.enter(call_of(*range(tokens)), NOBODY, Client().reply)
    assert asked == [100, 500]
    queue.resize(1)
    await queue.enter(call_of(*range(100)), NOBODY, Client().reply)
    assert asked == [100, 500, 100]


STEPS: dict[str, Callable[[Office, str], object]] = {
    "prefilled": lambda office, name: office.queue.prefilled(office.calls[name].id),
    "leaves": lambda office, name: (
        office.entering[name].done() and office.queue.leave(office.calls[name].id)
    ),
    "hangs up": lambda office, name: office.clients[name].reply.hung_up(),
    "cancelled": lambda office, name: office.entering[name].cancel(),
}
EVENTS = st.one_of(
    st.tuples(st.just("comes"), st.sampled_from("tuv"), st.integers(1, 300), st.integers(-1, 1)),
    st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 20)),
    st.tuples(st.just("resize"), st.integers(0, 3)),
    st.tuples(st.just("turn")),
    st.tuples(st.just("stop")),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(EVENTS, max_size=40))
def test_no_place_is_lost_whatever_happens(events: list[tuple[object, ...]]) -> None:
    asyncio.run(_happen(events))


async def _happen(events: list[tuple[object, ...]]) -> None:
    limits = AdmissionLimits(prefill_seconds=300.0, requests=2, waiting=3, waiting_of_all=5)
    office = Office(limits)
    for what, *given_ in events:
        match what, given_:
            case "comes", [str(tenant), int(tokens), int(priority)]:
                name = str(len(office.calls))
                await office.comes(name, tenant, tokens=tokens, priority=priority)
            case "resize", [int(instances)]:
                office.queue.resize(instances)
            case "turn", _:
                await turns()
            case "stop", _:
                office.queue.stop()
            case str(step), [int(number)] if office.calls:
                STEPS[step](office, list(office.calls)[number % len(office.calls)])
        office.clock.advance(0.1)
    # Everybody who was let through comes to an end, until nobody waits.
    office.queue.resize(1)
    for _ in range(len(office.calls) + 1):
        await turns()
        for name, task in office.entering.items():
            if task.done():
                office.queue.leave(office.calls[name].id)
    await turns()
    assert all(task.done() for task in office.entering.values())
    for name, task in office.entering.items():
        if not task.cancelled():
            error = task.exception()
            assert error is None or isinstance(error, ApiError | ClientLeft)
            assert (error is None) == (name in office.order)
    office.nobody_is_left()


async def test_instances_hear_of_a_priority_only_by_the_operator_s_leave() -> None:
    office = Office(AdmissionLimits(prefill_seconds=1e9, requests=9))
    for priority in (-(2**31), -1, 7):
        await office.comes(f"a{priority}", "a", priority=priority)
        assert office.given[f"a{priority}"].priority == 0
    office.queue.grant({tenant_id(b"a"): Grant(privileged=True)})
    await office.comes("granted", "a", priority=-3)
    await office.comes("other", "b", priority=-3)
    assert (office.given["granted"].priority, office.given["other"].priority) == (-3, 0)
    for name in office.order:
        await office.leaves(name)
    office.nobody_is_left()
