"""Plots and pages: well-formed, complete, and nothing from elsewhere."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Group
from rich.table import Table

from memserve.bench.environment import capture_environment
from memserve.bench.html import heading, page, paragraph, table
from memserve.bench.plots import Line, Point, distribution_plot, line_plot, ticks

finite = st.floats(0, 1e6, allow_nan=False)


def test_every_point_and_name_is_drawn() -> None:
    lines = [
        Line("a < b", (Point(1, 2, 1.5, 2.5), Point(2, 3))),
        Line("c", (Point(1, 0),)),
    ]
    root = ElementTree.fromstring(line_plot("T & U", "rate", "s", lines))
    assert len(root.findall(".//circle")) == 3
    assert len(root.findall(".//path[@class='range']")) == 1
    assert {"T & U", "a < b", "c"} <= {text.text for text in root.iter("text")}


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=6))
def test_nothing_is_drawn_outside_the_frame(points: list[tuple[float, float]]) -> None:
    root = ElementTree.fromstring(
        line_plot("t", "x", "y", [Line("l", tuple(Point(x, y) for x, y in points))])
    )
    for circle in root.iter("circle"):
        assert 50 < float(circle.attrib["cx"]) < 400
        assert 29 <= float(circle.attrib["cy"]) <= 241


def test_a_distribution_ends_at_one() -> None:
    svg = distribution_plot("t", "s", [("a", [3.0, 1.0, 2.0])])
    path = next(p for p in ElementTree.fromstring(svg).iter("path") if "L" in p.attrib["d"])
    assert path.attrib["d"].count("L") == 2
    assert path.attrib["d"].endswith(" 30.0")  # the frame's upper edge
    assert distribution_plot("t", "s", []) == ""


@given(finite, finite)
def test_ticks_are_inside_and_few(one: float, other: float) -> None:
    low, high = sorted((one, other))
    found = ticks(low, high)
    span = high - low
    assert 1 <= len(found) <= 7 or span < 1e-6 * high
    assert all(low - 1e-6 * span <= value <= high + 1e-6 * span for value in found)


def test_ticks_are_round() -> None:
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(0.5, 2.4) == [0.5, 1.0, 1.5, 2.0]


def test_a_page_needs_nothing_else_and_escapes_what_it_shows() -> None:
    shown = Table("name", title="one")
    shown.add_row("<b>")
    grid = Table.grid()
    grid.add_row(shown)
    grid.add_row("not measured: it [bold]is[/bold] absent")
    text = page(
        "A & B", capture_environment(), (heading("x"), paragraph("<i>"), table(Group(grid)))
    )
    assert "<td>&lt;b&gt;</td>" in text
    assert "&lt;i&gt;" in text
    assert "it is absent" in text
    assert not re.search(r"(src|href)=|https?://(?!www\.w3\.org)|@import|url\(|<script", text)
