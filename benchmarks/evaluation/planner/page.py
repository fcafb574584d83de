"""What the comparison says: a table of every split, and a plot of the day."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table

from evaluation.planner.run import (
    BUCKET_SECONDS,
    LOADS,
    PLANNER,
    Cell,
    Load,
    PlannerEvalResult,
)
from memserve.bench.plots import Line, Plot, Point, draw
from memserve.errors import ConfigError

_TITLES: dict[Load, str] = {
    "conversations": "conversations alone",
    "agents": "agents alone",
    "day": "a day of both",
}
_SMOOTHED = 4  # buckets of a point


def planner_tables(result: PlannerEvalResult) -> RenderableType:
    """A table for each load, the best split first, and the planner beside it."""
    parts: list[RenderableType] = []
    for load in LOADS:
        cells = result.of(load)
        if cells:
            parts += [_table(result.instances, load, cells), verdict(load, cells)]
    if result.refused:
        parts.append(f"{result.refused} conversations fit no instance's HBM, and were left out.")
    return Group(*parts)


def _table(instances: int, load: Load, cells: Sequence[Cell]) -> Table:
    table = Table(title=f"{instances} instances, {_TITLES[load]}: requests inside their objectives")
    table.add_column("split")
    for number, phase in enumerate(cells[0].phases):
        table.add_column(f"{number + 1}: {phase.kind}", justify="right")
    for name in ("mean of phases", "requests/s", "role changes"):
        table.add_column(name, justify="right")
    for cell in sorted(cells, key=lambda one: -one.share):
        table.add_row(
            cell.name,
            *(f"{one.share:.1%}" for one in cell.phases),
            f"{cell.share:.1%}",
            f"{cell.goodput:.1f}",
            str(_changes(cell)),
        )
    return table


def verdict(load: Load, cells: Sequence[Cell]) -> str:
    """The planner against the best fixed split, by both figures."""
    ours = next((one for one in cells if one.prefill == PLANNER), None)
    fixed = [one for one in cells if one.prefill != PLANNER]
    if ours is None or not fixed:
        return ""
    by_share = max(fixed, key=lambda one: one.share)
    by_count = max(fixed, key=lambda one: one.goodput)
    return (
        f"{_TITLES[load]}: planner {_more(ours.share, by_share.share)} than {by_share.name} by the "
        f"mean of phases, {_more(ours.goodput, by_count.goodput)} than {by_count.name} by "
        "requests per second."
    )


def _more(ours: float, theirs: float) -> str:
    if not theirs:
        return "more"
    change = ours / theirs - 1
    return f"{abs(change):.1%} {'more' if change >= 0 else 'less'}"


def _changes(cell: Cell) -> int:
    pairs = zip(cell.shapes, cell.shapes[1:], strict=False)
    return sum(before.split.moves_to(after.split) for before, after in pairs)


def planner_plot(result: PlannerEvalResult) -> str:
    """The day as SVG: what is served over time, and the planner's prefill and decode members.
    Raises ConfigError without a day, or matplotlib."""
    cells = result.of("day")
    ours = next((one for one in cells if one.prefill == PLANNER), None)
    fixed = sorted((one for one in cells if one.prefill != PLANNER), key=lambda one: -one.share)
    if ours is None or not fixed:
        raise ConfigError("no day with the planner and a fixed split to draw")
    ends = len(ours.buckets) * BUCKET_SECONDS
    served = Plot(
        f"{result.instances} instances, a day of both",
        "seconds",
        "share inside objectives",
        tuple(_served_line(one) for one in (ours, *fixed[:2])),
    )
    members = Plot(
        "Roles that the planner chose",
        "seconds",
        "members",
        tuple(_role_line(ours, role, ends) for role in ("prefill", "decode", "colocated")),
    )
    return draw(served, members)


def _served_line(cell: Cell) -> Line:
    points = []
    for at in range(0, len(cell.buckets), _SMOOTHED):
        known = [one for one in cell.buckets[at : at + _SMOOTHED] if one >= 0]
        if known:
            points.append(Point(at * BUCKET_SECONDS, sum(known) / len(known)))
    return Line(cell.name, tuple(points), marks=False)


def _role_line(cell: Cell, role: str, ends: float) -> Line:
    points: list[Point] = []
    for shape in cell.shapes:
        count = {"prefill": shape.split.prefill, "decode": shape.split.decode}.get(
            role, shape.split.colocated
        )
        if points:
            points.append(Point(shape.at, points[-1].y))
        points.append(Point(shape.at, count))
    points.append(Point(ends, points[-1].y))
    return Line(role, tuple(points), marks=False)


def write_planner_plot(path: Path, result: PlannerEvalResult) -> None:
    path.write_text(planner_plot(result), encoding="utf-8")
