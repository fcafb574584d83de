"""`python -m evaluation`: commands that measure what an operator has no use for: the paper's
evaluation, other systems beside ours, and a whole cluster for hours."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from evaluation.gpu.copies import CopiesConfig, copies_table, run_copies
from evaluation.gpu.steps import StepsConfig, run_steps, steps_table
from evaluation.handover import HandoverConfig, handover_table, run_handover
from evaluation.peers.config import PARTS, QUICK_PARTS, PeersConfig, chosen_parts
from evaluation.planner.live import LiveConfig
from evaluation.planner.run import LOADS, PlannerEvalConfig
from evaluation.scale.page import scale_tables
from evaluation.scale.run import ScaleConfig, run_scale
from evaluation.soak.page import check_plot, soak_tables, write_plot
from evaluation.soak.run import SoakConfig, SoakReport, default_cluster, run_soak
from memserve.bench.plots import check_matplotlib
from memserve.bench.report import STDOUT, print_or_write, write_json
from memserve.cli_flags import JsonFile, takes_flags
from memserve.clock import MonotonicClock
from memserve.config import (
    ClusterConfig,
    ModelConfig,
    Positive,
    check_config,
    doc,
    load_config,
)
from memserve.errors import ConfigError
from memserve.flags import Given, flags_of, with_flags
from memserve.models.resolve import pinned, resolve_model
from memserve.models.tokenizer import Tokenizer
from memserve.terminal import progress_lines, run_app

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Evaluate memserve: the paper's figures, other systems, hours of load.",
)
_NOT_FOR_PEERS = ("dtype", "served_name", "max_model_len", "device")
_RESULTS = Path("benchmarks/results")
STALE = 1


@app.command()
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
    json: JsonFile = None,
    *,
    given: Given,
) -> None:
    """The paper's evaluation here: topologies, caching, micro-benchmarks, and a simulation.

    ShareGPT is the installed package's. Writes DIRECTORY/report.html, paper.json, and a line for
    each run in runs.jsonl.
    """
    from evaluation.paper.matrix import PaperConfig
    from evaluation.paper.run import run_paper
    from evaluation.paper.tables import paper_tables

    check_matplotlib()
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
    print_or_write(json, config, result, paper_tables(result))


@app.command()
@takes_flags(flags_of(PeersConfig), flags_of(ModelConfig, _NOT_FOR_PEERS))
def peers(
    quick: Annotated[
        bool,
        typer.Option("--quick", help="one round of each, and no pairs of instances or servers"),
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help=f"{', '.join(PARTS)}; may be repeated; default: all"),
    ] = None,
    json: JsonFile = None,
    *,
    given: Given,
) -> None:
    """Measure ours beside vLLM, Transformers, SGLang's and Dynamo's indexes, and routers.

    In the same run, on the same cores, with the same requests. What is not installed
    (`make peers-install`) is skipped, and the report says so.
    """
    from evaluation.peers.report import peers_tables, run_peers

    parts = chosen_parts(only, QUICK_PARTS if quick else PARTS)
    config = with_flags(PeersConfig(), given)
    progress = progress_lines()
    model = resolve_model(with_flags(ModelConfig(), given), progress)
    result = run_peers(config, parts, model, quick, progress)
    print_or_write(json, config, result, peers_tables(result))


@app.command()
@takes_flags(flags_of(PlannerEvalConfig))
def planner(
    data: Annotated[Path, typer.Option(help="folder with the data: mooncake/, react/")],
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help=f"{', '.join(LOADS)}; may be repeated; default: all"),
    ] = None,
    kept: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="for cells that are done: a second start goes on"),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="nothing is begun after them; default: no limit")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="the day over time: .svg")
    ] = None,
    json: JsonFile = None,
    *,
    given: Given,
) -> None:
    """Simulate the planner beside fixed splits: conversations, agents, and a day of both."""
    from evaluation.planner.page import planner_tables, write_planner_plot
    from evaluation.planner.run import run_planner_evaluation

    if plot is not None:
        check_matplotlib()
    config = with_flags(PlannerEvalConfig(), given)
    wanted = [load for load in LOADS if only is None or load in only]
    if not wanted or len(wanted) < len(only or ()):
        raise ConfigError(f"--only {', '.join(only or ())}: known are {', '.join(LOADS)}")
    progress = progress_lines()
    tokenizer = Tokenizer.load(resolve_model(ModelConfig(), progress).path)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    result = run_planner_evaluation(config, data, wanted, encode, progress, kept, minutes)
    if plot is not None:
        write_planner_plot(plot, result)
    print_or_write(json, config, result, planner_tables(result))


@app.command("planner-live")
@takes_flags(flags_of(LiveConfig), flags_of(ModelConfig))
def planner_live(json: JsonFile = None, *, given: Given) -> None:
    """Turn the load of a real cluster of four instances, with the planner and with fixed roles."""
    from evaluation.planner.live import live_table, run_live

    config = with_flags(LiveConfig(), given)
    progress = progress_lines()
    wanted = with_flags(ModelConfig(), given)
    wanted = pinned(wanted, resolve_model(wanted, progress))
    result = asyncio.run(run_live(config, wanted, progress))
    print_or_write(json, config, result, live_table(result))


@app.command()
@takes_flags(flags_of(ModelConfig))
def walk(json: JsonFile = None, *, given: Given) -> None:
    """Record which modules and classes a request passes, colocated and by prefill and decode."""
    from evaluation.walk.run import run_walk, walk_table

    progress = progress_lines()
    wanted = with_flags(ModelConfig(), given)
    wanted = pinned(wanted, resolve_model(wanted, progress))
    result = asyncio.run(run_walk(wanted, progress))
    print_or_write(json, wanted, result, walk_table(result))


class PrefillBenchConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Which prompts are computed."""

    threads: Annotated[Positive | None, doc("default: one for each core")] = None
    max_batch_tokens: Annotated[Positive, doc("as the instances' setting")] = 2048
    longest: Annotated[Positive, doc("tokens; shorter ones are quarters of it")] = 4096
    repeats: Annotated[Positive, doc("of every prompt, in turns; figures are medians")] = 3


@app.command()
@takes_flags(flags_of(ModelConfig, ("served_name", "max_model_len")), flags_of(PrefillBenchConfig))
def prefill(json: JsonFile = None, *, given: Given) -> None:
    """Time prompts of several lengths of which more and more is cached, on the engine alone."""
    from evaluation.prefill import prefill_bench_table, run_prefill_bench
    from memserve.bench.own_engine import load_own_engine

    wanted = with_flags(ModelConfig(), given)
    config = with_flags(PrefillBenchConfig(), given)
    progress = progress_lines()
    own = load_own_engine(wanted, config.threads, config.max_batch_tokens, progress)
    report = run_prefill_bench(own, config.longest, config.repeats, progress)
    print_or_write(json, config, report, prefill_bench_table(report))


@app.command()
@takes_flags(flags_of(StepsConfig))
def gpu_steps(json: JsonFile = None, *, given: Given) -> None:
    """Time the engine's steps on a GPU, beside Transformers' generate with a static cache."""
    config = with_flags(StepsConfig(), given)
    report = run_steps(config, progress_lines())
    print_or_write(json, config, report, steps_table(report))


@app.command()
@takes_flags(flags_of(CopiesConfig))
def gpu_copies(json: JsonFile = None, *, given: Given) -> None:
    """Time a pool's copies between HBM and DRAM, beside CUDA's own, in both layouts."""
    config = with_flags(CopiesConfig(), given)
    report = run_copies(config, progress_lines())
    print_or_write(json, config, report, copies_table(report))


@app.command()
@takes_flags(flags_of(ModelConfig), flags_of(HandoverConfig))
def handover(json: JsonFile = None, *, given: Given) -> None:
    """Time what the second token waits for, by how a hand-over is cut into writes."""
    config = with_flags(HandoverConfig(), given)
    model = with_flags(ModelConfig(), given)
    progress = progress_lines()
    report = asyncio.run(run_handover(config, model, progress))
    print_or_write(json, config, report, handover_table(report))


@app.command()
@takes_flags(flags_of(SoakConfig), flags_of(ModelConfig))
def soak(
    json: JsonFile = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="plots over time: .html or .svg")
    ] = None,
    log: Annotated[
        Path | None, typer.Option(metavar="FILE", help="where the cluster's output goes")
    ] = None,
    cluster_file: Annotated[
        Path | None,
        typer.Option("--cluster", help="TOML; default: an instance of each role, float32"),
    ] = None,
    *,
    given: Given,
) -> None:
    """Load a whole cluster with a bit of everything, and watch what its processes hold.

    It is `memserve up` that runs, as a process of its own. Exit code 1: an answer was wrong or
    missing, a block leaked, or a process grew. In float32 equal prompts have equal answers,
    whoever computes them and beside whom; other formats may differ in near ties. Ctrl-C ends it
    early, with what there is by then.
    """
    config = with_flags(SoakConfig(), given)
    if plot is not None:
        check_plot(plot)
    progress = progress_lines()
    file = (
        load_config(cluster_file)
        if cluster_file
        else ClusterConfig(model=ModelConfig(dtype="float32"), instance=default_cluster())
    )
    wanted = with_flags(file.model, given)
    cluster = msgspec.structs.replace(file, model=pinned(wanted, resolve_model(wanted, progress)))
    check_config(cluster)
    result = asyncio.run(run_soak(config, cluster, progress, log=log))
    if plot is not None:
        write_plot(plot, SoakReport.of(config, result))
    if json is not None:
        write_json(json, config, result)
    if json != STDOUT:
        Console().print(soak_tables(result))
    raise typer.Exit(0 if result.sound else 1)


@app.command()
@takes_flags(flags_of(ScaleConfig))
def scale(
    before: Annotated[
        Path | None,
        typer.Option(metavar="SRC", help="another checkout's src: its gateway is measured, too"),
    ] = None,
    json: JsonFile = None,
    *,
    given: Given,
) -> None:
    """What a gateway costs with up to a thousand members, and what it can follow.

    The gateway is the real process; one process stands in for all members: signed answers, KV
    events on CURVE sockets, registrations. Decisions are timed without processes.
    """
    config = with_flags(ScaleConfig(), given)
    result = run_scale(config, before, progress_lines())
    print_or_write(json, config, result, scale_tables(result))


@app.command()
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
    from evaluation.readme import render_readme

    if not results.is_dir():
        raise ConfigError(f"--results {results}: no such folder")
    path = output or results.parent / "README.md"
    text = render_readme(results)
    if not check:
        path.write_text(text, encoding="utf-8")
    elif not path.exists() or path.read_text(encoding="utf-8") != text:
        print(f"{path} is not what `python -m evaluation readme` writes", file=sys.stderr)
        raise typer.Exit(STALE)


def main() -> None:
    """Run the command."""
    run_app(app)
