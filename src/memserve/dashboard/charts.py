"""Options of charts (ECharts), from the history's points. Knows no NiceGUI."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from memserve.types import Role
from memserve.watch.history import Point, policies_of
from memserve.watch.latency import GroupLatency, LatencyKind, Percentiles

MAX_SHOWN = 240  # points of a chart: each update sends all of them
COLOURS = {
    "computed": "#d98e04",
    "in HBM": "#4a8fe0",
    "in DRAM": "#9c4dcc",
    "fetched": "#64a844",
    "handed over": "#0f9d9d",
    "p50": "#2274c9",
    "p90": "#d98e04",
    "p99": "#c9365a",
    "evicted": "#c9365a",
    "from DRAM": "#9c4dcc",
    # Policies.
    "prompt-tree": "#2274c9",
    "session": "#d98e04",
    "least-load": "#64a844",
    "round-robin": "#c9365a",
}
_OTHER = "#9c4dcc"  # a policy that is not known here
_IN_SIGHT = 3.0  # an objective so many times above all values is told, and not drawn


def _of_style(name: str) -> dict[str, str]:
    """Return the property `color` as dashboard.css has it under `name` in the theme that is shown:
    no one colour can be read on light and on dark. NiceGUI computes what begins with a colon in
    the browser, with each update."""
    return {":color": f"getComputedStyle(document.body).getPropertyValue('{name}')"}


_INK = _of_style("--soft")
_ALARM = _of_style("--bad")

Options = dict[str, Any]
Value = Callable[[Point], float | None]


def thin(points: Sequence[Point], most: int = MAX_SHOWN) -> list[Point]:
    """Return at most `most` points, evenly, with the last one; the failovers of those left out are
    in the next one shown."""
    step = -(-len(points) // most) if points else 1
    shown, failovers = [], 0
    for left, point in zip(range(len(points) - 1, -1, -1), points, strict=True):
        failovers += point.failovers
        if left % step == 0:
            shown.append((point, failovers))
            failovers = 0
    return [msgspec.structs.replace(point, failovers=count) for point, count in shown]


def lines(
    title: str,
    points: Sequence[Point],
    values: dict[str, Value],
    epoch: float,
    *,
    unit: str = "",
    stacked: bool = False,
    marks: bool = False,
    objective: float | None = None,
) -> Options:
    """Return a chart with a line for each of `values`. `epoch`: unix time at the watcher's 0.
    `marks`: a vertical line at each failover. `objective`: where a horizontal one is drawn."""
    shown = thin(points)
    series: list[Options] = [
        {
            "name": name,
            "type": "line",
            "showSymbol": False,
            "connectNulls": False,
            "color": COLOURS.get(name, _OTHER),
            "lineStyle": {"width": 1.6},
            "data": [[round((epoch + p.at) * 1000), _short(value(p))] for p in shown],
            **({"stack": "all", "areaStyle": {"opacity": 0.45}} if stacked else {}),
        }
        for name, value in values.items()
    ]
    if marks and series:
        series[0]["markLine"] = _marks(shown, epoch, objective)
    largest = max((v for p in shown for of in values.values() if (v := of(p))), default=0.0)
    near = objective is not None and objective <= _IN_SIGHT * largest
    if objective is not None:
        title += f", objective {objective:g}{unit}"
    return {
        "title": {"text": title, "left": 4, "top": 0, "textStyle": {"fontSize": 13, **_INK}},
        "animation": False,
        "grid": {"left": 56, "right": 24, "top": 52, "bottom": 28},
        "legend": {"type": "scroll", "top": 20, "left": 0, "textStyle": {**_INK}},
        "tooltip": {"trigger": "axis"},
        "xAxis": {"type": "time", "axisLabel": {**_INK, "hideOverlap": True}},
        "yAxis": {
            "type": "value",
            "min": 0,
            # None, not left out: the browser would keep the last one.
            "max": max(largest, objective) * 1.05 if near and objective is not None else None,
            "axisLabel": {**_INK, "formatter": f"{{value}}{unit}"},
            "splitLine": {"lineStyle": {"opacity": 0.25}},
        },
        "series": series,
    }


_CACHED: dict[str, Value] = {
    "in HBM": lambda p: p.in_hbm,
    "in DRAM": lambda p: p.from_dram,
    "fetched": lambda p: p.fetched,
}


def sources(points: Sequence[Point], epoch: float) -> Options:
    """Return the chart of prompt tokens by where their KV came from."""
    values = {
        "computed": lambda p: p.computed,
        **_CACHED,
        "handed over": lambda p: p.received,
    }
    return lines("Prompt tokens per second, by source", points, values, epoch, stacked=True)


def hits(points: Sequence[Point], epoch: float) -> Options:
    """Return the chart of the hit ratio, by where the KV was."""

    def share(of: Value) -> Value:
        def value(point: Point) -> float | None:
            here, part = point.cached + point.computed, of(point)
            return 100 * part / here if here and part is not None else None

        return value

    values = {name: share(of) for name, of in _CACHED.items()}
    chart = lines("Hit ratio, by source", points, values, epoch, unit=" %", stacked=True)
    chart["yAxis"]["max"] = 100
    return chart


def evictions(points: Sequence[Point], epoch: float) -> Options:
    """Return the chart of blocks that were dropped, and that came back from DRAM."""
    values: dict[str, Value] = {"evicted": lambda p: p.evicted, "from DRAM": lambda p: p.swapped_in}
    return lines("Blocks per second", points, values, epoch)


class Objectives(NamedTuple):
    """Seconds that latencies are to keep; None: none is drawn."""

    ttft: float | None = None
    tpot: float | None = None

    def of(self, kind: LatencyKind) -> float | None:
        return {"TTFT": self.ttft, "TPOT": self.tpot}.get(kind.name)


NO_OBJECTIVES = Objectives()


PERCENTILES: dict[str, Callable[[Percentiles], float | None]] = {
    "p50": lambda found: found.p50,
    "p90": lambda found: found.p90,
    "p99": lambda found: found.p99,
}


def latency(
    kind: LatencyKind,
    points: Sequence[Point],
    role: Role,
    epoch: float,
    objectives: Objectives = NO_OBJECTIVES,
) -> Options:
    """Return the chart of one latency at one role's members, in milliseconds, with failovers as
    marks."""

    values = {
        name: _milliseconds(lambda p: p.latencies.get(role), kind, pick)
        for name, pick in PERCENTILES.items()
    }
    return _latency(kind, points, values, epoch, objectives)


def latency_by_policy(
    kind: LatencyKind,
    points: Sequence[Point],
    percentile: str,
    epoch: float,
    objectives: Objectives = NO_OBJECTIVES,
) -> Options:
    """Return the chart of one latency at the gateways, with a line for each policy. `percentile`:
    one of PERCENTILES."""
    values = {
        name: _milliseconds(_at_policy(name), kind, PERCENTILES[percentile])
        for name in policies_of(points)
    }
    return _latency(kind, points, values, epoch, objectives)


def _at_policy(name: str) -> Callable[[Point], GroupLatency | None]:
    return lambda point: point.policies.get(name)


def _milliseconds(
    group: Callable[[Point], GroupLatency | None],
    kind: LatencyKind,
    pick: Callable[[Percentiles], float | None],
) -> Value:
    def value(point: Point) -> float | None:
        told = group(point)
        seconds = None if told is None else pick(kind.of(told))
        return None if seconds is None else 1000 * seconds

    return value


def _latency(
    kind: LatencyKind,
    points: Sequence[Point],
    values: dict[str, Value],
    epoch: float,
    objectives: Objectives,
) -> Options:
    seconds = objectives.of(kind)
    wanted = None if seconds is None else 1000 * seconds
    return lines(kind.title, points, values, epoch, unit=" ms", marks=True, objective=wanted)


def _marks(points: Sequence[Point], epoch: float, objective: float | None) -> Options:
    data: list[Options] = [
        {
            "xAxis": round((epoch + point.at) * 1000),
            "label": {"formatter": f"{point.failovers} failover", **_ALARM},
        }
        for point in points
        if point.failovers
    ]
    if objective is not None:
        words = {"formatter": "objective", **_INK}
        data.append(
            {
                "yAxis": objective,
                "label": {**words, "position": "insideStartTop"},
                "lineStyle": {**_INK, "type": "dashed"},
            }
        )
    return {
        "symbol": "none",
        "silent": True,
        "lineStyle": {**_ALARM, "type": "solid", "width": 1.5},
        "data": data,
    }


def _short(value: float | None) -> float | None:
    """Return a value with three digits or so: a chart shows no more, and each costs bytes."""
    return None if value is None else float(f"{value:.4g}")
