"""`python -m evaluation readme`: the tables of `benchmarks/README.md`, from files of results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from evaluation.results import SavedResult, read_result
from memserve.bench.tables import PlainTable, plain_tables
from memserve.errors import ConfigError

_HEAD = """# Measured

Made by `python -m evaluation readme`: do not edit it. Each table comes from the file in `results/`
that is named above it; the file has the configuration, the seeds and all versions. Everything else
comes from files with the ending `.md` there. Machines are shared and drift: read ratios within a
table. `memserve bench` had the commands `paper`, `peers`, `prefill` and `soak`, which are those of
`python -m evaluation` now.
"""


def render_readme(results: Path) -> str:
    """Markdown of all `*.json` in a folder, in order of their names, each with the words of the
    `*.md` of the same name; one that stands alone is a section without a table.

    Raises ConfigError for files that cannot be read, all of them at once.
    """
    parts, refused = [_HEAD], []
    names = {
        path.with_suffix("") for ending in ("json", "md") for path in results.glob(f"*.{ending}")
    }
    for name in sorted(names):
        parts.append(f"## {name.name.replace('-', ' ').capitalize()}")
        try:
            if (path := name.with_suffix(".json")).exists():
                parts += _section(read_result(path))
            if (words := name.with_suffix(".md")).exists():
                parts.append(words.read_text(encoding="utf-8"))
        except ConfigError as error:
            refused.append(str(error))
    if refused:
        raise ConfigError("\n".join(refused))
    return "\n".join(parts)


def _section(result: SavedResult) -> Iterator[str]:
    environment = result.environment
    gpus = f", {', '.join(environment.gpus)}" if environment.gpus else ""
    yield (
        f"`{result.command}` ([{result.path.name}]({result.path.parent.name}/{result.path.name})), "
        f"{environment.time[:10]}, commit {environment.commit or 'unknown'}, "
        f"{environment.cpu}, {environment.cores} cores, "
        f"{environment.memory_bytes / 2**30:.0f} GiB{gpus}.\n"
    )
    for shown in plain_tables(result.table):
        yield from _table(shown) if isinstance(shown, PlainTable) else (f"{shown}\n",)


def _table(shown: PlainTable) -> Iterator[str]:
    if not shown.rows:
        return
    if shown.title:
        yield f"{shown.title}:\n"
    sides = ["---:" if right else "---" for right in shown.right]
    for cells in (shown.headers, sides, *shown.rows):
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""
