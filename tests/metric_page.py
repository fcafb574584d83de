"""Readers of a page of metrics, for tests."""

from __future__ import annotations

from collections.abc import Coroutine, Iterable
from typing import Any, cast

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from memserve.api.metric import MetricSource, page_of


def samples(page: bytes | str) -> list[Sample]:
    text = page if isinstance(page, str) else page.decode()
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def figures(page: bytes | str) -> dict[tuple[str, ...], float]:
    """The values by name and label values, in the page's order of labels."""
    return {(each.name, *each.labels.values()): each.value for each in samples(page)}


def done(report: Coroutine[Any, Any, bytes]) -> bytes:
    """What a report returns that never waits for anything but the event loop's next turn."""
    while True:
        try:
            report.send(None)
        except StopIteration as end:
            return cast(bytes, end.value)


def reported(*sources: MetricSource) -> dict[tuple[str, ...], float]:
    """What sources report."""
    return figures(done(page_of(sources)))


def named(page: bytes | str, names: Iterable[str]) -> dict[str, float]:
    """Sums of series by metric name; 0 for those that are missing."""
    found = dict.fromkeys(names, 0.0)
    for each in samples(page):
        if each.name in found:
            found[each.name] += each.value
    return found
