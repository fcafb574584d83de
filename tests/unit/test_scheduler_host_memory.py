"""A prefix in host memory: dearer than one in HBM, cheaper than computing it."""

from __future__ import annotations

from memserve.types import InstanceId
from tests.scheduler_harness import BLOCK, Cluster, LinearCosts, request

PROMPT = 64 * BLOCK
# A megabyte in 0.1 s, the prompt in 1 s: less than near ties make no difference.
COSTS = LinearCosts(bandwidth={"shm": 1e6, "nixl": 1e6, "host": 1e7})


def test_of_equal_prefixes_the_one_in_hbm_is_taken() -> None:
    cluster = Cluster()
    cluster.add("a", "b", costs=COSTS)
    for slow, fast in (("a", "b"), ("b", "a")):
        cluster.cache(a=PROMPT - BLOCK, b=PROMPT - BLOCK)
        cluster.matches.host = {InstanceId(slow): PROMPT - BLOCK}
        decision = cluster.scheduler.decide(request(f"to {fast}", PROMPT))
        assert decision is not None
        assert decision.plan.instance == fast
        cluster.scheduler.finished(decision.request)


def test_a_prefix_in_host_memory_is_still_better_than_none() -> None:
    cluster = Cluster()
    cluster.add("a", "b", costs=COSTS)
    cluster.cache(a=PROMPT - BLOCK)
    cluster.matches.host = {InstanceId("a"): PROMPT - BLOCK}
    decision = cluster.scheduler.decide(request("r", PROMPT))
    assert decision is not None
    plan = decision.plan
    assert plan.instance == "a"
    loaded = COSTS.kv_bytes_per_token * (PROMPT - BLOCK) / COSTS.bandwidth["host"]
    assert plan.terms.queue >= loaded
