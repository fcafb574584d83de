"""Summaries of load runs, as tables and as JSON."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console, RenderableType
from rich.table import Table

from memserve.bench.environment import Environment, capture_environment
from memserve.bench.loadgen import LoadResult, RequestRecord
from memserve.bench.openai_client import Answer

STDOUT = "-"


class Distribution(msgspec.Struct, frozen=True):
    """Mean and percentiles (linear interpolation) of one figure."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Distribution | None:
        """Return the distribution of values; None without values."""
        if not values:
            return None
        p50, p90, p99 = np.percentile(values, [50, 90, 99])
        return cls(len(values), float(np.mean(values)), float(p50), float(p90), float(p99))


class Slo(msgspec.Struct, frozen=True):
    """Upper limits of a good request's TTFT and TPOT in seconds. None: no limit."""

    ttft: float | None = None
    tpot: float | None = None

    def __bool__(self) -> bool:
        return self.ttft is not None or self.tpot is not None

    def kept(self, record: RequestRecord) -> bool:
        if record.error is not None or record.first_token is None:
            return False
        if self.ttft is not None and record.first_token - record.scheduled > self.ttft:
            return False
        per_token = tpot(record)
        return self.tpot is None or per_token is None or per_token <= self.tpot


class ServingSummary(msgspec.Struct, frozen=True):
    """Summary of a load run; times in seconds. Failed requests count in `failed` only.

    Cached tokens are prompt tokens that the computing instance had. Moved and avoided KV is known
    from servers that send `usage.memserve`.
    """

    requests: int
    failed: int
    unsent: int  # turns of a session behind a failed one
    duration: float  # from the start of the run to the last answer
    ttft: Distribution | None  # from the schedule to the first token
    tpot: Distribution | None  # between tokens after the first, mean of each request
    jct: Distribution | None  # from the schedule to the last byte
    lateness: Distribution | None  # of the generator: from the schedule to sending
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    cached_ratio: float  # share of prompt tokens
    requests_per_second: float
    output_tokens_per_second: float
    inter_token: Distribution | None = None  # between chunks with tokens, of all requests
    computed_tokens: int = 0  # prompt tokens that were not cached
    moved_blocks: int | None = None  # handed over or fetched; None: not known
    moved_bytes: int | None = None  # handed over
    avoided_bytes: int | None = None  # not handed over, since the decode instance had them
    slo: Slo = Slo()
    good_requests: int = 0  # within `slo`
    goodput: float = 0.0  # good requests per second


def summarise(load: LoadResult, slo: Slo = Slo()) -> ServingSummary:  # noqa: B008 - frozen
    """Summarise the records of a run."""
    done = [record for record in load.records if record.error is None]
    duration = max((record.end for record in load.records), default=0.0)
    prompt_tokens = sum(record.prompt_tokens for record in done)
    cached_tokens = sum(record.cached_tokens for record in done)
    output_tokens = sum(record.output_tokens for record in done)
    told = [record.figures for record in done if record.figures is not None]
    good = sum(map(slo.kept, load.records))
    return ServingSummary(
        requests=len(load.records),
        failed=len(load.records) - len(done),
        unsent=load.unsent,
        duration=duration,
        ttft=Distribution.of(
            [r.first_token - r.scheduled for r in done if r.first_token is not None]
        ),
        tpot=Distribution.of([value for r in done if (value := tpot(r)) is not None]),
        jct=Distribution.of([r.end - r.scheduled for r in done]),
        lateness=Distribution.of([r.sent - r.scheduled for r in load.records]),
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        output_tokens=output_tokens,
        cached_ratio=_ratio(cached_tokens, prompt_tokens),
        requests_per_second=_ratio(len(done), duration),
        output_tokens_per_second=_ratio(output_tokens, duration),
        inter_token=Distribution.of([gap for r in done for gap in inter_token_times(r)]),
        computed_tokens=prompt_tokens - cached_tokens,
        moved_blocks=sum(f.blocks_received + f.blocks_fetched for f in told) if told else None,
        moved_bytes=sum(f.bytes_received for f in told) if told else None,
        avoided_bytes=sum(f.bytes_avoided for f in told) if told else None,
        slo=slo,
        good_requests=good,
        goodput=_ratio(good, duration),
    )


def inter_token_times(record: RequestRecord) -> list[float]:
    """Return the seconds between the chunks of one answer."""
    return [after - before for before, after in itertools.pairwise(record.chunk_times)]


def tpot(record: RequestRecord | Answer) -> float | None:
    """Return the mean seconds per token behind the first; None for fewer than two tokens."""
    if record.first_token is None or record.output_tokens < 2:
        return None
    return (record.chunk_times[-1] - record.first_token) / (record.output_tokens - 1)


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.1f}"


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


class _Report(msgspec.Struct, frozen=True):
    """A result file, or one line of a file of several results."""

    command: tuple[str, ...]
    environment: Environment
    config: msgspec.Struct
    result: msgspec.Struct


def print_or_write(
    json: str | None, config: msgspec.Struct, result: msgspec.Struct, shown: RenderableType
) -> None:
    """Print a table of the result, or write it as JSON to the file `json`."""
    if json is None:
        Console().print(shown)
    else:
        write_json(json, config, result)


def write_json(destination: str, config: msgspec.Struct, result: msgspec.Struct) -> None:
    """Write a result with its settings and its environment; "-" is standard output."""
    report = _report(config, result)
    text = msgspec.json.format(msgspec.json.encode(report), indent=2)
    if destination == STDOUT:
        sys.stdout.write(text.decode() + "\n")
        return
    path = Path(destination)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text + b"\n")


def append_lines(path: Path, config: msgspec.Struct, results: Sequence[msgspec.Struct]) -> None:
    """Append a line of JSON for each result, each with its settings and environment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        for result in results:
            file.write(msgspec.json.encode(_report(config, result)) + b"\n")


def _report(config: msgspec.Struct, result: msgspec.Struct) -> _Report:
    program = Path(sys.argv[0])
    module = ("python", "-m", program.parent.name)  # `python -m evaluation`
    words = module if program.name == "__main__.py" else (program.name,)
    return _Report((*words, *sys.argv[1:]), capture_environment(), config, result)


def serving_table(columns: Sequence[tuple[str, ServingSummary]]) -> Table:
    """Return a table with a column for each run."""
    table = Table()
    table.add_column("")
    for name, _ in columns:
        table.add_column(name, justify="right")
    for rows in zip(*(_rows(summary) for _, summary in columns), strict=True):
        table.add_row(rows[0][0], *(cell for _, cell in rows))
    return table


def _rows(summary: ServingSummary) -> list[tuple[str, str]]:
    """Return label and cell of each row of one column."""
    rows = [
        ("requests (failed)", f"{summary.requests} ({summary.failed})"),
        ("duration s", f"{summary.duration:.1f}"),
    ]
    for label, figure, scale in (
        ("TTFT s", summary.ttft, 1.0),
        ("TPOT ms", summary.tpot, 1000.0),
        ("inter-token ms", summary.inter_token, 1000.0),
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
        ("prompt tokens computed", str(summary.computed_tokens)),
        ("MB handed over", _megabytes(summary.moved_bytes)),
        ("requests/s", f"{summary.requests_per_second:.4g}"),
        ("output tokens/s", f"{summary.output_tokens_per_second:.4g}"),
    ]
    if summary.slo:
        rows.append(("good requests/s", f"{summary.goodput:.4g}"))
    return rows
