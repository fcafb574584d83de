"""What a PromQL expression asks for: metrics, matchers and labels. No parser: enough for the
expressions in deploy/, which promtool parses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_SELECTOR = re.compile(r"\b((?:memserve|vllm|up)(?:[:_][a-zA-Z0-9_:]*)?)\b(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_LEGEND = re.compile(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}")


@dataclass(frozen=True)
class Matcher:
    label: str
    operator: str
    value: str

    @property
    def alternatives(self) -> tuple[str, ...]:
        """The values that it names; none for a variable of the board, or for a pattern."""
        if "$" in self.value or (self.operator in ("=~", "!~") and "." in self.value):
            return ()
        return tuple(self.value.split("|")) if "~" in self.operator else (self.value,)


@dataclass(frozen=True)
class Selector:
    metric: str
    matchers: tuple[Matcher, ...]


def selectors(expression: str) -> Iterator[Selector]:
    for name, matchers in _SELECTOR.findall(expression):
        yield Selector(name, tuple(Matcher(*found) for found in _MATCHER.findall(matchers)))


def grouped(expression: str) -> set[str]:
    """Labels that an expression groups by or joins on."""
    lists = _GROUPING.findall(expression)
    return {label.strip() for each in lists for label in each.split(",") if label.strip()}


def shown(legend: str) -> set[str]:
    """Labels that a legend or an annotation shows."""
    return set(_LEGEND.findall(legend)) - {"value"}
