"""Who answers, and who computes the prompt."""

from __future__ import annotations

from collections.abc import Sequence

from memserve.api.generate import CallKind, GenerateCall
from memserve.api.status import InstanceInfo, InstanceState
from memserve.cluster.membership import Member, Membership
from memserve.gateway.router import Plan, RoundRobin
from memserve.types import Epoch, InstanceId, Role

CALL = GenerateCall("c", CallKind.COMPLETION, "m", 1, ((1,),))


def members(*roles: Role) -> Sequence[Member]:
    membership = Membership(lambda member: None)
    for number, role in enumerate(roles):
        info = InstanceInfo(InstanceId(f"i{number}"), Epoch(1), role, InstanceState.READY, 1, "m")
        membership.answered(membership.join(f"http://host:{number}"), info, None)
    return membership.ready()


def plans(router: RoundRobin, count: int, *roles: Role) -> list[Plan]:
    known = members(*roles)
    return [router.plan(CALL, known) for _ in range(count)]


def names(plan: Plan) -> tuple[str, ...]:
    return (plan.member.id, *(member.id for member in plan.prefill))


def test_a_decode_instance_answers_and_every_prefill_instance_is_named() -> None:
    made = plans(RoundRobin(), 4, Role.PREFILL, Role.DECODE, Role.PREFILL)
    assert {names(plan) for plan in made} == {("i1", "i0", "i2"), ("i1", "i2", "i0")}


def test_every_pair_of_a_prefill_and_a_decode_instance_gets_its_turn() -> None:
    for roles in ([Role.PREFILL] * 2 + [Role.DECODE] * 2, [Role.PREFILL] * 3 + [Role.DECODE] * 2):
        made = plans(RoundRobin(), 12, *roles)
        pairs = {(plan.member.id, plan.prefill[0].id) for plan in made}
        assert len(pairs) == roles.count(Role.PREFILL) * roles.count(Role.DECODE)


def test_colocated_instances_compute_their_own_prompts() -> None:
    made = plans(RoundRobin(), 4, Role.COLOCATED, Role.PREFILL, Role.COLOCATED)
    assert [names(plan) for plan in made] == [("i0",), ("i2",)] * 2


def test_roles_are_soft() -> None:
    alone = plans(RoundRobin(), 2, Role.PREFILL, Role.PREFILL)
    assert {names(plan) for plan in alone} == {("i0",), ("i1",)}
    (plan,) = plans(RoundRobin(), 1, Role.DECODE)
    assert names(plan) == ("i0",)
