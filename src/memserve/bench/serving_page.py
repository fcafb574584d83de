"""The report of `memserve bench serve` as a page: figures, their spread over repeats, plots."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.table import Table

from memserve.bench.environment import Environment
from memserve.bench.loadgen import RequestRecord
from memserve.bench.measure import ServeRun
from memserve.bench.pages import render_page
from memserve.bench.plots import Plot, distribution
from memserve.bench.report import (
    Distribution,
    ServingSummary,
    inter_token_times,
    serving_table,
    tpot,
)
from memserve.bench.statistics import Estimate
from memserve.bench.work import ServeBenchConfig

# Label, scale and getter of the figures that are compared over repeats.
FIGURES: tuple[tuple[str, float, Callable[[ServingSummary], float | None]], ...] = (
    ("TTFT mean s", 1.0, lambda s: _mean(s.ttft)),
    ("TTFT P99 s", 1.0, lambda s: _p99(s.ttft)),
    ("TPOT mean ms", 1e3, lambda s: _mean(s.tpot)),
    ("inter-token P99 ms", 1e3, lambda s: _p99(s.inter_token)),
    ("JCT mean s", 1.0, lambda s: _mean(s.jct)),
    ("JCT P99 s", 1.0, lambda s: _p99(s.jct)),
    ("cached %", 100.0, lambda s: s.cached_ratio),
    ("output tokens/s", 1.0, lambda s: s.output_tokens_per_second),
)


def serving_page(
    environment: Environment, config: ServeBenchConfig, runs: Sequence[ServeRun]
) -> str:
    """Return the report as an HTML document."""
    done = {name: _requests(runs, name) for name in names_of(runs)}
    arrivals = (
        f"{config.concurrency} sessions at a time (closed loop)"
        if config.concurrency
        else f"{config.rate:g} sessions begin per second (Poisson)"
    )
    return render_page(
        "serving.html",
        environment,
        config=config,
        arrivals=arrivals,
        repeats=repeats_table(runs),
        distributions=(
            _distribution("Time to first token", done, _first_token),
            _distribution("Job completion time", done, lambda r: [r.end - r.scheduled]),
            _distribution("Time per output token", done, _per_token),
            _distribution("Between tokens", done, inter_token_times),
        ),
        runs=serving_table([(_title(run), run.summary) for run in runs]),
        processes=processes_table(runs),
    )


def names_of(runs: Sequence[ServeRun]) -> list[str]:
    """Return the distinct names of runs, in order of appearance."""
    return list(dict.fromkeys(run.name for run in runs))


def repeats_table(runs: Sequence[ServeRun]) -> Table:
    """Return a table with a row for each name, with the spread over its repeats."""
    shown = Table("measured", "runs")
    for label, _, _ in FIGURES:
        shown.add_column(label, justify="right")
    shown.add_column("good/s", justify="right")
    shown.add_column("failed", justify="right")
    for name in names_of(runs):
        own = [run.summary for run in runs if run.name == name]
        cells = [
            _estimate([value(summary) for summary in own], scale) for _, scale, value in FIGURES
        ]
        good = _estimate([s.goodput if s.slo else None for s in own], 1.0)
        failed = sum(summary.failed + summary.unsent for summary in own)
        shown.add_row(name, str(len(own)), *cells, good, str(failed))
    return shown


def processes_table(runs: Sequence[ServeRun]) -> Table:
    """Return a table of each process's CPU and memory in each run; empty without such figures."""
    shown = Table("measured", "process")
    shown.add_column("CPU s", justify="right")
    shown.add_column("of the run", justify="right")
    shown.add_column("peak MB", justify="right")
    for run in runs:
        for process in run.processes:
            share = process.cpu_seconds / run.summary.duration if run.summary.duration else 0.0
            shown.add_row(
                _title(run),
                process.name,
                f"{process.cpu_seconds:.2f}",
                f"{share:.0%}",
                f"{process.peak_bytes / 1e6:.0f}",
            )
    return shown


def _title(run: ServeRun) -> str:
    return f"{run.name} #{run.repeat + 1}"


def _estimate(values: Sequence[float | None], scale: float) -> str:
    found = Estimate.of([value for value in values if value is not None])
    return "-" if found is None else found.shown(scale)


def _requests(runs: Sequence[ServeRun], name: str) -> list[RequestRecord]:
    own = (run.requests for run in runs if run.name == name)
    return [record for records in own for record in records if record.error is None]


def _distribution(
    title: str,
    done: dict[str, list[RequestRecord]],
    values: Callable[[RequestRecord], Sequence[float]],
) -> Plot:
    series = [
        (name, [value for record in records for value in values(record)])
        for name, records in done.items()
    ]
    return distribution(title, "s", [one for one in series if one[1]])


def _first_token(record: RequestRecord) -> list[float]:
    return [] if record.first_token is None else [record.first_token - record.scheduled]


def _per_token(record: RequestRecord) -> list[float]:
    value = tpot(record)
    return [] if value is None else [value]


def _mean(figure: Distribution | None) -> float | None:
    return None if figure is None else figure.mean


def _p99(figure: Distribution | None) -> float | None:
    return None if figure is None else figure.p99
