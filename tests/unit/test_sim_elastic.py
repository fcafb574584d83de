"""A simulated cluster that changes while it runs: nothing is lost, and caches stay of use."""

from __future__ import annotations

import numpy as np

from memserve.config import PlannerConfig
from memserve.planner.contract import Action, Decision
from memserve.scheduler.hardware import cost_model
from memserve.sim.cluster import SimCluster
from memserve.sim.elastic import Delays, SimPlanner
from memserve.sim.instance import InstanceShape
from memserve.sim.prompt import BlockKeys, SimRequest, SimSession
from memserve.types import InstanceId, RequestId, Role

BLOCK = 512
COSTS = cost_model("h800", "llama2-13b", 1)


def shapes(prefill: int, decode: int) -> list[InstanceShape]:
    roles = [*[Role.PREFILL] * prefill, *[Role.DECODE] * decode]
    return [
        InstanceShape(InstanceId(f"{role}-{at}"), role, COSTS, BLOCK, 110)
        for at, role in enumerate(roles)
    ]


def request(name: str, tokens: int, output: int, keys: BlockKeys, seed: int = 0) -> SimRequest:
    prompt = np.random.default_rng(seed).integers(0, 32_000, tokens).astype(np.int32)
    return SimRequest(RequestId(name), prompt, keys.of(prompt), output, name)


def steady(count: int, rate: float, tokens: int, output: int) -> list[SimSession]:
    keys = BlockKeys(BLOCK)
    return [
        SimSession(at / rate, (request(f"r{at}", tokens, output, keys, at),)) for at in range(count)
    ]


def ran(
    cluster: SimCluster, sessions: list[SimSession], config: PlannerConfig, delays: Delays
) -> tuple[list[SimRequest], list[Decision]]:
    decisions: list[Decision] = []
    ended: list[SimRequest] = []
    like = next(iter(cluster.instances.values())).shape
    SimPlanner(cluster, config, like, delays, decisions.append).start()
    cluster.run(sessions, ended.append)
    return ended, [one for one in decisions if one.action is not Action.NOTHING]


def test_roles_follow_the_load_and_every_request_ends() -> None:
    cluster = SimCluster(shapes(6, 2), "prompt-tree")
    config = PlannerConfig(ttft=3.0, tpot=0.025, percentile=90, colocated=False)
    ended, changes = ran(cluster, steady(480, 10.0, 500, 400), config, Delays())
    assert len(ended) == 480
    assert all(one.end is not None for one in ended)
    assert [one.action for one in changes] == [Action.ROLES]
    roles = [one.shape.role for one in cluster.instances.values()]
    assert roles.count(Role.DECODE) > 2
    assert not cluster.scheduler.load.reserved


def test_what_a_member_had_cached_is_found_and_fetched_when_it_decodes() -> None:
    cluster = SimCluster(shapes(2, 2), "prompt-tree")
    keys = BlockKeys(BLOCK)
    first, second = (request(name, 8 * BLOCK, 4, keys) for name in ("first", "second"))
    ended: list[SimRequest] = []
    cluster.run([SimSession(0.0, (first,))], ended.append)
    assert first.computed_at is not None
    begun = cluster.timeline.now()
    cluster.change_role(first.computed_at, Role.DECODE)
    cluster.run([SimSession(begun + 1.0, (second,))], ended.append)
    assert len(ended) == 2
    assert second.cached_tokens + second.fetched_tokens >= 7 * BLOCK


def test_members_come_after_their_start_and_go_when_they_are_not_needed() -> None:
    cluster = SimCluster(shapes(2, 2), "prompt-tree")
    config = PlannerConfig(ttft=3.0, tpot=0.025, percentile=90, max_members=8, min_members=4)
    busy = steady(1000, 18.0, 2000, 200)
    calm = [SimSession(one.arrival * 40 + 80, one.requests) for one in steady(30, 8.0, 2000, 20)]
    for number, session in enumerate(calm):
        session.requests[0].id = RequestId(f"calm-{number}")
    joined: list[float] = []
    add = cluster.add

    def watched(shape: InstanceShape) -> None:
        joined.append(cluster.timeline.now())
        add(shape)

    cluster.add = watched  # type: ignore[method-assign]
    ended, changes = ran(cluster, [*busy, *calm], config, Delays(start=10.0))
    assert len(ended) == 1030
    added = [one for one in changes if one.action is Action.ADD]
    assert added
    assert joined[0] == added[0].at + 10.0
    assert len(joined) == sum(one.count for one in added)
    assert len(cluster.scheduler.load.by_slot) <= 8


def test_a_member_that_goes_finishes_what_it_runs() -> None:
    cluster = SimCluster(shapes(1, 2), "prompt-tree")
    keys = BlockKeys(BLOCK)
    one = request("one", 4 * BLOCK, 500, keys)
    ended: list[SimRequest] = []

    def leave() -> None:
        busy = next(
            i for i in cluster.instances.values() if i.shape.role is Role.DECODE and i.running
        )
        cluster.remove(busy.shape.id)

    cluster.timeline.at(2.0, leave)
    cluster.run([SimSession(0.0, (one,))], ended.append)
    assert ended == [one]
    assert len(cluster.scheduler.load.by_slot) == 2
    later = request("later", 4 * BLOCK, 5, keys)
    cluster.run([SimSession(cluster.timeline.now(), (later,))], ended.append)
    assert later.end is not None


def test_a_dry_run_changes_nothing() -> None:
    cluster = SimCluster(shapes(6, 2), "prompt-tree")
    config = PlannerConfig(ttft=3.0, tpot=0.025, percentile=90, colocated=False, dry_run=True)
    _, changes = ran(cluster, steady(480, 10.0, 500, 400), config, Delays())
    assert changes
    assert [one.shape.role for one in cluster.instances.values()].count(Role.DECODE) == 2
