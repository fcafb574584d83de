"""What a soak says: tables for people, and plots over time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Group
from rich.table import Table

from evaluation.soak.run import ProcessRecord, SoakReport, SoakResult
from evaluation.soak.trend import Trend
from evaluation.soak.vitals import Vitals
from memserve.bench.pages import render_page, write_page
from memserve.bench.plots import COLOURS, Line, Plot, Point, check_matplotlib, draw
from memserve.errors import ConfigError

_MB = 1e6
_POINTS = 600  # of a line: there are no more pixels
# What is plotted over time.
_PLOTTED: tuple[tuple[str, str, Callable[[Vitals], float]], ...] = (
    ("Resident memory", "MB", lambda v: v.rss / _MB),
    ("Memory of its own (anonymous)", "MB", lambda v: v.private / _MB),
    ("Descriptors", "", lambda v: v.fds),
    ("Threads", "", lambda v: v.threads),
    ("Shared memory", "MB", lambda v: v.shm / _MB),
)


def soak_tables(result: SoakResult) -> Group:
    """As the command prints them."""
    verdict = "sound" if result.sound else "NOT sound"
    parts: list[Table | str] = [
        f"{verdict} after {result.minutes:.1f} minutes"
        + (f"; cut short: {result.cut_short}" if result.cut_short else ""),
        kinds_table(result),
        processes_table(result),
        quiet_table(result),
        *result.troubles,
    ]
    return Group(*parts)


def kinds_table(result: SoakResult) -> Table:
    """What became of requests, by kind."""
    shown = Table(title="Requests")
    names = ("requests", "answered", "left", "refused", "failed", "unanswered", "wrong")
    shown.add_column("kind")
    for name in names:
        shown.add_column(name, justify="right")
    rows = [
        (k.kind, k.requests, k.answered, k.left, k.refused, k.failed, k.unanswered, k.wrong)
        for k in result.kinds
    ]
    for kind, *counts in rows:
        shown.add_row(str(kind), *map(str, counts))
    sums = [sum(int(row[place]) for row in rows) for place in range(1, len(names) + 1)]
    shown.add_row("all", *map(str, sums))
    return shown


def processes_table(result: SoakResult) -> Table:
    """First and last quarter behind the warm-up, and the slope, of every process."""
    shown = Table(title="Processes: medians of the first and the last quarter behind the warm-up")
    shown.add_column("process")
    for name in ("RSS MB", "MB/h", "own MB", "MB/h", "fds", "threads", "shm MB"):
        shown.add_column(name, justify="right")
    shown.add_column("verdict")
    for record in result.processes:
        rss, own = record.trends["rss"], record.trends["private"]
        fds, threads, shm = (record.trends[name] for name in ("fds", "threads", "shm"))
        shown.add_row(
            f"{record.life.name} ({record.life.pid})",
            _from_to(rss, _MB),
            f"{rss.per_hour / _MB:+.1f}",
            _from_to(own, _MB),
            f"{own.per_hour / _MB:+.1f}",
            _from_to(fds),
            _from_to(threads),
            _from_to(shm, _MB),
            verdict(record),
        )
    return shown


def quiet_table(result: SoakResult) -> Table:
    """The idle gaps together, by instance."""
    shown = Table(title="Instances when nothing ran: blocks that nobody should have had")
    shown.add_column("instance")
    for name in ("looks", "active", "detached", "pinned", "not accounted for"):
        shown.add_column(name, justify="right")
    for instance in dict.fromkeys(look.instance for look in result.quiet):
        own = [look for look in result.quiet if look.instance == instance]
        shown.add_row(
            instance,
            str(len(own)),
            str(max(look.active for look in own)),
            str(max(look.detached for look in own)),
            str(max(look.pinned for look in own)),
            str(sum(not look.whole for look in own)),
        )
    return shown


def verdict(record: ProcessRecord) -> str:
    """`flat`, what grows, or that it was there for too short a time."""
    if record.flat is None:
        return "too short"
    grown = [name for name, trend in record.trends.items() if not trend.flat]
    return f"grows: {', '.join(grown)}" if grown else "flat"


def check_plot(path: Path) -> None:
    """Raises ConfigError for a plot that cannot be made, before anything is measured."""
    if path.suffix not in (".html", ".svg"):
        raise ConfigError(f"--plot {path}: an .html or .svg file is written")
    check_matplotlib()


def write_plot(path: Path, report: SoakReport) -> None:
    """A page (`.html`), or the plots below each other (`.svg`)."""
    svg = path.suffix == ".svg"
    write_page(path, draw(*over_time(report.result)) if svg else soak_page(report))


def soak_page(report: SoakReport) -> str:
    """A whole document."""
    return render_page(
        "soak.html",
        report.environment,
        "evaluation",
        config=report.config,
        result=report.result,
        over_time=list(over_time(report.result)),
        tables=soak_tables(report.result),
    )


def over_time(result: SoakResult) -> Iterator[Plot]:
    """A plot of each figure, a line for each process; the longest lives where there are many."""
    longest = sorted(result.processes, key=lambda record: -len(record.samples))[: len(COLOURS)]
    shown = [record for record in result.processes if record in longest]
    for title, unit, value in _PLOTTED:
        lines = tuple(_line(record, value) for record in shown)
        yield Plot(title, "minutes", unit, lines)


def _line(record: ProcessRecord, value: Callable[[Vitals], float]) -> Line:
    step = -(-len(record.samples) // _POINTS)
    points = tuple(Point(s.seconds / 60, value(s.vitals)) for s in record.samples[::step])
    return Line(record.life.name, points, marks=False)


def _from_to(trend: Trend, scale: float = 1.0) -> str:
    first, last = (f"{value / scale:.0f}" for value in (trend.first, trend.last))
    return first if first == last else f"{first} to {last}"
