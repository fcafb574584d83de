"""Reports as one HTML file that needs nothing else: style and plots are in it, and no script.

Pages follow the reader's setting for light or dark.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memserve.bench.environment import Environment
from memserve.bench.plots import COLOURS

# One colour for each of a plot's lines; told apart by people who see red and green alike, too.
_LIGHT = ("#0b62a8", "#c4570c", "#1d7f4e", "#8a3fa0", "#8f6a00", "#c2255c")
_DARK = ("#6cb6ff", "#ffa657", "#56d39b", "#d2a8ff", "#e3c04a", "#ff8fb3")
assert len(_LIGHT) == len(_DARK) == COLOURS

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --soft: #5c6470;
  --rule: #d9dde3; --band: #f4f6f8; --bad: #b42318; --good: #146c3c; LIGHT }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --paper: #15181c;
  --soft: #9aa4b2; --rule: #343a42; --band: #1d2126; --bad: #ff9a8f; --good: #6fdca0; DARK } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 76rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.4rem; border-bottom: 1px solid var(--rule); }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .3rem; }
th, td { padding: .25rem .7rem; text-align: left; border-bottom: 1px solid var(--rule); }
th { background: var(--band); } td.right, th.right { text-align: right; }
div.wide { overflow-x: auto; } div.plots { display: flex; flex-wrap: wrap; gap: 1rem; }
.bad { color: var(--bad); } .good { color: var(--good); } .soft { color: var(--soft); }
code { background: var(--band); padding: .1rem .3rem; }
svg.plot { background: var(--paper); font: 12px system-ui, sans-serif; }
svg.plot text { fill: var(--ink); } svg.plot text.axis, svg.plot text.name { text-anchor: middle; }
svg.plot text.name { font-weight: 600; } svg.plot text.left { text-anchor: end; }
svg.plot .grid { stroke: var(--rule); } svg.plot .frame { stroke: var(--soft); fill: none; }
svg.plot .line path { fill: none; stroke-width: 2; } svg.plot .line .range { stroke-width: 1; }
svg.plot .line circle { stroke: none; }
"""


def page(title: str, environment: Environment, parts: Iterable[str]) -> str:
    """A whole document; `parts` are HTML, in order."""
    style = _STYLE.replace("LIGHT", _colours(_LIGHT)).replace("DARK", _colours(_DARK))
    style += "".join(
        f"svg.plot .s{n} path {{ stroke: var(--s{n}); }} "
        f"svg.plot .s{n} circle {{ fill: var(--s{n}); }}\n"
        for n in range(COLOURS)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>"
        f"<h1>{escape(title)}</h1>{taken_on(environment)}{''.join(parts)}</body></html>\n"
    )


def write_page(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def taken_on(environment: Environment) -> str:
    """The line that says where and with what."""
    packages = ", ".join(f"{name} {version}" for name, version in environment.packages.items())
    memory = environment.memory_bytes / 2**30
    gpus = ", ".join(environment.gpus) or "no GPU"
    return paragraph(
        f"{environment.time}; {environment.cpu}, {environment.cores} cores, {memory:.0f} GiB, "
        f"{gpus}; {environment.platform}; memserve {environment.memserve}, commit "
        f"{environment.commit or 'unknown'}; Python {environment.python}, {packages}",
        "soft",
    )


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str, kind: str = "") -> str:
    """`kind`: soft, good or bad."""
    name = f' class="{kind}"' if kind else ""
    return f"<p{name}>{escape(text)}</p>"


def items(texts: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>" if texts else ""


def plots(drawn: Iterable[str]) -> str:
    return f'<div class="plots">{"".join(drawn)}</div>'


def table(shown: RenderableType) -> str:
    """A table as the terminal shows it, and tables in groups or in a grid."""
    return "".join(_table(one) for one in tables_of(shown))


def tables_of(shown: RenderableType) -> Iterable[Table | str]:
    """The tables of what a command prints, one after the other, and the lines between them."""
    if isinstance(shown, Group):
        for part in shown.renderables:
            yield from tables_of(part)
    elif isinstance(shown, Table) and not shown.show_header:
        for column in shown.columns:  # a grid
            for cell in column.cells:
                yield from tables_of(cell)
    elif isinstance(shown, Table):
        yield shown
    else:
        yield plain(shown)


def rows_of(shown: Table) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of text."""
    columns = [[plain(cell) for cell in column.cells] for column in shown.columns]
    rows = [list(row) for row in zip(*columns, strict=True)]
    return [plain(column.header) for column in shown.columns], rows


def plain(cell: RenderableType) -> str:
    """A cell's text without its style."""
    return Text.from_markup(cell).plain if isinstance(cell, str) else str(cell)


def _table(shown: Table | str) -> str:
    if isinstance(shown, str):
        return paragraph(shown, "soft")
    headers, rows = rows_of(shown)
    sides = [' class="right"' if c.justify == "right" else "" for c in shown.columns]
    head = "".join(f"<th{s}>{escape(h)}</th>" for h, s in zip(headers, sides, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{s}>{escape(c)}</td>' for c, s in zip(row, sides, strict=True))}</tr>"
        for row in rows
    )
    title = f"<caption>{escape(plain(shown.title))}</caption>" if shown.title else ""
    return (
        f'<div class="wide"><table>{title}<thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _colours(colours: Sequence[str]) -> str:
    return " ".join(f"--s{number}: {colour};" for number, colour in enumerate(colours))
