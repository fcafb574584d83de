"""Metrics of a gateway's edge: connections, refusals by reason, and survived failures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from memserve.api.http_limits import HttpCounters
from memserve.gateway.access import Access
from memserve.vital import Vitals


class EdgeMetrics(Collector):
    """Reads the counters of the HTTP server, `Access` and `Vitals`."""

    def __init__(self, counters: HttpCounters, access: Access, vitals: Vitals) -> None:
        self._counters = counters
        self._access = access
        self._vitals = vitals

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics. Called by Prometheus."""
        accepted = self._counters.connections
        yield CounterMetricFamily("memserve_connections", "Connections accepted.", accepted)
        refusals = CounterMetricFamily(
            "memserve_refusals",
            "Requests and connections refused before they cost anything.",
            labels=["why"],
        )
        for why, count in self._refused().items():
            refusals.add_metric([why], count)
        yield refusals
        survived = CounterMetricFamily(
            "memserve_survived_failures",
            "Polls, events and errands that failed as nobody expected, and were tried again.",
            labels=["what"],
        )
        for what, count in self._vitals.survived.items():
            survived.add_metric([what], count)
        yield survived

    def _refused(self) -> Mapping[str, int]:
        counters, access = self._counters, self._access
        return {
            "connections": counters.refused_connections,
            "malformed": counters.malformed,
            "body_memory": counters.bodies_refused,
            "body_unwanted": counters.turned_away,
            "head_timeout": counters.head_timeouts,
            "body_timeout": counters.body_timeouts,
            "stalled": counters.stalled,
            "idle": counters.evicted,
            "api_key": access.unauthorised,
            "cross_origin": access.foreign,
            "secret": access.verifier.refused,
        }
