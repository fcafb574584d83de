"""Pages of metrics, whatever their labels say: Prometheus reads what was written."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from memserve.api.histogram import Histogram, TokenHistogram
from memserve.api.metric import Label, MetricSpec, Page, counter, gauge, histogram
from memserve.gateway.metrics import merged
from tests.metric_page import samples

COUNT = counter(
    "memserve_things_total", "things", 'A "thing" \\ or\nanother.', Label("a"), Label("b")
)
PLAIN = gauge("memserve_level", "things", "A level.")
TIMES = histogram("memserve_times_seconds", "Times.", Label("a"))
WHOLE = histogram("memserve_whole_seconds", "Times.")
SPECS = (COUNT, PLAIN, TIMES, WHOLE)
# A model's name may be anything; `%`, braces and quotes are what our own formats are made of.
TEXTS = st.text(st.characters(codec="utf-8"), max_size=12) | st.text('%s{}",\\n \n\r=', max_size=6)
VALUES = st.floats(0, 1e18) | st.integers(0, 2**63)
OBSERVED = st.lists(st.floats(0, 1e6), max_size=20)


def filled(spec: MetricSpec, values: list[float], *labels: str) -> Page:
    page, observed = Page(SPECS), Histogram()
    for value in values:
        observed.observe(value)
    page.observe(spec, observed, *labels)
    return page


@given(TEXTS, TEXTS, VALUES)
def test_a_series_comes_back_as_it_was(a: str, b: str, value: float) -> None:
    page = Page(SPECS)
    page.add(COUNT, value, a, b)
    page.add(PLAIN, value)
    first, second = samples(page.text())
    assert (first.name, first.labels, first.value) == (COUNT.name, {"a": a, "b": b}, float(value))
    assert (second.name, second.labels, second.value) == (PLAIN.name, {}, float(value))
    (family, *_) = text_string_to_metric_families(page.text().decode())
    assert (family.type, family.documentation) == ("counter", COUNT.text)


@given(OBSERVED, TEXTS)
def test_a_histogram_comes_back_as_it_was(values: list[float], label: str) -> None:
    for spec, labels in ((TIMES, {"a": label}), (WHOLE, {})):
        found = samples(filled(spec, values, *labels.values()).text())
        buckets = [each for each in found if each.name == f"{spec.name}_bucket"]
        for bucket in buckets:
            bound = float(bucket.labels["le"])
            assert bucket.labels == {**labels, "le": bucket.labels["le"]}
            assert bucket.value == sum(value <= bound for value in values)
        assert math.isinf(float(buckets[-1].labels["le"]))
        rest = {each.name: each.value for each in found[len(buckets) :]}
        assert rest[f"{spec.name}_count"] == len(values)
        assert rest[f"{spec.name}_sum"] == pytest.approx(sum(values))


@given(st.lists(st.integers(0, 3_000_000), max_size=20))
def test_tokens_are_counted_up_to_each_bound(lengths: list[int]) -> None:
    observed = TokenHistogram()
    for tokens in lengths:
        observed.observe(tokens)
    counts = dict(zip(observed.bounds, observed.cumulative(), strict=True))
    assert counts == {
        bound: sum(tokens <= float(bound) for tokens in lengths) for bound in observed.bounds
    }
    assert observed.sum == sum(lengths)


@given(st.dictionaries(st.integers(0, 20), st.tuples(TEXTS, TEXTS, OBSERVED), min_size=1))
def test_workers_pages_are_one_page(workers: dict[int, tuple[str, str, list[float]]]) -> None:
    pages = {}
    for index, (a, b, values) in workers.items():
        page = filled(TIMES, values, a)
        page.add(COUNT, index, a, b)
        page.add(PLAIN, index)
        pages[index] = page.text()
    text = merged(pages)
    expected = [
        (each.name, {**each.labels, "worker": str(index)}, each.value)
        for index, page in pages.items()
        for each in samples(page)
    ]
    found = [(each.name, each.labels, each.value) for each in samples(text)]
    assert sorted(map(repr, found)) == sorted(map(repr, expected))
    for spec in SPECS:
        assert text.count(b"# TYPE %b " % spec.name.encode()) == 1


def test_a_page_takes_no_metric_that_it_does_not_have() -> None:
    with pytest.raises(KeyError):
        Page((COUNT,)).add(PLAIN, 1)
    with pytest.raises(ValueError, match="shorter"):
        Page(SPECS).add(COUNT, 1, "a")
