"""`memserve bench`: commands that measure. Each prints a table, or JSON with --json."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from memserve.bench.report import serving_table, write_json
from memserve.bench.serve import (
    ServeBenchConfig,
    ServeBenchResult,
    compare_caching,
    load_sessions,
    measure_server,
)
from memserve.cli_flags import takes_flags
from memserve.config import ClusterConfig, ModelConfig, check_config, load_config
from memserve.flags import Given, flags_of, with_flags
from memserve.models.resolve import pinned, resolve_model
from memserve.terminal import progress_lines

app = typer.Typer(no_args_is_help=True, help="Measure, and say on what.")

_Json = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="write JSON; - is standard output")
]


@app.command()
@takes_flags(flags_of(ServeBenchConfig), flags_of(ModelConfig))
def serve(
    json: _Json = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare-caching",
            help="start clusters here instead, one with caching and one without",
        ),
    ] = False,
    cluster_file: Annotated[
        Path | None, typer.Option("--cluster", help="their configuration (TOML)")
    ] = None,
    *,
    given: Given,
) -> None:
    """Send conversations to a server: TTFT, TPOT, JCT, and what the cache saved."""
    config = with_flags(ServeBenchConfig(), given)
    cluster = load_config(cluster_file) if cluster_file else ClusterConfig()
    wanted = with_flags(cluster.model, given)
    progress = progress_lines()
    model = resolve_model(wanted, progress)
    cluster = msgspec.structs.replace(cluster, model=pinned(wanted, model))
    check_config(cluster)
    sessions = load_sessions(config, model, progress)
    if compare:
        result = asyncio.run(compare_caching(config, cluster, sessions, progress))
    else:
        run = measure_server("server", config, config.url, sessions, progress)
        result = ServeBenchResult((asyncio.run(run),))
    columns = [(run.name, run.summary) for run in result.runs]
    _report(json, config, result, serving_table(columns))


def _report(json: str | None, config: msgspec.Struct, result: msgspec.Struct, table: Table) -> None:
    if json is None:
        Console().print(table)
    else:
        write_json(json, config, result)
