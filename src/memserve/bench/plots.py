"""Plots as SVG documents, drawn by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from memserve.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE = (4.2, 3.2)  # inches of one plot
_SQUARE = (6.0, 6.0)
_BAND = 0.1  # relative, on both sides of a scatter plot's diagonal
# Colours that red-green colour-blind readers can tell apart. Equal plots give equal files.
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "memserve",
    "text.parse_math": False,  # names may have a dollar in them
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.grid": True,
    "grid.color": "#d9dde3",
    "legend.fontsize": 8,
}
COLOURS = ("#0b62a8", "#c4570c", "#1d7f4e", "#8a3fa0", "#8f6a00", "#c2255c")


@dataclass(frozen=True, slots=True)
class Point:
    """A point, and the interval of its y value, if known."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """One of a plot's lines. Its position among the lines decides its colour."""

    name: str
    points: tuple[Point, ...]
    marks: bool = True  # at each point, with its interval


@dataclass(frozen=True, slots=True)
class Plot:
    """Lines over linear axes, the vertical one from 0."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True)
class Series:
    """Points of a scatter plot, all > 0."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def check_matplotlib() -> None:
    """Raise ConfigError if no plot can be drawn. Call it before the measurement."""
    if find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib: pip install 'memserve[bench]'")


def distribution(title: str, unit: str, series: Sequence[tuple[str, Sequence[float]]]) -> Plot:
    """Return a plot of cumulative distributions: y is the share of values that are at most x."""
    lines = []
    for name, values in series:
        shares = np.arange(1, len(values) + 1) / max(1, len(values))
        points = (Point(x, float(y)) for x, y in zip(sorted(values), shares, strict=True))
        lines.append(Line(name, tuple(points), marks=False))
    return Plot(title, unit, "share", tuple(lines))


def draw(*plots: Plot) -> str:
    """Return an SVG document with the plots below each other. Raises ConfigError without
    matplotlib."""
    check_matplotlib()
    with _figure((_SIZE[0], _SIZE[1] * len(plots))) as figure:
        for axes, plot in zip(figure.subplots(len(plots), squeeze=False)[:, 0], plots, strict=True):
            _draw_lines(axes, plot)
        return _svg(figure)


def draw_scatter(title: str, x_label: str, y_label: str, series: Sequence[Series]) -> str:
    """Return a scatter plot as SVG: logarithmic axes, the diagonal, and a band of 10 % around it.
    Raises ConfigError without matplotlib."""
    check_matplotlib()
    from matplotlib.ticker import LogLocator, NullLocator

    values = [value for one in series for value in (*one.x, *one.y)]
    ends = np.array([min(values) / 1.5, max(values) * 1.5])
    with _figure(_SQUARE) as figure:
        axes = figure.subplots()
        for one, colour in zip(series, COLOURS, strict=False):
            axes.scatter(one.x, one.y, color=colour, alpha=0.7, label=one.name, zorder=3)
        axes.plot(ends, ends, color="#666666", linewidth=1)
        axes.fill_between(ends, ends * (1 - _BAND), ends * (1 + _BAND), color="#99aaaa", alpha=0.3)
        axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_locator(NullLocator())
        axes.set(title=title, xlabel=x_label, ylabel=y_label)
        axes.legend()
        return _svg(figure)


@contextmanager
def _figure(size: tuple[float, float]) -> Iterator[Figure]:
    """Yield an empty figure; the style of all plots applies until the context ends."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        yield Figure(figsize=size, layout="constrained")


def _draw_lines(axes: Axes, plot: Plot) -> None:
    for number, line in enumerate(plot.lines):
        colour = COLOURS[number % len(COLOURS)]
        x, y = [p.x for p in line.points], [p.y for p in line.points]
        marker = "o" if line.marks else ""
        axes.plot(x, y, color=colour, marker=marker, markersize=4, label=line.name)
        for p in line.points:
            if line.marks and p.low is not None and p.high is not None:
                axes.vlines(p.x, max(0.0, p.low), p.high, color=colour, linewidth=1)
    axes.set(title=plot.title, xlabel=plot.x_label, ylabel=plot.y_label)
    axes.set_ylim(bottom=0)
    if plot.lines:
        axes.legend()


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
