"""Who may start: everybody while there is room, and then fairly."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memserve.errors import ConfigError
from memserve.scheduler.admission import (
    Admission,
    AdmissionLimits,
    Grant,
    Refusal,
    Tenant,
    Ticket,
    TicketState,
    tenant_id,
)

A, B = tenant_id(b"a"), tenant_id(b"b")


def entered(
    admission: Admission, tenant: Tenant, cost: float = 1.0, priority: int = 0, now: float = 0.0
) -> Ticket:
    ticket = admission.enter(tenant, cost, priority, now)
    assert isinstance(ticket, Ticket)
    return ticket


def one_at_a_time(**limits: float) -> Admission:
    return Admission(AdmissionLimits(prefill_seconds=1e-9, **limits), instances=1)  # type: ignore[arg-type]


def drained(admission: Admission, running: Ticket, now: float = 0.0) -> list[Ticket]:
    """Everyone who waits, in the order in which they start, one after the other."""
    order: list[Ticket] = []
    while True:
        admission.prefilled(running)
        following = admission.next(now)
        if following is None:
            return order
        order.append(following)
        running = following


def test_all_pass_while_there_is_room() -> None:
    admission = Admission(AdmissionLimits(prefill_seconds=10), instances=2)
    tickets = [entered(admission, A, cost=4.0) for _ in range(7)]

    assert [ticket.admitted for ticket in tickets] == [True] * 5 + [False] * 2
    assert admission.next(0.0) is None
    admission.prefilled(tickets[0])
    assert admission.next(0.0) is tickets[5]
    assert admission.next(0.0) is None
    admission.resize(3)
    assert admission.next(0.0) is tickets[6]


def test_answers_count_until_they_end() -> None:
    admission = Admission(AdmissionLimits(requests=2), instances=1)
    first, second, third = (entered(admission, A, cost=0.01) for _ in range(3))
    admission.prefilled(first)
    assert admission.next(0.0) is None
    admission.leave(second)
    assert admission.next(0.0) is third


def test_nothing_starts_without_instances() -> None:
    admission = Admission()
    ticket = entered(admission, A)
    assert not ticket.admitted
    admission.resize(1)
    assert admission.next(0.0) is ticket


def test_a_short_prompt_passes_a_long_one_that_waits() -> None:
    admission = one_at_a_time()
    running = entered(admission, A)
    long = entered(admission, A, cost=20.0, now=0.0)
    short = entered(admission, A, cost=0.1, now=1.0)

    assert drained(admission, running) == [short, long]


def test_a_long_prompt_is_not_passed_for_ever() -> None:
    admission = one_at_a_time(overtaking=2.0, longest_overtaking=30.0)
    running = entered(admission, A)
    long = entered(admission, A, cost=10.0, now=0.0)
    in_time = entered(admission, A, cost=0.1, now=19.0)
    late = entered(admission, A, cost=0.1, now=21.0)

    assert drained(admission, running) == [in_time, long, late]


def test_lower_priorities_run_first() -> None:
    admission = one_at_a_time()
    running = entered(admission, A)
    later = entered(admission, A, priority=1)
    sooner = entered(admission, A, priority=-1)

    assert drained(admission, running) == [sooner, later]


def test_priorities_do_not_pass_other_tenants() -> None:
    admission = one_at_a_time()
    running = entered(admission, A)
    for _ in range(4):
        entered(admission, A, priority=-9)
    other = entered(admission, B, priority=9)

    assert other in drained(admission, running)[:2]


def test_a_privileged_tenant_s_priorities_count_among_all() -> None:
    admission = one_at_a_time()
    admission.grant({A: Grant(privileged=True)})
    running = entered(admission, B)
    others = [entered(admission, B, priority=-9) for _ in range(3)]
    usual = entered(admission, A)
    late = entered(admission, A, priority=9)
    urgent = entered(admission, A, priority=-1)

    order = drained(admission, running)
    assert order[0] is urgent
    assert order[-1] is late
    assert {*order[1:5]} == {usual, *others}


def test_a_grant_can_be_given_and_taken_while_requests_wait() -> None:
    for grants in ({A: Grant(privileged=True)}, {}):
        admission = one_at_a_time()
        running = entered(admission, B)
        [entered(admission, B) for _ in range(4)]
        urgent = [entered(admission, A, priority=-1) for _ in range(3)]
        if not grants:
            admission.grant({A: Grant(privileged=True)})
        admission.grant(grants)
        order = drained(admission, running)
        assert (order[:3] == urgent) == bool(grants)


def test_who_left_does_not_lend_its_rank_to_those_who_stay() -> None:
    admission = one_at_a_time()
    admission.grant({A: Grant(privileged=True)})
    running = entered(admission, B)
    other = entered(admission, B)
    urgent = entered(admission, A, priority=-1)
    late = entered(admission, A, priority=1)
    admission.leave(urgent)
    assert drained(admission, running) == [other, late]


def test_a_weight_is_a_share() -> None:
    admission = one_at_a_time()
    admission.grant({A: Grant(weight=3.0)})
    running = entered(admission, tenant_id(b"first"))
    for _ in range(60):
        entered(admission, A)
        entered(admission, B)
    counts = Counter(ticket.tenant for ticket in drained(admission, running)[:40])
    assert counts[A] == pytest.approx(30, abs=1)
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError):
            Grant(weight=weight)


def test_coming_and_going_leaves_nothing_behind() -> None:
    admission = one_at_a_time()
    admission.grant({B: Grant(privileged=True)})
    entered(admission, A)
    entered(admission, A)
    for _ in range(2000):
        tickets = [entered(admission, B, priority=-n) for n in range(3)]
        for ticket in tickets:
            admission.leave(ticket)
    assert len(admission._turns) <= 100


def test_a_tenant_takes_as_little_room_whatever_it_is_called() -> None:
    assert {len(tenant_id(name)) for name in (b"", b"a", b"a" * 5_000_000)} == {16}
    assert tenant_id(b"a") == tenant_id(b"a") != tenant_id(b"b")


def test_tenants_share_seconds_and_not_requests() -> None:
    admission = one_at_a_time()
    running = entered(admission, tenant_id(b"first"))
    for _ in range(100):
        entered(admission, A, cost=3.0)
    for _ in range(100):
        entered(admission, B, cost=1.0)
    order = drained(admission, running)[:40]

    counts = Counter(ticket.tenant for ticket in order)
    assert counts[A] == pytest.approx(10, abs=1)


def test_a_tenant_that_was_away_has_saved_nothing_up() -> None:
    admission = one_at_a_time()
    running = entered(admission, A)
    for _ in range(50):
        entered(admission, A)
    for _ in range(40):
        admission.prefilled(running)
        following = admission.next(0.0)
        assert following is not None
        running = following
    for _ in range(20):
        entered(admission, B)

    counts = Counter(ticket.tenant for ticket in drained(admission, running)[:10])
    assert counts[B] in (5, 6)


def test_coming_and_going_gives_no_second_turn() -> None:
    admission = one_at_a_time()
    running = entered(admission, tenant_id(b"first"))
    for _ in range(5):
        admission.leave(entered(admission, A))
    for _ in range(10):
        entered(admission, A)
        entered(admission, B)

    counts = Counter(ticket.tenant for ticket in drained(admission, running)[:10])
    assert counts == {A: 5, B: 5}


def test_a_full_queue_says_when_to_come_back() -> None:
    admission = Admission(AdmissionLimits(prefill_seconds=1e-9, waiting=10), instances=2)
    entered(admission, A)
    entered(admission, B)
    for _ in range(10):
        entered(admission, A, cost=4.0)
    refusal = admission.enter(A, 4.0, 0, 0.0)

    assert isinstance(refusal, Refusal)
    assert (refusal.waiting, refusal.limit, refusal.of_all) == (10, 10, False)
    # Half of it takes 20 s, and the other tenant's turns meanwhile 1 s, on two instances.
    assert refusal.retry_after == 11
    assert "at most 10" in str(refusal)
    assert isinstance(admission.enter(B, 1.0, 0, 0.0), Ticket)


def test_all_queues_together_are_bounded() -> None:
    admission = one_at_a_time(waiting_of_all=5)
    entered(admission, A)
    for n in range(5):
        entered(admission, tenant_id(b"t%d" % n))
    refusal = admission.enter(tenant_id(b"new"), 1.0, 0, 0.0)

    assert isinstance(refusal, Refusal)
    assert refusal.of_all


def test_tenants_that_never_come_back_are_forgotten() -> None:
    admission = Admission(instances=1)
    for n in range(12_000):
        admission.leave(entered(admission, tenant_id(b"salt-%d" % n), cost=0.1))

    assert len(admission._queues) <= 10_000


_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["enter", "next", "prefilled", "leave", "leave again", "resize"]),
        st.integers(0, 3),
        st.floats(0.001, 20, allow_nan=False),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(_STEPS)
def test_the_books_balance_whatever_happens(steps: list[tuple[str, int, float]]) -> None:
    limits = AdmissionLimits(prefill_seconds=5.0, requests=4, waiting=5, waiting_of_all=8)
    admission = Admission(limits, instances=1)
    tickets: list[Ticket] = []
    for now, (step, which, cost) in enumerate(steps):
        if step == "enter":
            ticket = admission.enter(tenant_id(b"%d" % which), cost, which % 2, float(now))
            if isinstance(ticket, Ticket):
                tickets.append(ticket)
        elif step == "next":
            following = admission.next(float(now))
            assert following is None or following in tickets
        elif step == "resize":
            admission.resize(which)
        elif tickets:
            ticket = tickets[(which * 7) % len(tickets)]
            admission.prefilled(ticket) if step == "prefilled" else admission.leave(ticket)
        states = Counter(ticket.state for ticket in tickets)
        assert admission.waiting == states[TicketState.WAITING] <= 8
        assert admission.admitted == sum(ticket.admitted for ticket in tickets)
        running = [t.cost for t in tickets if t.state is TicketState.ADMITTED]
        assert admission.prefill_seconds == pytest.approx(sum(running))
    # Nobody is forgotten: with room for all, all that wait start.
    admission.resize(1000)
    while admission.next(1e6) is not None:
        pass
    assert not any(ticket.state is TicketState.WAITING for ticket in tickets)
    for ticket in tickets:
        admission.leave(ticket)
    assert (admission.waiting, admission.admitted, admission.prefill_seconds) == (0, 0, 0.0)
