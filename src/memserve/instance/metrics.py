"""An instance's page of metrics: `GET /metrics`."""

from __future__ import annotations

import memserve
from memserve.api.instance_metrics import (
    BUILD,
    INSTANCE_METRICS,
    STATE,
    report_instance,
    report_state,
)
from memserve.api.metric import MetricSpec, Page
from memserve.api.trace_metrics import TraceMetrics
from memserve.api.vllm_metrics import ENGINE, VLLM_INSTANCE_METRICS, report_lora, report_vllm
from memserve.instance.instance import Instance
from memserve.tracing.span import SpanCounts

METRICS: tuple[MetricSpec, ...] = (
    *(BUILD, STATE),
    *INSTANCE_METRICS,
    *VLLM_INSTANCE_METRICS,
    *TraceMetrics.metrics,
)


def instance_page(instance: Instance, spans: SpanCounts | None = None) -> bytes:
    """Return the metrics in Prometheus' text format: while the model is being loaded, the state
    alone. `spans`: of the process's tracer, if it has one."""
    identity, stats = instance.identity, instance.stats()
    page = Page(METRICS)
    page.add(BUILD, 1, memserve.__version__)
    report_state(page, identity.id, instance.state)
    if stats is not None:
        TraceMetrics(spans).write(page)
        report_instance(page, identity.id, stats)
        report_vllm(page, identity.model, ENGINE, stats, instance.info().limits)
        report_lora(page)
    return page.text()
