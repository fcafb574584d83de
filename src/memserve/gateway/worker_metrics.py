"""Merger of several workers' metrics into one text, with the label `worker`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client.core import CollectorRegistry, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

WORKER = "worker"


class _Merged(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """Return the metrics. Called by Prometheus."""
        return self._families


def merged(texts: Mapping[int, bytes]) -> bytes:
    """Merge metrics in Prometheus' text format, by worker index, into one text."""
    families: dict[str, Metric] = {}
    for index, text in texts.items():
        for family in text_string_to_metric_families(text.decode()):
            known = families.get(family.name)
            if known is None:
                known = Metric(family.name, family.documentation, family.type)
                families[family.name] = known
            for sample in family.samples:
                labels = {**sample.labels, WORKER: str(index)}
                known.add_sample(sample.name, labels, sample.value)
    registry = CollectorRegistry()
    registry.register(_Merged(families.values()))
    return generate_latest(registry)
