"""What Prometheus gets from a gateway: its own requests, and every instance's statistics."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from memserve.api.histogram import LATENCY_BOUNDS
from memserve.api.instance_metrics import instance_metrics
from memserve.cluster.membership import Membership


class GatewayMetrics:
    """One registry, so that several gateways fit into one process."""

    def __init__(self, membership: Membership) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "memserve_requests",
            "Requests answered.",
            ("endpoint", "status"),
            registry=registry,
        )
        self.running = Gauge("memserve_requests_running", "Requests not done.", registry=registry)
        self.broken = Counter(
            "memserve_streams_broken", "Streams that ended with an error.", registry=registry
        )
        self.hang_ups = Counter(
            "memserve_client_hang_ups", "Clients that left before the end.", registry=registry
        )
        self.prompt_tokens = Counter(
            "memserve_prompt_tokens", "Prompt tokens of requests sent on.", registry=registry
        )
        self.first_token = Histogram(
            "memserve_time_to_first_token_seconds",
            "From a streamed request's arrival to its first bytes.",
            registry=registry,
            buckets=LATENCY_BOUNDS,
        )
        self.whole = Histogram(
            "memserve_request_seconds",
            "From a request's arrival to its last byte.",
            registry=registry,
            buckets=LATENCY_BOUNDS,
        )
        registry.register(_Instances(membership))

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)


class _Instances(Collector):
    def __init__(self, membership: Membership) -> None:
        self._membership = membership

    def collect(self) -> Iterable[Metric]:
        return instance_metrics(
            (member.id, member.stats)
            for member in self._membership.members
            if member.stats is not None
        )
