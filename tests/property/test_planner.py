"""The planner on any load: bounds, no flapping, and no change that costs more than it gains."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from memserve.config import PlannerConfig
from memserve.planner.contract import Action, Split
from memserve.planner.planner import HORIZON, LEAST_GAIN
from memserve.types import Role
from tests.planner_harness import Cluster, members_of

LOOKS = 12

roles = st.lists(st.sampled_from(list(Role)), min_size=1, max_size=10)
rates = st.floats(0.05, 400.0)
prompts = st.integers(16, 30_000)
shares = st.floats(0.0, 0.99)
outputs = st.floats(1.0, 2000.0)
objectives = st.builds(
    PlannerConfig,
    ttft=st.floats(0.05, 20.0),
    tpot=st.floats(0.005, 0.5),
    percentile=st.sampled_from([None, 50.0, 90.0, 99.0]),
)


def _cluster(
    config: PlannerConfig,
    members: list[Role],
    rate: float,
    prompt: int,
    share: float,
    output: float,
) -> Cluster:
    return Cluster(config, members_of(*members), prompt, int(prompt * share), output, rate)


@settings(max_examples=60, deadline=None)
@given(objectives, roles, rates, prompts, shares, outputs)
@example(
    PlannerConfig(ttft=1.0, tpot=0.5), [Role.PREFILL] * 3 + [Role.DECODE], 20.0, 16, 0.0, 495.0
)
def test_a_steady_load_leaves_no_split_to_come_back(
    config: PlannerConfig,
    members: list[Role],
    rate: float,
    prompt: int,
    share: float,
    output: float,
) -> None:
    cluster = _cluster(config, members, rate, prompt, share, output)
    changes = cluster.looks(LOOKS)
    splits = [decision.present.split for decision in changes] + [Split.of(cluster.roles)]
    assert len({*splits}) == len(changes) + 1
    served = [decision.present.served for decision in changes]
    assert served == sorted(served)


@settings(max_examples=60, deadline=None)
@given(objectives, roles, rates, prompts, shares, outputs)
def test_a_change_gains_more_than_it_costs(
    config: PlannerConfig,
    members: list[Role],
    rate: float,
    prompt: int,
    share: float,
    output: float,
) -> None:
    cluster = _cluster(config, members, rate, prompt, share, output)
    changes = cluster.looks(LOOKS)
    splits = [decision.present.split for decision in changes] + [Split.of(cluster.roles)]
    for decision, split in zip(changes, splits[1:], strict=True):
        best = decision.considered[0]
        needed = LEAST_GAIN * decision.demand.requests_per_second * HORIZON
        assert best.gain > best.cost + needed
        assert best.served > decision.present.served
        moved = len(decision.changes)
        assert moved == decision.present.split.moves_to(best.split) > 0
        assert split == best.split


@settings(max_examples=60, deadline=None)
@given(
    roles,
    rates,
    prompts,
    outputs,
    st.integers(0, 4),
    st.integers(0, 4),
    st.one_of(st.none(), st.integers(1, 6)),
    st.one_of(st.none(), st.integers(1, 6)),
    st.booleans(),
)
def test_roles_stay_inside_their_bounds(
    members: list[Role],
    rate: float,
    prompt: int,
    output: float,
    min_prefill: int,
    min_decode: int,
    max_prefill: int | None,
    max_decode: int | None,
    colocated: bool,
) -> None:
    config = PlannerConfig(
        ttft=0.5,
        tpot=0.03,
        min_prefill=min_prefill,
        min_decode=min_decode,
        max_prefill=max_prefill,
        max_decode=max_decode,
        colocated=colocated,
    )
    cluster = _cluster(config, members, rate, prompt, 0.3, output)
    for _ in cluster.looks(LOOKS):
        split = Split.of(cluster.roles)
        if not split.prefill and not split.decode:
            assert colocated
            continue
        assert max(min_prefill, 1) <= split.prefill <= (max_prefill or len(members))
        assert max(min_decode, 1) <= split.decode <= (max_decode or len(members))


@settings(max_examples=25, deadline=None)
@given(roles, rates, prompts, outputs, st.integers(1, 5), st.integers(0, 8))
def test_members_stay_inside_their_bounds(
    members: list[Role], rate: float, prompt: int, output: float, least: int, more: int
) -> None:
    most = max(least, len(members)) + more
    config = PlannerConfig(ttft=0.5, tpot=0.03, min_members=least, max_members=most)
    cluster = _cluster(config, members, rate, prompt, 0.3, output)
    before = len(members)
    for _ in range(150):
        decision = cluster.look()
        now = len(cluster.members)
        if decision.action is Action.ADD:
            assert before < now <= most
        elif decision.action is Action.REMOVE:
            assert least <= now < before
        else:
            assert now == before
        before = now


@settings(max_examples=25, deadline=None)
@given(objectives, roles, rates, prompts, outputs)
def test_members_whose_kv_does_not_move_keep_their_roles(
    config: PlannerConfig, members: list[Role], rate: float, prompt: int, output: float
) -> None:
    stuck = members_of(Role.COLOCATED, Role.COLOCATED, moves=False)
    cluster = Cluster(config, [*stuck, *members_of(*members)], prompt, 0, output, rate)
    cluster.looks(LOOKS)
    assert cluster.roles[:2] == [Role.COLOCATED, Role.COLOCATED]
