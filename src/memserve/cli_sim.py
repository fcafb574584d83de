"""`memserve sim`: comparison of policies and cluster shapes in a simulation."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, get_args

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from memserve.bench.environment import capture_environment
from memserve.bench.pages import render_page, write_page
from memserve.bench.plots import Plot, check_matplotlib, distribution
from memserve.cli_flags import takes_flags
from memserve.config import ModelConfig, PlannerConfig, Policy
from memserve.flags import Given, flags_of, with_flags
from memserve.models.resolve import Progress, resolve_model
from memserve.models.tokenizer import Tokenizer
from memserve.sim.inputs import Encode
from memserve.sim.run import RequestTimes, SimConfig, SimResult, simulate
from memserve.terminal import progress_lines

_FIGURES = ("cached_ratio", "ttft_mean", "ttft_p99", "tpot_mean", "jct_mean", "jct_p99")


@takes_flags(flags_of(SimConfig), flags_of(PlannerConfig, ("dry_run",)))
def sim(
    json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="write JSON; - is standard output")
    ] = None,
    html: Annotated[
        str | None,
        typer.Option("--html", metavar="FILE", help="a page with plots; needs memserve[bench]"),
    ] = None,
    all_policies: Annotated[
        bool, typer.Option("--all-policies", help="each policy in turn, instead of one")
    ] = False,
    *,
    given: Given,
) -> None:
    """Simulate a cluster: the real scheduler, a cost model, and a virtual clock.

    With --planner, the planner changes roles, and with --planner-max-members the members.
    """
    planner = with_flags(PlannerConfig(), given, ("dry_run",))
    config = with_flags(SimConfig(), given)
    if html is not None:
        check_matplotlib()
    progress = progress_lines()
    encode = None if config.workload is None else _encoder(config.tokenizer, progress)
    policies = get_args(Policy) if all_policies else (config.policy,)
    results: list[SimResult] = []
    times: dict[str, list[RequestTimes]] = {}
    for policy in policies:
        own = msgspec.structs.replace(config, policy=policy)
        results.append(
            simulate(own, progress, encode, planner, times.setdefault(policy, []).append)
        )
    if html is not None:
        write_page(Path(html), _page(results, times))
    if json is None:
        Console().print(_table(results))
        return
    data = msgspec.json.encode(results if all_policies else results[0])
    text = msgspec.json.format(data, indent=2) + b"\n"
    if json == "-":
        sys.stdout.write(text.decode())
    else:
        Path(json).write_bytes(text)


def _page(results: list[SimResult], times: dict[str, list[RequestTimes]]) -> str:
    """Return the report as an HTML document: the table, and distributions by policy."""

    def plot(title: str, of: Callable[[RequestTimes], float | None]) -> Plot:
        series = [
            (policy, [seconds for each in found if (seconds := of(each)) is not None])
            for policy, found in times.items()
        ]
        return distribution(title, "s", series)

    plots = (
        plot("Time to first token", lambda each: each.ttft),
        plot("Job completion time", lambda each: each.jct),
        plot("Time per output token", lambda each: each.tpot),
    )
    return render_page(
        "simulation.html",
        capture_environment(),
        instances=results[0].instances,
        requests=results[0].requests,
        figures=_table(results),
        distributions=plots,
    )


def _encoder(name: str, progress: Progress) -> Encode:
    tokenizer = Tokenizer.load(resolve_model(ModelConfig(path=name), progress).path)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    return encode


def _table(results: list[SimResult]) -> Table:
    refused = results[0].refused  # the same for every policy
    table = Table(caption=f"{refused} requests refused: longer than KV memory" if refused else None)
    table.add_column("policy")
    for name in _FIGURES:
        table.add_column(name.replace("_", " "), justify="right")
    table.add_column("imbalance", justify="right")
    for result in results:
        figures = msgspec.structs.asdict(result)
        table.add_row(
            result.policy,
            *(f"{figures[name]:.4g}" for name in _FIGURES),
            f"{result.load_imbalance:.2f}",
        )
    return table
