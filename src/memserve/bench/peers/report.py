"""`memserve bench peers`: everything at once, and its tables."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Sequence
from statistics import geometric_mean

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table

from memserve.bench.gateway import (
    GatewayBenchReport,
    GatewayWorkload,
    gateway_bench_table,
    run_gateway_bench,
)
from memserve.bench.peers.config import Part, PeersConfig
from memserve.bench.peers.index import QUICK, IndexReport, IndexShape, index_table, run_index_bench
from memserve.bench.peers.places import ROOT
from memserve.bench.peers.serving import (
    LOADS,
    OURS,
    Contest,
    Loads,
    PeerRun,
    load_config,
    one_instance,
    two_instances,
)
from memserve.bench.report import Distribution, ServingSummary
from memserve.bench.work import load_sessions
from memserve.config import available_cores
from memserve.models.resolve import ModelDirectory, Progress


class PeersResult(msgspec.Struct, frozen=True):
    """Parts that were not asked for are None."""

    contests: tuple[Contest, ...]
    index: IndexReport | None
    gateway: GatewayBenchReport | None
    not_measured: tuple[str, ...]


# What is no contestant here, and why; said in every report.
NOT_MEASURED = (
    "Transformers' continuous batching: on a CPU it takes about half a second for each token "
    "and ten seconds for a prompt of 512 tokens of the demo model, which is no load to compare",
    "vLLM's prefill/decode split: its NixlConnector needs a proxy that sends each request twice, "
    "and two more servers of a minute's start, which the time of this command has no room for",
)


def run_peers(
    config: PeersConfig,
    parts: Sequence[Part],
    model: ModelDirectory,
    quick: bool,
    progress: Progress,
) -> PeersResult:
    """Measure these parts. Raises MemserveError for what of ours fails; peers are skipped."""
    contests = asyncio.run(_contests(config, parts, model, quick, progress))
    index = gateway = None
    if "index" in parts:
        index = run_index_bench(QUICK if quick else IndexShape(), 1 if quick else 2, progress)
    if "gateway" in parts:
        gateway = _gateways(quick, progress)
    return PeersResult(contests, index, gateway, NOT_MEASURED)


async def _contests(
    config: PeersConfig, parts: Sequence[Part], model: ModelDirectory, quick: bool, say: Progress
) -> tuple[Contest, ...]:
    cores = sorted(os.sched_getaffinity(0))[: config.threads]
    loads = Loads(
        dtype=config.dtype,
        repeats=1 if quick else config.repeats,
        seed=config.seed,
        rate=config.rate,
        concurrency=config.concurrency,
        sessions=config.sessions,
        max_turns=config.max_turns,
        max_output_tokens=config.max_output_tokens,
        seconds=60 * config.contest_minutes,
    )
    found = []
    if "serving" in parts or "pair" in parts:
        work = await asyncio.to_thread(load_sessions, load_config(loads, "open"), model, say)
    if "serving" in parts:
        found.append(await one_instance(loads, model, cores, work, say))
    if "pair" in parts:
        found.append(await two_instances(loads, model, cores, work, say))
    return tuple(found)


def _gateways(quick: bool, progress: Progress) -> GatewayBenchReport:
    """The routers' environment is where the comparison of gateways looks for them."""
    os.environ["PATH"] = f"{(ROOT / 'routers' / 'bin').absolute()}{os.pathsep}{os.environ['PATH']}"
    return run_gateway_bench(
        GatewayWorkload(
            streams=64,
            prompt_tokens=400,
            gap_seconds=0.01,
            seconds=1.0 if quick else 2.0,
            repeats=1,
            policy="prompt-tree",
            workers=available_cores(),  # the routers have threads for all of them
        ),
        progress,
    )


# --- tables -------------------------------------------------------------------------------

Figure = Callable[[ServingSummary], Distribution | None]
_COLUMNS = ("mean", "P50", "P99")
_FIGURES: tuple[tuple[str, Figure], ...] = (
    ("TTFT ms", lambda s: s.ttft),
    ("TPOT ms", lambda s: s.tpot),
)


def peers_tables(result: PeersResult) -> Group:
    """All tables, one below the other."""
    parts: list[RenderableType] = []
    for contest in result.contests:
        for load in LOADS:
            runs = [run for run in contest.runs if run.load == load]
            if runs:
                parts.append(_contest_table(contest, f"{contest.name}, {load} loop", runs))
        parts += _skipped(contest.skipped)
    if result.index is not None:
        parts += [index_table(result.index), *_skipped(result.index.skipped)]
    if result.gateway is not None:
        parts.append(gateway_bench_table(result.gateway))
        parts += _skipped(result.gateway.skipped)
    parts += [f"not measured: {reason}" for reason in result.not_measured]
    return Group(*parts)


def _contest_table(contest: Contest, title: str, runs: Sequence[PeerRun]) -> Table:
    table = Table(
        title=f"{title}; means over the rounds, then ours / theirs of the same round: geometric "
        "mean (lowest-highest), below 1 where ours is faster"
    )
    table.add_column("server")
    for label, _ in _FIGURES:
        for column in _COLUMNS:
            table.add_column(f"{label} {column}", justify="right")
        table.add_column("ratio of means", justify="right")
        table.add_column("of P99", justify="right")
    table.add_column("output tokens/s", justify="right")
    table.add_column("rounds", justify="right")
    table.add_column("cached", justify="right")
    own = [run for run in runs if OURS in run.server]
    for name in dict.fromkeys(run.server for run in runs):
        mine = [run for run in runs if run.server == name]
        cells = [cell for _, figure in _FIGURES for cell in _cells(own, mine, figure)]
        rate = sum(run.summary.output_tokens_per_second for run in mine) / len(mine)
        cached = sum(run.summary.cached_ratio for run in mine) / len(mine)
        table.add_row(name, *cells, f"{rate:.1f}", str(len(mine)), f"{cached:.0%}")
    return table


def _cells(own: Sequence[PeerRun], mine: Sequence[PeerRun], figure: Figure) -> Iterator[str]:
    for column in _COLUMNS:
        values = list(_values(mine, figure, column))
        yield f"{1000 * sum(values) / len(values):.0f}" if values else "-"
    for column in ("mean", "P99"):
        yield "" if mine == own else _ratio(own, mine, figure, column)


def _values(
    runs: Sequence[PeerRun],
    figure: Figure,
    column: str,
) -> Iterator[float]:
    for run in runs:
        if (found := figure(run.summary)) is not None:
            yield {"mean": found.mean, "P50": found.p50, "P99": found.p99}[column]


def _ratio(
    own: Sequence[PeerRun],
    theirs: Sequence[PeerRun],
    figure: Figure,
    column: str,
) -> str:
    """Of rounds that both were in."""
    by_round = {run.repeat: run for run in own}
    pairs = [(by_round[run.repeat], run) for run in theirs if run.repeat in by_round]
    ratios = [
        ours / other
        for a, b in pairs
        for ours, other in zip(
            _values([a], figure, column), _values([b], figure, column), strict=False
        )
        if ours > 0 and other > 0
    ]
    if not ratios:
        return "-"
    return f"{geometric_mean(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def _skipped(skipped: dict[str, str]) -> Iterator[str]:
    for name, why in skipped.items():
        yield f"{name}: skipped: {why}"
