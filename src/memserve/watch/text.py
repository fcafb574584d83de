"""Figures as short text, the same in the terminal and on pages."""

from __future__ import annotations

from collections.abc import Sequence

from memserve.api.status import MediumTotals

NONE = "-"  # what is not known
_BLOCKS = "▁▂▃▄▅▆▇█"
_STEPS = (("", 1.0), ("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12))


def short(value: float | None, unit: str = "") -> str:
    """Return a number of three digits or so: `999`, `1.2 k`, `35 M`, with its unit behind it."""
    if value is None:
        return NONE
    name, step = next((s for s in reversed(_STEPS) if abs(value) >= s[1] * 0.9995), _STEPS[0])
    scaled = value / step
    digits = f"{scaled:.1f}" if abs(scaled) < 9.95 and scaled != int(scaled) else f"{scaled:.0f}"
    return f"{digits} {name}{unit}".rstrip()


def size(value: float | None) -> str:
    """Return bytes in decimal units."""
    return short(value, "B")


def seconds(value: float | None) -> str:
    if value is None:
        return NONE
    if value < 0.9995:
        return f"{value * 1000:.1f} ms" if value < 0.00995 else f"{value * 1000:.0f} ms"
    return f"{value:.1f} s" if value < 99.95 else f"{value:.0f} s"


def age(value: float) -> str:
    """Return how long ago something was."""
    whole = max(0, int(value))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min"
    return f"{whole // 3600} h"


def share(value: float | None) -> str:
    return NONE if value is None else f"{value:.0%}"


def sparkline(values: Sequence[float | None], width: int) -> str:
    """Return the last `width` values as a line of blocks, from zero to the largest; spaces where
    nothing is known."""
    last = values[-width:]
    top = max((value for value in last if value is not None), default=0.0)
    line = ""
    for value in last:
        if value is None:
            line += " "
        else:
            line += _BLOCKS[round(value / top * (len(_BLOCKS) - 1)) if top else 0]
    return line.rjust(width)


def used(medium: MediumTotals) -> float | None:
    """Return the share of blocks that are not free; None: there are none."""
    return (medium.total - medium.free) / medium.total if medium.total else None


def parts(medium: MediumTotals) -> tuple[tuple[str, int], ...]:
    """Return a medium's blocks by what they are, in a bar's order; they add up to its total."""
    return (
        ("active", medium.active),
        ("pinned", medium.pinned + medium.detached),
        ("cached", max(medium.cached - medium.pinned, 0)),
        ("free", medium.free),
    )


def cells(counts: Sequence[int], width: int) -> list[int]:
    """Return how many of `width` cells each count gets: they add up, and what is there has at
    least one cell where there is room for all."""
    total = sum(counts)
    if not total:
        return [0] * len(counts)
    shares = [count * width / total for count in counts]
    given = [max(int(each), 1 if count else 0) for each, count in zip(shares, counts, strict=True)]
    while sum(given) < width:
        at = max(range(len(given)), key=lambda i: (shares[i] - given[i], counts[i]))
        given[at] += 1
    while sum(given) > width:
        at = max(range(len(given)), key=lambda i: (given[i], given[i] - shares[i]))
        given[at] -= 1
    return given
