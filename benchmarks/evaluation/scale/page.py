"""Tables of `python -m evaluation scale`."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table

from evaluation.scale.gateway import Answer
from evaluation.scale.run import ScaleResult


def scale_tables(result: ScaleResult) -> Group:
    """Return the tables: gateways, and decisions."""
    return Group(_gateways(result), _asked(result), _decisions(result))


def _gateways(result: ScaleResult) -> Table:
    names = (
        "members",
        "gateway",
        "ready s",
        "caches known s",
        "CPU s until then",
        "idle: cores",
        "MiB",
        "files",
        "CPU us/request",
        "CPU us/batch of events",
        "batches/s",
        "lag",
    )
    table = _table("A gateway's start, and what it takes to keep up", names)
    for one in result.gateways:
        ready = _number(one.ready, 1)
        if one.ready is None:
            ready = f"never ({one.most_ready} at most)"
        table.add_row(
            str(one.members),
            one.gateway,
            ready,
            _number(one.synchronised, 1),
            _number(one.start_cpu, 1),
            _number(one.idle_cpu, 3),
            f"{one.resident_bytes / 2**20:.0f}",
            str(one.descriptors),
            _number(one.request_cpu, 0, 1e6),
            _number(one.event_cpu, 0, 1e6),
            _number(one.events_per_second, 0),
            "" if one.lag is None else str(one.lag),
        )
    return table


def _asked(result: ScaleResult) -> Table:
    names = (
        "members",
        "gateway",
        "/health ms P50",
        "P99",
        "/metrics MB",
        "ms",
        "CPU ms",
        "/cluster KB",
        "ms",
        "`cluster list` s",
    )
    table = _table("Questions to an idle gateway", names)
    for one in result.gateways:
        if one.ready is None:
            continue
        table.add_row(
            str(one.members),
            one.gateway,
            _number(one.health_p50, 1, 1e3),
            _number(one.health_p99, 1, 1e3),
            *_answer(one.metrics, 1e6),
            *_answer(one.cluster, 1e3)[:2],
            _number(one.list_seconds, 1),
        )
    return table


def _answer(answer: Answer | None, unit: float) -> tuple[str, str, str]:
    if answer is None:
        return "", "", ""
    size = f"{answer.num_bytes / unit:.1f}"
    return size, _number(answer.seconds, 0, 1e3), _number(answer.cpu_seconds, 0, 1e3)


def _decisions(result: ScaleResult) -> Table:
    names = (
        "instances",
        "layout",
        "plans",
        "decide us P50",
        "P99",
        "CPU us P50",
        "match",
        "expect",
    )
    table = _table("Decisions (prompt-tree, prompts of 4,096 tokens)", names)
    for one in result.decisions:
        figures = one.decide.p50, one.decide.p99, one.cpu.p50, one.match.p50, one.expect.p50
        shown = (f"{figure:.0f}" for figure in figures)
        table.add_row(str(one.instances), one.layout, str(one.candidates), *shown)
    return table


def _table(title: str, names: tuple[str, ...]) -> Table:
    table = Table(title=title)
    for number, name in enumerate(names):
        table.add_column(name, justify="left" if number == 1 else "right")
    return table


def _number(value: float | None, digits: int, times: float = 1.0) -> str:
    return "" if value is None else f"{value * times:.{digits}f}"
