"""Conversion of printed tables to plain text cells, for pages and for Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True, slots=True)
class PlainTable:
    """A table of plain text."""

    title: str  # empty: none
    headers: tuple[str, ...]
    right: tuple[bool, ...]  # columns that are aligned to the right
    rows: tuple[tuple[str, ...], ...]


def plain_tables(shown: RenderableType) -> Iterator[PlainTable | str]:
    """Yield the tables of a command's output, and the lines between them, in order."""
    if isinstance(shown, Group):
        for part in shown.renderables:
            yield from plain_tables(part)
    elif isinstance(shown, Table) and not shown.show_header:
        for column in shown.columns:  # a grid
            for cell in column.cells:
                yield from plain_tables(cell)
    elif isinstance(shown, Table):
        columns = [[_plain(cell) for cell in column.cells] for column in shown.columns]
        yield PlainTable(
            title=_plain(shown.title) if shown.title else "",
            headers=tuple(_plain(column.header) for column in shown.columns),
            right=tuple(column.justify == "right" for column in shown.columns),
            rows=tuple(zip(*columns, strict=True)),
        )
    else:
        yield _plain(shown)


def _plain(cell: RenderableType) -> str:
    return Text.from_markup(cell).plain if isinstance(cell, str) else str(cell)
