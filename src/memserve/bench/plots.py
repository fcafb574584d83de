"""Plots as inline SVG, without a library: they take their colours from the page (`html`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 330, 210  # of the area that is plotted in, pixels
_LEFT, _RIGHT, _TOP, _BELOW = 56, 12, 30, 44
_LEGEND = 18  # pixels of a line
_TICKS = 5


@dataclass(frozen=True, slots=True)
class Point:
    """A value, and between what it may lie."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """One of a plot's lines; its colour goes by its place among them."""

    name: str
    points: tuple[Point, ...]
    steps: bool = False  # without marks, as of a distribution


def line_plot(title: str, x_label: str, y_label: str, lines: Sequence[Line]) -> str:
    """An SVG element: both axes linear, the vertical one from 0. Empty without points."""
    points = [point for line in lines for point in line.points]
    if not points:
        return ""
    highest = max(max(p.y, p.high or p.y) for p in points)
    axes = _Axes(
        min(p.x for p in points), max(p.x for p in points), 0.0, highest if highest > 0 else 1.0
    )
    return _plot(title, x_label, y_label, axes, lines)


def distribution_plot(
    title: str, x_label: str, series: Sequence[tuple[str, Sequence[float]]]
) -> str:
    """Cumulative distributions: the share of values (y) that are at most x."""
    lines = []
    for name, values in series:
        ordered = sorted(values)
        shares = (Point(x, (i + 1) / len(ordered)) for i, x in enumerate(ordered))
        lines.append(Line(name, tuple(shares), steps=True))
    return line_plot(title, x_label, "share", lines)


@dataclass(frozen=True, slots=True)
class _Axes:
    left: float
    right: float
    bottom: float
    top: float

    def x(self, value: float) -> float:
        width = self.right - self.left
        return _LEFT + (_WIDTH * (value - self.left) / width if width else _WIDTH / 2)

    def y(self, value: float) -> float:
        part = (value - self.bottom) / (self.top - self.bottom)
        return _TOP + _HEIGHT * (1 - part)


def _plot(title: str, x_label: str, y_label: str, axes: _Axes, lines: Sequence[Line]) -> str:
    width = _LEFT + _WIDTH + _RIGHT
    below = _TOP + _HEIGHT + _BELOW
    height = below + _LEGEND * len(lines)
    middle = _LEFT + _WIDTH / 2
    parts = [
        f'<svg class="plot" role="img" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}"><title>{escape(title)}</title>',
        f'<text x="{middle}" y="18" class="name">{escape(title)}</text>',
        f'<text x="{middle}" y="{below - 8}" class="axis">{escape(x_label)}</text>',
        f'<text transform="translate(12 {_TOP + _HEIGHT / 2}) rotate(-90)" class="axis">'
        f"{escape(y_label)}</text>",
        *_grid(axes),
    ]
    for number, line in enumerate(lines):
        parts += [
            f'<g class="line s{number % COLOURS}">',
            *_drawn(axes, line),
            f'<path d="M{_LEFT} {below + _LEGEND * number + 4}h18"/>',
            f'<text x="{_LEFT + 26}" y="{below + _LEGEND * number + 8}">{escape(line.name)}</text>',
            "</g>",
        ]
    return "".join((*parts, "</svg>"))


def _grid(axes: _Axes) -> Iterator[str]:
    bottom = _TOP + _HEIGHT
    for value in ticks(axes.bottom, axes.top):
        y = axes.y(value)
        yield f'<path class="grid" d="M{_LEFT} {y:.1f}h{_WIDTH}"/>'
        yield f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" class="left">{value:g}</text>'
    for value in ticks(axes.left, axes.right):
        yield f'<text x="{axes.x(value):.1f}" y="{bottom + 16}" class="axis">{value:g}</text>'
    yield f'<path class="frame" d="M{_LEFT} {_TOP}V{bottom}h{_WIDTH}"/>'


def _drawn(axes: _Axes, line: Line) -> Iterator[str]:
    at = [(axes.x(p.x), axes.y(p.y)) for p in line.points]
    yield f'<path d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in at)}"/>'
    if line.steps:
        return
    for point, (x, y) in zip(line.points, at, strict=True):
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'
        if point.low is not None and point.high is not None:
            low, high = axes.y(max(axes.bottom, point.low)), axes.y(point.high)
            yield f'<path class="range" d="M{x:.1f} {low:.1f}V{high:.1f}"/>'


def ticks(low: float, high: float) -> list[float]:
    """A handful of round numbers from `low` to `high`."""
    if high <= low:
        return [low]
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * d for d in (1, 2, 5, 10) if power * d >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


COLOURS = 6  # classes s0, s1, ... that a page must give colours to
