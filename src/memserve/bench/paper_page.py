"""The report of `memserve bench paper` as a page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from memserve.bench.environment import Environment
from memserve.bench.html import heading, items, page, paragraph, plots, table
from memserve.bench.paper_claims import findings_table
from memserve.bench.paper_matrix import COMPARED
from memserve.bench.paper_tables import (
    PaperResult,
    PaperRow,
    busy_table,
    reasons,
    rows_table,
    targets_table,
)
from memserve.bench.plots import Line, Point, line_plot
from memserve.bench.results import SavedResult
from memserve.bench.serving_page import FIGURES

_PLOTTED = ("TTFT mean s", "JCT mean s", "JCT P99 s", "inter-token P99 ms")

_INTRODUCTION = (
    "Two instances with one core each: both do everything (PD), or one computes prompts and the "
    "other decodes (1P1D); CC: with caching (full). Sessions arrive as a Poisson process, turns "
    "of a session one after the other; every repeat has arrivals and a cache of its own, the same "
    "for each topology. PD-CC and 1P1D-CC run as they would in service: the scheduler chooses "
    "(prompt-tree), and may have a decode instance compute a prompt itself. In all others "
    "instances take turns (round-robin), so that every prompt is handed over; '1P1D p', 'pd' and "
    "'full' are the steps of caching under this policy."
)
_SIMULATED = (
    "Four instances of two H800 each: 4 colocated against 2 prefill and 2 decode. As in the "
    "paper's engine, prompts are computed whole, in order, in steps in which no answer is decoded, "
    "and each step waits for its host, as its authors measured. Where sizes differ: how fast "
    "sessions arrive is not in the paper, and its gains grow with the load; half as many "
    "instances decode in batches twice as large, which costs bandwidth here; the data here are "
    "samples of its data. Caching cannot take more from a request than its time before the first "
    "token."
)


def paper_page(environment: Environment, result: PaperResult, micro: Sequence[SavedResult]) -> str:
    """A whole document."""
    return page("memserve bench paper", environment, _parts(result, micro))


def _parts(result: PaperResult, micro: Sequence[SavedResult]) -> Iterator[str]:
    yield paragraph(_INTRODUCTION)
    if result.missing:
        yield paragraph(
            "Not measured (what time did not allow, a second start with the same directory goes on "
            "with):",
            "bad",
        )
        yield items(result.missing)
    yield heading("The paper's figures, and here")
    yield paragraph(
        "Changes pair by pair over all rates and repeats, with 95 % intervals. 'Not clear': the "
        "interval has both signs. 'Other size': more than twice, or less than half."
    )
    yield table(findings_table(result.findings))
    if contradictions := reasons(result):
        yield paragraph("Against the paper:", "bad")
        yield items(contradictions)
    yield table(targets_table(result.targets))
    for workload in dict.fromkeys(row.workload for row in result.rows):
        rows = [row for row in result.rows if row.workload == workload]
        yield heading(workload)
        yield table(rows_table(rows))
        yield plots(_plots(workload, rows))
    yield heading("The paper's hardware, simulated: 8 x H800, Llama2-13B, TP=2")
    yield paragraph(_SIMULATED)
    yield table(findings_table(result.simulated))
    yield items(result.simulated_notes)
    yield heading("Processes")
    yield table(busy_table(result.rows))
    for one in micro:
        yield heading(one.command)
        yield paragraph(f"{one.environment.time}, commit {one.environment.commit}", "soft")
        yield table(one.table)


def _plots(workload: str, rows: Sequence[PaperRow]) -> Iterable[str]:
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
        yield line_plot(f"{workload}: {label}", "sessions/s", label.split()[-1], lines)
