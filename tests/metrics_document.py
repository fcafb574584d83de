"""The tables of docs/metrics.md, made from the specs that the code reports by.

python -m tests.metrics_document    # writes them anew: `make metrics-docs`
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from memserve.api.metric import Label, MetricSpec
from memserve.api.trace_metrics import TraceMetrics
from memserve.gateway.handover_proof import HandoverProof
from memserve.gateway.metrics import EdgeMetrics, GatewayMetrics, InstancesMetrics
from memserve.gateway.planning import PlannerBoard
from memserve.gateway.routing_metrics import RoutingMetrics
from memserve.instance.app import METRICS as INSTANCE_PAGE

PAGE = Path(__file__).parent.parent / "docs/metrics.md"
BEGIN, END = "<!-- begin: make metrics-docs -->\n", "<!-- end -->\n"

OF_GATEWAY: tuple[MetricSpec, ...] = (
    *GatewayMetrics.metrics,
    *RoutingMetrics.metrics,
    *HandoverProof.metrics,
    *EdgeMetrics.metrics,
    *TraceMetrics.metrics,
    *PlannerBoard.metrics,
)
GATEWAY_PAGE: tuple[MetricSpec, ...] = (*OF_GATEWAY, *InstancesMetrics.metrics)
EVERYWHERE = ("instance_id", "model_name", "engine")  # the text above the tables tells of them
ALL = {spec.name: spec for spec in (*GATEWAY_PAGE, *INSTANCE_PAGE)}


def tables() -> str:
    ours = [spec for spec in ALL.values() if not spec.name.startswith("vllm:")]
    own = {spec.name for spec in OF_GATEWAY}
    theirs = [spec for spec in ALL.values() if spec.name.startswith("vllm:")]
    return "".join(
        (
            "## A gateway's own\n\n",
            _table(spec for spec in ours if spec.name in own),
            "\n## Of instances\n\n",
            _table(spec for spec in ours if spec.name not in own),
            "\n## By vLLM's names\n\n",
            _table(theirs),
        )
    )


def _table(specs: Iterable[MetricSpec]) -> str:
    rows = [
        "| name | type | labels | unit | where | meaning |\n| --- | --- | --- | --- | --- | --- |\n"
    ]
    rows += map(_row, specs)
    return "".join(rows)


def _row(spec: MetricSpec) -> str:
    labels = "; ".join(map(_label, spec.labels))
    return (
        f"| `{spec.name}` | {spec.kind} | {labels} | {spec.unit} | {_where(spec)} | {spec.text} |\n"
    )


def _label(label: Label) -> str:
    values = ", ".join(f"`{value}`" if value else "empty" for value in label.values) or label.text
    return f"`{label.name}`" if label.name in EVERYWHERE else f"`{label.name}`: {values}"


def _where(spec: MetricSpec) -> str:
    at = [name for name, page in (("G", GATEWAY_PAGE), ("I", INSTANCE_PAGE)) if spec in page]
    return ", ".join(at)


def page_with(page: str, generated: str) -> str:
    """The page with these tables for its own."""
    block = re.compile(re.escape(BEGIN) + ".*" + re.escape(END), re.DOTALL)
    assert block.search(page) is not None
    return block.sub(lambda _: f"{BEGIN}\n{generated}\n{END}", page)


def main() -> None:
    PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), tables()), encoding="utf-8")


if __name__ == "__main__":
    main()
