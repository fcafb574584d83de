"""Plots and pages: well-formed, complete, and nothing from elsewhere."""

from __future__ import annotations

import re
from base64 import b64decode
from importlib.machinery import ModuleSpec
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Group
from rich.table import Table

from memserve.bench import plots
from memserve.bench.environment import capture_environment
from memserve.bench.pages import render_page
from memserve.bench.plots import (
    Line,
    Plot,
    Point,
    Series,
    check_matplotlib,
    distribution,
    draw,
    draw_scatter,
)
from memserve.bench.tables import PlainTable, plain_tables
from memserve.errors import ConfigError

SVG = {"svg": "http://www.w3.org/2000/svg"}
PLOT = Plot(
    "T & U $a_1$",
    "rate",
    "s",
    (Line("a < b", (Point(1, 2, 1.5, 2.5), Point(2, 3))), Line("c", (Point(1, 0),))),
)


def texts(svg: str) -> set[str | None]:
    return {text.text for text in ElementTree.fromstring(svg).iterfind(".//svg:text", SVG)}


def test_every_plot_and_name_is_drawn() -> None:
    second = Plot("second", "rate", "s", PLOT.lines)
    assert {"T & U $a_1$", "second", "rate", "s", "a < b", "c"} <= texts(draw(PLOT, second))


def test_equal_plots_are_equal_files() -> None:
    assert draw(PLOT) == draw(PLOT)


def test_a_scatter_plot_has_every_point() -> None:
    series = [Series("one", [0.1, 1.0, 7.0], [0.1, 1.1, 6.0]), Series("two", [2.0], [3.0])]
    svg = draw_scatter("t", "measured", "predicted", series)
    root = ElementTree.fromstring(svg)
    for number, one in enumerate(series, 1):
        marks = root.findall(f".//svg:g[@id='PathCollection_{number}']//svg:use", SVG)
        assert len(marks) == len(one.x)
    assert {"one", "two", "0.1", "5", "measured"} <= texts(svg)


def test_a_distribution_ends_at_one() -> None:
    (line,) = distribution("t", "s", [("a", [3.0, 1.0, 2.0])]).lines
    assert [(p.x, p.y) for p in line.points] == [(1, pytest.approx(1 / 3)), (2, 2 / 3), (3, 1)]
    assert distribution("t", "s", []).lines == ()


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_: str) -> ModuleSpec | None:
        return None

    monkeypatch.setattr(plots, "find_spec", absent)
    for call in (check_matplotlib, lambda: draw(PLOT)):
        with pytest.raises(ConfigError, match=r"pip install 'memserve\[bench\]'"):
            call()


def test_tables_in_groups_and_grids_are_told_one_by_one() -> None:
    shown = Table("name", title="one")
    shown.add_column("count", justify="right")
    shown.add_row("[bold]a[/bold]", "1")
    grid = Table.grid()
    grid.add_row(shown)
    grid.add_row("it [bold]is[/bold] absent")
    assert list(plain_tables(Group(grid, "last"))) == [
        PlainTable("one", ("name", "count"), (False, True), (("a", "1"),)),
        "it is absent",
        "last",
    ]


def test_a_page_needs_nothing_else_and_escapes_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "made_up" / "templates"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "x.html").write_text(
        "{% extends 'page.html' %}{% from 'macros.html' import items, plots, table %}"
        "{% block title %}A & {{ name }}{% endblock %}"
        "{% block content %}{{ table(shown) }}{{ items([name]) }}{{ plots(drawn) }}{% endblock %}"
    )
    monkeypatch.syspath_prepend(tmp_path)
    shown = Table("name")
    shown.add_row("<b>")
    text = render_page(
        *("x.html", capture_environment(), "made_up"), name="<i>", shown=shown, drawn=[PLOT]
    )
    assert "<td>&lt;b&gt;</td>" in text
    assert "<li>&lt;i&gt;</li>" in text
    assert "<title>A & &lt;i&gt;</title>" in text
    assert 'alt="T &amp; U $a_1$"' in text
    (image,) = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', text)
    assert "a < b" in texts(b64decode(image).decode())
    rest = text.replace(image, "")
    assert not re.search(r"href=|https?://|@import|url\(|<script|src=\"(?!data:)", rest)
