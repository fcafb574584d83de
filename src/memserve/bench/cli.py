"""`memserve bench`: commands that measure. Each prints a table, or JSON with --json."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, get_args

import msgspec
import typer

from memserve.bench.environment import capture_environment
from memserve.bench.measure import measure_repeats, require_answers, served_model
from memserve.bench.pages import write_page
from memserve.bench.plots import check_matplotlib
from memserve.bench.report import append_lines, print_or_write, serving_table
from memserve.bench.scheduler import (
    SchedulerWorkload,
    run_scheduler_bench,
    scheduler_bench_table,
)
from memserve.bench.serve import ServeBenchResult, compare_caching
from memserve.bench.serving_page import repeats_table, serving_page
from memserve.bench.work import ServeBenchConfig, Work, load_sessions
from memserve.cli_flags import JsonFile, takes_flags
from memserve.config import (
    ClusterConfig,
    Engine,
    GatewayConfig,
    ModelConfig,
    Policy,
    Positive,
    PositiveSeconds,
    available_cores,
    check_config,
    doc,
    load_config,
)
from memserve.errors import ConfigError
from memserve.flags import Given, flags_of, with_flags
from memserve.models.resolve import Progress, pinned, resolve_model
from memserve.terminal import progress_lines

app = typer.Typer(no_args_is_help=True, help="Measure, and say on what.")

_Engine = Annotated[
    str, typer.Option("--engine", help="builtin, or vllm: servers on this machine's CPU")
]


@app.command()
@takes_flags(flags_of(ServeBenchConfig), flags_of(ModelConfig))
def serve(
    json: JsonFile = None,
    lines: Annotated[
        Path | None, typer.Option(help="add a line of JSON for each run to this file")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="write a report with plots, one file, to this path")
    ] = None,
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
    """Send conversations to a server: TTFT, TPOT, JCT, and what the cache saved.

    Any server with OpenAI's API will do; --model is the one whose tokenizer says how long the
    data's texts are.
    """
    config = with_flags(ServeBenchConfig(), given)
    if html is not None:
        check_matplotlib()
    url = None if compare else config.url
    cluster, sessions, progress = _prepare(config, cluster_file, ClusterConfig(), given, url)
    if compare:
        result = asyncio.run(compare_caching(config, cluster, sessions, progress))
    else:
        runs = asyncio.run(measure_repeats("server", config, sessions, progress))
        result = ServeBenchResult(runs)
    if lines is not None:
        append_lines(lines, config, result.runs)
    if html is not None:
        write_page(html, serving_page(capture_environment(), config, result.runs))
    if config.repeats > 1:
        print_or_write(json, config, result, repeats_table(result.runs))
    else:
        columns = [(run.name, run.summary) for run in result.runs]
        print_or_write(json, config, result, serving_table(columns))
    require_answers(result.runs)


@app.command()
@takes_flags(flags_of(ServeBenchConfig, ("url",)), flags_of(ModelConfig))
def caching(
    json: JsonFile = None,
    cluster_file: Annotated[
        Path | None,
        typer.Option("--cluster", help="TOML; default: a prefill and a decode instance"),
    ] = None,
    engine: _Engine = "builtin",
    *,
    given: Given,
) -> None:
    """Compare what is cached between prefill and decode instances: off, p, pd, full."""
    from memserve.bench.caching import caching_table, compare_steps, one_and_one

    config = with_flags(ServeBenchConfig(), given)
    # With this policy the prefill instance computes every prompt, whether that is faster or not.
    default = ClusterConfig(gateway=GatewayConfig(policy="round-robin"), instance=one_and_one())
    cluster, sessions, progress = _prepare(config, cluster_file, default, given)
    cluster = _with_engine(cluster, engine)
    result = asyncio.run(compare_steps(config, cluster, sessions, progress))
    print_or_write(json, config, result, caching_table(result))
    require_answers(one.run for one in result.runs)


@app.command()
@takes_flags(flags_of(ServeBenchConfig, ("url",)), flags_of(ModelConfig))
def policies(
    json: JsonFile = None,
    cluster_file: Annotated[
        Path | None,
        typer.Option("--cluster", help="TOML; its first [[instance]] is what each looks like"),
    ] = None,
    engine: _Engine = "builtin",
    only: Annotated[
        list[str] | None, typer.Option("--only", help="a policy; may be repeated; default: all")
    ] = None,
    *,
    given: Given,
) -> None:
    """Compare how instances are chosen: two colocated ones, and one of each role."""
    from memserve.bench.policies import chosen_policies, compare_policies, policies_table

    config = with_flags(ServeBenchConfig(), given)
    names = chosen_policies(only)
    cluster, sessions, progress = _prepare(config, cluster_file, ClusterConfig(), given)
    cluster = _with_engine(cluster, engine)
    result = asyncio.run(compare_policies(config, cluster, names, sessions, progress))
    print_or_write(json, config, result, policies_table(result))
    require_answers(one.run for one in result.runs)


def _with_engine(cluster: ClusterConfig, engine: str) -> ClusterConfig:
    """Return the cluster with another engine. Raises ConfigError if it is unknown or missing."""
    if engine not in get_args(Engine):
        raise ConfigError(f"--engine {engine}: {' or '.join(get_args(Engine))}")
    if engine == "builtin":
        return cluster
    from memserve.bench.vllm_engine import as_vllm

    return msgspec.structs.replace(cluster, instance=as_vllm(cluster.instance))


def _prepare(
    config: ServeBenchConfig,
    cluster_file: Path | None,
    default: ClusterConfig,
    given: Given,
    url: str | None = None,
) -> tuple[ClusterConfig, Work, Progress]:
    """Return the cluster with its model resolved, the workload, and a progress printer. `url`: of
    the server that is measured, if it runs already."""
    cluster = load_config(cluster_file) if cluster_file else default
    wanted = with_flags(cluster.model, given)
    progress = progress_lines()
    model = resolve_model(wanted, progress)
    cluster = msgspec.structs.replace(cluster, model=pinned(wanted, model))
    check_config(cluster)
    vocabulary = None
    if url is not None and config.workload in ("trace", "synthetic"):
        vocabulary = asyncio.run(served_model(url)).vocab_size
    return cluster, load_sessions(config, model, progress, vocabulary), progress


class PoolBenchConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of `bench pool`."""

    prompts: Annotated[Positive, doc("stored")] = 10_000
    prompt_tokens: Annotated[Positive, doc("of each")] = 4096
    prefixes: Annotated[Positive, doc("that the prompts share")] = 50
    prefix_tokens: Annotated[Positive, doc("of each")] = 1024


@app.command()
@takes_flags(flags_of(PoolBenchConfig))
def pool(json: JsonFile = None, *, given: Given) -> None:
    """Time the memory pool's calls, beside an index of block hashes, and its eviction."""
    from memserve.bench.pool import PoolWorkload, pool_bench_table, run_pool_bench

    config = with_flags(PoolBenchConfig(), given)
    workload = PoolWorkload(**msgspec.structs.asdict(config))
    report = run_pool_bench(workload, progress=progress_lines())
    print_or_write(json, config, report, pool_bench_table(report))


@app.command()
@takes_flags(flags_of(SchedulerWorkload))
def scheduler(json: JsonFile = None, *, given: Given) -> None:
    """Time the scheduler's decisions: every policy, colocated and with roles apart."""
    workload = with_flags(SchedulerWorkload(), given)
    report = run_scheduler_bench(workload, progress=progress_lines())
    print_or_write(json, workload, report, scheduler_bench_table(report))


class EngineBenchConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of `bench engine`."""

    threads: Annotated[Positive | None, doc("default: one for each core")] = None
    prompt_tokens: Annotated[Positive, doc("of the prompt that is prefilled")] = 1024
    repeats: Annotated[Positive, doc("measured pairs; more are steadier")] = 7


@app.command()
@takes_flags(flags_of(ModelConfig, ("served_name", "max_model_len")), flags_of(EngineBenchConfig))
def engine(json: JsonFile = None, *, given: Given) -> None:
    """Time the engine alone, in turns with Transformers' generate: prefill and decode."""
    from memserve.bench.engine import engine_bench_table, run_engine_bench
    from memserve.instance.build import choose_device, wanted_dtype

    wanted = with_flags(ModelConfig(), given)
    config = with_flags(EngineBenchConfig(), given)
    progress = progress_lines()
    device = choose_device(wanted.device)
    model = resolve_model(wanted, progress)
    threads = config.threads or available_cores()
    report = run_engine_bench(
        model.path,
        dtype=wanted_dtype(wanted, device),
        device=str(device),
        threads=threads,
        prompt_tokens=config.prompt_tokens,
        repeats=config.repeats,
        progress=progress,
    )
    print_or_write(json, wanted, report, engine_bench_table(report))


class TransferBenchConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of `bench transfer`."""

    blocks: Annotated[Positive, doc("copied at once")] = 256
    repeats: Annotated[Positive, doc("of each copy, in turns; more are steadier")] = 9
    link: Annotated[bool, doc("also over an emulated link of 1 Gbit/s; needs root")] = False


@app.command()
@takes_flags(flags_of(TransferBenchConfig))
def transfer(json: JsonFile = None, *, given: Given) -> None:
    """Time the paths between pools, beside memcpy and a socket, and what layouts cost."""
    from memserve.bench.transfer import run_transfer_bench, transfer_bench_table

    config = with_flags(TransferBenchConfig(), given)
    report = run_transfer_bench(
        blocks=config.blocks,
        repeats=config.repeats,
        link=config.link,
        progress=progress_lines(),
    )
    print_or_write(json, config, report, transfer_bench_table(report))


class GatewayBenchConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of `bench gateway`."""

    streams: Annotated[Positive, doc("at the same time")] = 64
    prompt_tokens: Annotated[Positive, doc("of each prompt; 400 are 2 KB")] = 400
    gap_seconds: Annotated[PositiveSeconds, doc("between a stream's chunks, where paced")] = 0.01
    seconds: Annotated[PositiveSeconds, doc("of each run")] = 4.0
    repeats: Annotated[Positive, doc("of all runs, in turns; figures are medians")] = 3
    policy: Annotated[Policy, doc("of our gateway")] = "prompt-tree"
    workers: Annotated[Positive, doc("of our gateway, measured beside one alone")] = 1


@app.command()
@takes_flags(flags_of(GatewayBenchConfig))
def gateway(json: JsonFile = None, *, given: Given) -> None:
    """Take a gateway's CPU time per request and chunk, beside other routers if installed."""
    from memserve.bench.gateway import GatewayWorkload, gateway_bench_table, run_gateway_bench

    config = with_flags(GatewayBenchConfig(), given)
    workload = GatewayWorkload(**msgspec.structs.asdict(config))
    report = run_gateway_bench(workload, progress_lines())
    print_or_write(json, config, report, gateway_bench_table(report))
