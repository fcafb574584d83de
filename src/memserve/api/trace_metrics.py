"""Metrics of the export of traces."""

from __future__ import annotations

from memserve.api.metric import Label, MetricSpec, Page, counter
from memserve.tracing.span import SpanCounts

_SPANS = counter(
    "memserve_trace_spans_total",
    "spans",
    "Spans that have ended and are to be exported: `exported`, `dropped` since too many waited "
    "(sample less), or `failed` to be sent. 0 where traces are off.",
    Label("result", ("exported", "dropped", "failed")),
)


class TraceMetrics:
    """Reads the counts of a process's tracer."""

    metrics: tuple[MetricSpec, ...] = (_SPANS,)

    def __init__(self, counts: SpanCounts | None) -> None:
        """`counts`: of the process's tracer; None: it has none."""
        self._counts = counts or SpanCounts()

    async def report(self, page: Page) -> None:
        self.write(page)

    def write(self, page: Page) -> None:
        page.add(_SPANS, self._counts.exported, "exported")
        page.add(_SPANS, self._counts.dropped, "dropped")
        page.add(_SPANS, self._counts.failed, "failed")
