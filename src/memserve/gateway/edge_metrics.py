"""What Prometheus gets of a gateway's edge: connections, and who was refused there for what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from memserve.api.http_limits import HttpCounters
from memserve.gateway.access import Access


class EdgeMetrics(Collector):
    """Reads what a server and the gateway's door have counted."""

    def __init__(self, counters: HttpCounters, access: Access) -> None:
        self._counters = counters
        self._access = access

    def collect(self) -> Iterable[Metric]:
        """Prometheus' own name for it."""
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

    def _refused(self) -> Mapping[str, int]:
        counters, access = self._counters, self._access
        return {
            "connections": counters.refused_connections,
            "malformed": counters.malformed,
            "body_memory": counters.bodies_refused,
            "head_timeout": counters.head_timeouts,
            "body_timeout": counters.body_timeouts,
            "stalled": counters.stalled,
            "api_key": access.unauthorised,
            "cross_origin": access.foreign,
            "secret": access.verifier.refused,
        }
