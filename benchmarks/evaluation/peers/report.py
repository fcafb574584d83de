"""`python -m evaluation peers`: everything at once, and its tables."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence

import msgspec
from rich.console import Group, RenderableType

from evaluation.peers.config import Part, PeersConfig
from evaluation.peers.contest_tables import contest_tables
from evaluation.peers.index import QUICK, IndexReport, IndexShape, index_table, run_index_bench
from evaluation.peers.serving import (
    Contest,
    Loads,
    load_config,
    one_instance,
    two_instances,
)
from evaluation.peers.tiers import TierSettings, beside_lmcache, host_memory, prefill_and_decode
from memserve.bench.gateway import (
    GatewayBenchReport,
    GatewayWorkload,
    gateway_bench_table,
    run_gateway_bench,
)
from memserve.bench.vllm_engine import ROOT
from memserve.bench.work import Work, load_sessions
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
        workload=config.workload,
        data=config.data,
        seconds=60 * config.contest_minutes,
    )
    found = []
    if "serving" in parts or "pair" in parts:
        work = await _work(loads, model, say)
    if "serving" in parts:
        found.append(await one_instance(loads, model, cores, work, say))
    if "pair" in parts:
        found.append(await two_instances(loads, model, cores, work, say))
    if "tiers" in parts:
        found += await _tier_contests(config, loads, model, cores, say)
    return tuple(found)


async def _tier_contests(
    config: PeersConfig, loads: Loads, model: ModelDirectory, cores: Sequence[int], say: Progress
) -> list[Contest]:
    """Those that are asked for, with work that is more than vLLM's own memory holds."""
    loads = msgspec.structs.replace(
        loads, sessions=config.tier_sessions, concurrency=config.tier_concurrency
    )
    tiers = TierSettings(kv=config.tier_kv, dram=config.tier_dram)
    work = await _work(loads, model, say)
    contests = {
        "host-memory": host_memory,
        "lmcache": beside_lmcache,
        "prefill-decode": prefill_and_decode,
    }
    return [
        await contest(loads, tiers, model, cores, work, say)
        for name, contest in contests.items()
        if config.tier_contest in (name, "all")
    ]


async def _work(loads: Loads, model: ModelDirectory, say: Progress) -> Work:
    return await asyncio.to_thread(load_sessions, load_config(loads, "open"), model, say)


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


def peers_tables(result: PeersResult) -> Group:
    """All tables, one below the other."""
    parts: list[RenderableType] = []
    for contest in result.contests:
        parts += contest_tables(contest)
        parts += _skipped(contest.skipped)
    if result.index is not None:
        parts += [index_table(result.index), *_skipped(result.index.skipped)]
    if result.gateway is not None:
        parts.append(gateway_bench_table(result.gateway))
        parts += _skipped(result.gateway.skipped)
    parts += [f"not measured: {reason}" for reason in result.not_measured]
    return Group(*parts)


def _skipped(skipped: dict[str, str]) -> Iterator[str]:
    for name, why in skipped.items():
        yield f"{name}: skipped: {why}"
