"""A scatter plot of predictions against measurements, as SVG: logarithmic axes, the diagonal,
and a band of 10 % around it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

_SIZE = 480  # of the square that is plotted in, pixels
_LEFT, _TOP, _BELOW = 70, 40, 60
_COLOURS = ("#1f6fb4", "#d9822b", "#2d8659")
_BAND = 0.1


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one model, all > 0."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def scatter_svg(title: str, x_label: str, y_label: str, series: Sequence[Series]) -> str:
    """An SVG document."""
    values = [value for one in series for value in (*one.x, *one.y)]
    low = math.floor(math.log10(min(values)) * 2) / 2
    high = max(low + 0.5, math.ceil(math.log10(max(values)) * 2) / 2)

    def place(value: float) -> float:
        return (math.log10(value) - low) / (high - low) * _SIZE

    width, height = _LEFT + _SIZE + 20, _TOP + _SIZE + _BELOW
    middle, bottom = _LEFT + _SIZE / 2, _TOP + _SIZE
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<clipPath id="frame"><rect x="{_LEFT}" y="{_TOP}" width="{_SIZE}" height="{_SIZE}"/>'
        "</clipPath>",
        f'<text x="{middle}" y="22" text-anchor="middle" font-size="14">{escape(title)}</text>',
        f'<text x="{middle}" y="{height - 16}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text transform="translate(16 {_TOP + _SIZE / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>',
    ]
    for value in _ticks(low, high):
        at = place(value)
        x, y = _LEFT + at, bottom - at
        parts += [
            f'<path d="M{x:.1f} {_TOP}V{bottom}M{_LEFT} {y:.1f}h{_SIZE}" stroke="#e4e4e4"/>',
            f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{value:g}</text>',
            f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>',
        ]
    parts.append(_diagonal(bottom, low, high))
    for number, one in enumerate(series):
        colour = _COLOURS[number % len(_COLOURS)]
        for x_value, y_value in zip(one.x, one.y, strict=True):
            x, y = _LEFT + place(x_value), bottom - place(y_value)
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}" fill-opacity="0.7"/>'
            )
        y = _TOP + 20 + 18 * number
        parts += [
            f'<circle cx="{_LEFT + 16}" cy="{y - 4}" r="4" fill="{colour}"/>',
            f'<text x="{_LEFT + 28}" y="{y}">{escape(one.name)}</text>',
        ]
    parts.append(
        f'<rect x="{_LEFT}" y="{_TOP}" width="{_SIZE}" height="{_SIZE}" fill="none" '
        'stroke="#888"/></svg>'
    )
    return "\n".join(parts) + "\n"


def _diagonal(bottom: float, low: float, high: float) -> str:
    up, down = (math.log10(factor) / (high - low) * _SIZE for factor in (1 + _BAND, 1 - _BAND))
    right, top = _LEFT + _SIZE, bottom - _SIZE
    return (
        f'<g clip-path="url(#frame)"><path d="M{_LEFT} {bottom - up:.1f}L{right} {top - up:.1f}'
        f'V{top - down:.1f}L{_LEFT} {bottom - down:.1f}Z" fill="#9aa" fill-opacity="0.3"/>'
        f'<path d="M{_LEFT} {bottom}L{right} {top}" stroke="#666"/></g>'
    )


def _ticks(low: float, high: float) -> Iterator[float]:
    for power in range(math.floor(low), math.ceil(high) + 1):
        for digit in (1, 2, 5):
            value = digit * 10.0**power
            if low <= math.log10(value) <= high + 1e-9:
                yield value
