"""A gateway's Prometheus metrics: its own requests, and every instance's statistics.

Counts are plain numbers that one event loop owns; Prometheus' objects are made for each scrape.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from prometheus_client.core import (
    CollectorRegistry,
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from memserve.api.histogram import Histogram
from memserve.api.instance_metrics import instance_metrics
from memserve.cluster.membership import Membership

_COUNTERS = (
    ("streams_broken", "Streams that ended with an error."),
    ("client_hang_ups", "Clients that left before the end."),
    ("prompt_tokens", "Prompt tokens of requests sent on."),
    ("failovers", "Streams that another instance went on with."),
)
_HISTOGRAMS = (
    ("time_to_first_token_seconds", "From a streamed request's arrival to its first bytes."),
    ("request_seconds", "From a request's arrival to its last byte."),
    ("failover_pause_seconds", "Without bytes for the client, from an instance's to the next's."),
)


class GatewayMetrics(Collector):
    """Metrics in registries of their own, so that several gateways fit into one process."""

    def __init__(self, membership: Membership) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # by endpoint and status
        self.running = 0
        self.streams_broken = 0
        self.client_hang_ups = 0
        self.prompt_tokens = 0
        self.failovers = 0
        self.time_to_first_token_seconds = Histogram()
        self.request_seconds = Histogram()
        self.failover_pause_seconds = Histogram()
        self._own = CollectorRegistry()
        self._own.register(self)
        self._instances = CollectorRegistry()
        self._instances.register(_Instances(membership))

    def register(self, collector: Collector) -> None:
        """Add a collector's metrics to `own`."""
        self._own.register(collector)

    def own(self) -> bytes:
        """Return this gateway's own metrics, in Prometheus' text format."""
        return generate_latest(self._own)

    def instances(self) -> bytes:
        """Return the instances' last polled statistics, in Prometheus' text format."""
        return generate_latest(self._instances)

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics. Called by Prometheus."""
        requests = CounterMetricFamily(
            "memserve_requests", "Requests answered.", labels=["endpoint", "status"]
        )
        for (endpoint, status), count in self.requests.items():
            requests.add_metric([endpoint, str(status)], count)
        yield requests
        yield GaugeMetricFamily("memserve_requests_running", "Requests not done.", self.running)
        counts = (
            self.streams_broken,
            self.client_hang_ups,
            self.prompt_tokens,
            self.failovers,
        )
        for (name, text), value in zip(_COUNTERS, counts, strict=True):
            yield CounterMetricFamily(f"memserve_{name}", text, value)
        histograms = (
            self.time_to_first_token_seconds,
            self.request_seconds,
            self.failover_pause_seconds,
        )
        for (name, text), histogram in zip(_HISTOGRAMS, histograms, strict=True):
            family = HistogramMetricFamily(f"memserve_{name}", text)
            family.add_metric([], histogram.cumulative(), histogram.sum)
            yield family


class _Instances(Collector):
    def __init__(self, membership: Membership) -> None:
        self._membership = membership

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics. Called by Prometheus."""
        yield from instance_metrics(
            (member.id, member.stats)
            for member in self._membership.members
            if member.stats is not None
        )
