"""Results: what is said of a run, as a table for people and as JSON for everything else."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from rich.table import Table

from memserve.bench.environment import Environment, capture_environment
from memserve.bench.loadgen import LoadResult, RequestRecord

STDOUT = "-"


class Distribution(msgspec.Struct, frozen=True):
    """Mean and percentiles (linear between neighbours) of one figure."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Distribution | None:
        """None for no values."""
        if not values:
            return None
        p50, p90, p99 = np.percentile(values, [50, 90, 99])
        return cls(len(values), float(np.mean(values)), float(p50), float(p90), float(p99))


class ServingSummary(msgspec.Struct, frozen=True):
    """What a load run measured; seconds. Failed requests count in `failed` only."""

    requests: int
    failed: int
    unsent: int  # turns of a session behind a failed one
    duration: float  # from the start of the run to the last answer
    ttft: Distribution | None  # from the schedule to the first token
    tpot: Distribution | None  # between tokens after the first, mean of each request
    jct: Distribution | None  # from the schedule to the last byte
    lateness: Distribution | None  # the generator's own: sent after it was scheduled
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    cached_ratio: float  # of prompt tokens
    requests_per_second: float
    output_tokens_per_second: float


def summarise(load: LoadResult) -> ServingSummary:
    """Reduce the records of a run."""
    done = [record for record in load.records if record.error is None]
    duration = max((record.end for record in load.records), default=0.0)
    prompt_tokens = sum(record.prompt_tokens for record in done)
    cached_tokens = sum(record.cached_tokens for record in done)
    output_tokens = sum(record.output_tokens for record in done)
    return ServingSummary(
        requests=len(load.records),
        failed=len(load.records) - len(done),
        unsent=load.unsent,
        duration=duration,
        ttft=Distribution.of(
            [r.first_token - r.scheduled for r in done if r.first_token is not None]
        ),
        tpot=Distribution.of([tpot for r in done if (tpot := _tpot(r)) is not None]),
        jct=Distribution.of([r.end - r.scheduled for r in done]),
        lateness=Distribution.of([r.sent - r.scheduled for r in load.records]),
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        output_tokens=output_tokens,
        cached_ratio=_ratio(cached_tokens, prompt_tokens),
        requests_per_second=_ratio(len(done), duration),
        output_tokens_per_second=_ratio(output_tokens, duration),
    )


def _tpot(record: RequestRecord) -> float | None:
    if record.first_token is None or record.output_tokens < 2:
        return None
    return (record.chunk_times[-1] - record.first_token) / (record.output_tokens - 1)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


class _Report(msgspec.Struct, frozen=True):
    """One result file."""

    command: tuple[str, ...]
    environment: Environment
    config: msgspec.Struct
    result: msgspec.Struct


def write_json(destination: str, config: msgspec.Struct, result: msgspec.Struct) -> None:
    """Write a result with its settings and its environment; "-" is standard output."""
    report = _Report(("memserve", *sys.argv[1:]), capture_environment(), config, result)
    text = msgspec.json.format(msgspec.json.encode(report), indent=2)
    if destination == STDOUT:
        sys.stdout.write(text.decode() + "\n")
        return
    path = Path(destination)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text + b"\n")


def serving_table(columns: Sequence[tuple[str, ServingSummary]]) -> Table:
    """Runs side by side."""
    table = Table()
    table.add_column("")
    for name, _ in columns:
        table.add_column(name, justify="right")
    for rows in zip(*(_rows(summary) for _, summary in columns), strict=True):
        table.add_row(rows[0][0], *(cell for _, cell in rows))
    return table


def _rows(summary: ServingSummary) -> list[tuple[str, str]]:
    """Label and cell of each line of one column."""
    rows = [
        ("requests (failed)", f"{summary.requests} ({summary.failed})"),
        ("duration s", f"{summary.duration:.1f}"),
    ]
    for label, figure, scale in (
        ("TTFT s", summary.ttft, 1.0),
        ("TPOT ms", summary.tpot, 1000.0),
        ("JCT s", summary.jct, 1.0),
        ("sent late ms", summary.lateness, 1000.0),
    ):
        cells = ["-"] * 4
        if figure is not None:
            values = (figure.mean, figure.p50, figure.p90, figure.p99)
            cells = [f"{value * scale:.4g}" for value in values]
        names = ("mean", "P50", "P90", "P99")
        rows += [(f"{label} {name}", cell) for name, cell in zip(names, cells, strict=True)]
    rows += [
        ("cached prompt tokens", f"{summary.cached_ratio:.1%}"),
        ("output tokens/s", f"{summary.output_tokens_per_second:.4g}"),
    ]
    return rows
