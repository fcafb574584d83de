"""A prefix in host memory: dearer than one in HBM, cheaper than computing it."""

from __future__ import annotations

from memserve.types import InstanceId
from tests.scheduler_harness import BLOCK, Cluster, request

PROMPT = 64 * BLOCK


def test_of_equal_prefixes_the_one_in_hbm_is_taken() -> None:
    cluster = Cluster()
    cluster.add("a", "b")
    for slow, fast in (("a", "b"), ("b", "a")):
        cluster.cache(a=PROMPT - BLOCK, b=PROMPT - BLOCK)
        cluster.matches.host = {InstanceId(slow): PROMPT - BLOCK}
        decision = cluster.scheduler.decide(request(f"to {fast}", PROMPT))
        assert decision is not None
        assert decision.plan.instance == fast
        cluster.scheduler.finished(decision.request)


def test_a_prefix_in_host_memory_is_still_better_than_none() -> None:
    cluster = Cluster()
    cluster.add("a", "b")
    cluster.cache(a=PROMPT - BLOCK)
    cluster.matches.host = {InstanceId("a"): PROMPT - BLOCK}
    decision = cluster.scheduler.decide(request("r", PROMPT))
    assert decision is not None
    plan = decision.plan
    assert plan.instance == "a"
    loaded = cluster.costs.kv_bytes_per_token * (PROMPT - BLOCK) / cluster.costs.bandwidth["host"]
    assert plan.terms.queue >= loaded
