"""The report of the paper's evaluation as a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.table import Table

from evaluation.paper.claims import findings_table
from evaluation.paper.matrix import COMPARED
from evaluation.paper.tables import (
    PaperResult,
    PaperRow,
    busy_table,
    reasons,
    rows_table,
    targets_table,
)
from evaluation.results import SavedResult
from memserve.bench.environment import Environment
from memserve.bench.pages import render_page
from memserve.bench.plots import Line, Plot, Point
from memserve.bench.serving_page import FIGURES

_PLOTTED = ("TTFT mean s", "JCT mean s", "JCT P99 s", "inter-token P99 ms")


class _Workload(NamedTuple):
    """A section of the page."""

    name: str
    table: Table
    plots: tuple[Plot, ...]


def paper_page(environment: Environment, result: PaperResult, micro: Sequence[SavedResult]) -> str:
    """A whole document."""
    return render_page(
        "paper.html",
        environment,
        "evaluation",
        result=result,
        findings=findings_table(result.findings),
        contradictions=reasons(result),
        targets=targets_table(result.targets),
        workloads=[
            _workload(name, [row for row in result.rows if row.workload == name])
            for name in dict.fromkeys(row.workload for row in result.rows)
        ],
        simulated=findings_table(result.simulated),
        busy=busy_table(result.rows),
        micro=micro,
    )


def _workload(name: str, rows: Sequence[PaperRow]) -> _Workload:
    return _Workload(name, rows_table(rows), tuple(_plots(name, rows)))


def _plots(workload: str, rows: Sequence[PaperRow]) -> Iterator[Plot]:
    for index, (label, scale, _) in enumerate(FIGURES):
        if label not in _PLOTTED:
            continue
        lines = []
        for topology in COMPARED:
            points = tuple(
                Point(row.rate, e.mean * scale, e.low * scale, e.high * scale)
                for row in sorted(rows, key=lambda row: row.rate)
                if row.topology == topology and (e := row.figures[index]) is not None
            )
            if points:
                lines.append(Line(topology, points))
        yield Plot(f"{workload}: {label}", "sessions/s", label.split()[-1], tuple(lines))
