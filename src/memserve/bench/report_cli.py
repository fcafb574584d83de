"""The commands `memserve bench paper` and `memserve bench readme`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from memserve.bench.report import write_json
from memserve.cli_flags import takes_flags
from memserve.clock import MonotonicClock
from memserve.config import ModelConfig
from memserve.errors import ConfigError
from memserve.flags import Given, flags_of, with_flags
from memserve.models.resolve import pinned, resolve_model
from memserve.terminal import progress_lines

_RESULTS = Path("benchmarks/results")
STALE = 1


@takes_flags(flags_of(ModelConfig))
def paper(
    directory: Annotated[
        Path, typer.Argument(help="for runs and report; a second start goes on from there")
    ],
    data: Annotated[Path, typer.Option(help="folder with the data: loogle/, react/")],
    quick: Annotated[
        bool, typer.Option("--quick", help="one rate, one run of each: minutes")
    ] = False,
    minutes: Annotated[float, typer.Option(min=0, help="nothing is begun after them")] = 29.0,
    repeats: Annotated[int, typer.Option(min=1, help="of each run")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="of sessions and arrivals")] = 0,
    json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="write JSON; - is standard output")
    ] = None,
    *,
    given: Given,
) -> None:
    """The paper's evaluation here: topologies, caching, micro-benchmarks, and a simulation.

    ShareGPT is the installed package's. Writes DIRECTORY/report.html, paper.json, and a line for
    each run in runs.jsonl.
    """
    from memserve.bench.paper import run_paper
    from memserve.bench.paper_matrix import PaperConfig
    from memserve.bench.paper_tables import paper_tables

    for name in ("loogle", "react"):
        if not (data / name).is_dir():
            raise ConfigError(f"--data {data}: no folder '{name}' in it")
    config = PaperConfig(
        data=str(data), quick=quick, repeats=1 if quick else repeats, seed=seed, minutes=minutes
    )
    wanted = with_flags(ModelConfig(), given)
    progress = progress_lines()
    model = resolve_model(wanted, progress)
    wanted = pinned(wanted, model)
    result = run_paper(directory, config, wanted, model, MonotonicClock(), progress)
    if json is None:
        Console().print(paper_tables(result))
    else:
        write_json(json, config, result)


def readme(
    results: Annotated[Path, typer.Option(help="folder with the files of results")] = _RESULTS,
    output: Annotated[
        Path | None, typer.Option(help="default: README.md in the folder above")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="write nothing; fail if the file is out of date")
    ] = False,
) -> None:
    """Write the tables of all results as Markdown, each with what made it."""
    from memserve.bench.readme import render_readme

    if not results.is_dir():
        raise ConfigError(f"--results {results}: no such folder")
    path = output or results.parent / "README.md"
    text = render_readme(results)
    if not check:
        path.write_text(text, encoding="utf-8")
    elif not path.exists() or path.read_text(encoding="utf-8") != text:
        print(f"{path} is not what `memserve bench readme` writes", file=sys.stderr)
        raise typer.Exit(STALE)
