"""`memserve bench serve`: conversations against a server, or against clusters that it starts."""

from __future__ import annotations

import msgspec

from memserve.bench.measure import ServeRun, measure_cluster, nothing_else
from memserve.bench.work import ServeBenchConfig, Work
from memserve.config import ClusterConfig
from memserve.models.resolve import Progress


class ServeBenchResult(msgspec.Struct, frozen=True):
    """Runs of one workload."""

    runs: tuple[ServeRun, ...]


async def compare_caching(
    config: ServeBenchConfig,
    cluster: ClusterConfig,
    sessions: Work,
    progress: Progress,
) -> ServeBenchResult:
    """Measure one configuration with caching and without, one after the other."""
    found: list[ServeRun] = []
    for caching in ("full", "off"):
        cache = msgspec.structs.replace(cluster.cache, caching=caching)
        own = msgspec.structs.replace(cluster, cache=cache)
        runs, _ = await measure_cluster(
            f"caching {caching}", config, own, sessions, progress, nothing_else
        )
        found += runs
    return ServeBenchResult(tuple(found))
