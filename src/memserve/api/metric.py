"""Contract of metrics: what each is called and means, and a page of them for Prometheus.

Whoever counts describes what it counts with `MetricSpec`s and writes its figures to a `Page` when
it is asked: plain numbers in between, so that counting costs next to nothing. `docs/metrics.md` is
made of the specs, and a page takes no metric that its specs do not name.

Format: https://prometheus.io/docs/instrumenting/exposition_formats/ (text, version 0.0.4).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Protocol

from memserve.api.histogram import Histogram, TokenHistogram

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class MetricKind(StrEnum):
    COUNTER = "counter"  # only grows, from the process's start on
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Label:
    """A label: either all `values` that it can have, or what its values are."""

    name: str
    values: tuple[str, ...] = ()
    text: str = ""


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """A metric: its name on the page, without a histogram's suffixes, and its meaning."""

    name: str
    kind: MetricKind
    unit: str  # of its values: seconds, bytes, tokens, requests ...
    text: str
    labels: tuple[Label, ...] = ()


def counter(name: str, unit: str, text: str, *labels: Label) -> MetricSpec:
    return MetricSpec(name, MetricKind.COUNTER, unit, text, labels)


def gauge(name: str, unit: str, text: str, *labels: Label) -> MetricSpec:
    return MetricSpec(name, MetricKind.GAUGE, unit, text, labels)


def histogram(name: str, text: str, *labels: Label) -> MetricSpec:
    """A histogram of seconds."""
    return MetricSpec(name, MetricKind.HISTOGRAM, "seconds", text, labels)


# The label that tells instances apart. Not `instance`: that is Prometheus' own, for who was asked.
INSTANCE = Label("instance_id", text="an instance's id")


class MetricSource(Protocol):
    """Something that counts."""

    @property
    def metrics(self) -> Sequence[MetricSpec]:
        """Specifications of all metrics that `report` writes."""

    async def report(self, page: Page) -> None:
        """Write the present figures. Lets the event loop go on where that takes long."""


class _Family:
    __slots__ = ("lines", "names")

    def __init__(self, spec: MetricSpec) -> None:
        text = spec.text.replace("\\", r"\\").replace("\n", r"\n")
        self.lines = [f"# HELP {spec.name} {text}\n# TYPE {spec.name} {spec.kind}\n"]
        self.names = tuple(label.name for label in spec.labels)


class Page:
    """The text of metrics, one family after the other in the order of the specs."""

    def __init__(self, metrics: Iterable[MetricSpec]) -> None:
        self._families = {spec.name: _Family(spec) for spec in metrics}

    def add(self, spec: MetricSpec, value: float, *labels: str) -> None:
        """Add a series; `labels`: its values, in the spec's order. Raises KeyError for a metric
        that the page does not have."""
        family = self._families[spec.name]
        family.lines.append(f"{spec.name}{_labels(family.names, labels)} {float(value)}\n")

    def observe(self, spec: MetricSpec, observed: Histogram | TokenHistogram, *labels: str) -> None:
        """Add a histogram's series."""
        family, counts = self._families[spec.name], observed.cumulative()
        lines = _histogram(spec.name, family.names, labels, observed.bounds)
        family.lines.append(lines % (*counts, observed.sum, counts[-1]))

    def text(self) -> bytes:
        families = self._families.values()
        return "".join(line for family in families for line in family.lines).encode()


async def page_of(sources: Iterable[MetricSource]) -> bytes:
    """Return the page of several sources."""
    known = list(sources)
    page = Page(spec for source in known for spec in source.metrics)
    for source in known:
        await source.report(page)
    return page.text()


@lru_cache(maxsize=16_384)  # instances come and go; each has about sixty combinations
def _labels(names: tuple[str, ...], values: tuple[str, ...]) -> str:
    if not names and not values:
        return ""
    pairs = zip(names, values, strict=True)
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in pairs) + "}"


@lru_cache(maxsize=4096)  # two kilobytes each; an instance has seventeen
def _histogram(
    name: str, names: tuple[str, ...], values: tuple[str, ...], bounds: tuple[str, ...]
) -> str:
    """Return the lines of a histogram, to be filled with its counts, sum and count by `%`."""
    named = _labels(names, values).replace("%", "%%")
    start = f"{name}_bucket{{{named[1:-1]}," if named else f"{name}_bucket{{"
    lines = [f'{start}le="{bound}"}} %d.0\n' for bound in bounds]
    return "".join((*lines, f"{name}_sum{named} %r\n", f"{name}_count{named} %d.0\n"))


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
