"""Servers beside each other: the same model, cores, threads and requests, in turns.

All servers of a contest run during all of it; one at a time is sent requests. Idle ones cost
nothing that shows. Every round has another order and a cache of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Literal

import msgspec

from evaluation.peers.process import PeerFailed, PeerServer
from evaluation.peers.servers import (
    ROUTER_SECONDS,
    ours,
    ready,
    start_generate,
    start_router,
    start_vllm,
)
from evaluation.peers.vllm import START_SECONDS
from memserve.bench.measure import BenchmarkError, measure_server
from memserve.bench.report import ServingSummary
from memserve.bench.vllm_engine import why_missing
from memserve.bench.work import ServeBenchConfig, Work
from memserve.clock import MonotonicClock
from memserve.config import Dtype, InstanceConfig
from memserve.models.resolve import ModelDirectory, Progress
from memserve.workloads.text import TextWorkload

_clock = MonotonicClock()
OURS = "memserve"

Load = Literal["open", "closed"]
LOADS: tuple[Load, ...] = ("open", "closed")


class Loads(msgspec.Struct, frozen=True, kw_only=True):
    """What is sent in each round: sessions at a rate, then so many at a time."""

    dtype: Dtype
    repeats: int
    seed: int
    rate: float
    concurrency: int
    sessions: int
    max_turns: int
    max_output_tokens: int
    workload: TextWorkload = "sharegpt"
    data: str | None = None  # its file or folder
    seconds: float = float("inf")  # of a contest, its start included: no round is begun behind it


class PeerRun(msgspec.Struct, frozen=True):
    """One server under one load."""

    server: str
    load: Load
    repeat: int
    summary: ServingSummary


class Contest(msgspec.Struct, frozen=True):
    """Servers on the same cores."""

    name: str
    threads: tuple[int, ...]  # of each instance
    runs: tuple[PeerRun, ...]
    skipped: dict[str, str]
    tiers: bool = False  # its tables tell of caches and of whole answers


async def one_instance(
    loads: Loads, model: ModelDirectory, cores: Sequence[int], work: Work, progress: Progress
) -> Contest:
    """One instance with all cores: ours, vLLM with and without its prefix cache, and generate."""
    started = _clock.now()
    name = f"One instance on {len(cores)} cores"
    async with AsyncExitStack() as stack:
        skipped: dict[str, str] = {}
        peers: list[tuple[str, PeerServer]] = []
        if (why := why_missing("vllm")) is not None:
            skipped["vLLM"] = why
        else:
            for title, caching in (("vLLM", True), ("vLLM, no prefix cache", False)):
                server = start_vllm(stack, model.path, loads.dtype, cores, caching=caching)
                peers.append((title, server))
        generate = start_generate(stack, loads.dtype, model.path, cores)
        peers.append(("Transformers generate", generate))
        own = ours(model, loads.dtype, _builtin([cores]), progress)
        urls = {OURS: await stack.enter_async_context(own)}
        urls |= await ready(peers, skipped, START_SECONDS, progress)
        runs = await rounds(loads, started, urls, work, skipped, progress)
    return Contest(name, (len(cores),), runs, skipped)


async def two_instances(
    loads: Loads, model: ModelDirectory, cores: Sequence[int], work: Work, progress: Progress
) -> Contest:
    """An instance on each of two cores: ours behind our gateway, vLLM behind vllm-router."""
    started = _clock.now()
    name = "Two instances of one core"
    each = [(cores[0],), (cores[-1],)]
    async with AsyncExitStack() as stack:
        skipped: dict[str, str] = {}
        pair = "2 vLLM, vllm-router"
        missing = [why for peer in ("vllm", "routers") if (why := why_missing(peer)) is not None]
        peers: list[tuple[str, PeerServer]] = []
        if missing:
            skipped[pair] = "; ".join(missing)
        else:
            peers = [(pair, start_vllm(stack, model.path, loads.dtype, one)) for one in each]
        own = ours(model, loads.dtype, _builtin(each), progress)
        urls = {f"2 {OURS}, its gateway": await stack.enter_async_context(own)}
        found = await ready(peers, skipped, START_SECONDS, progress)
        if pair in found and pair not in skipped:
            router = start_router(stack, [server.url for _, server in peers])
            urls |= await ready([(pair, router)], skipped, ROUTER_SECONDS, progress)
        runs = await rounds(loads, started, urls, work, skipped, progress)
    return Contest(name, (1, 1), runs, skipped)


async def rounds(
    loads: Loads,
    started: float,
    urls: dict[str, str],
    work: Work,
    skipped: dict[str, str],
    progress: Progress,
) -> tuple[PeerRun, ...]:
    """All servers under all loads, so often as is asked for; every second time backwards."""
    found: list[PeerRun] = []
    begun = _clock.now()
    for repeat in range(loads.repeats):
        now = _clock.now()
        if repeat and now + (now - begun) / repeat > started + loads.seconds:
            progress(f"no time for more than {repeat} of {loads.repeats} rounds")
            break
        for load in LOADS:
            config = load_config(loads, load)
            order = list(urls) if repeat % 2 == 0 else list(urls)[::-1]
            for server in order:
                if server in skipped:
                    continue
                progress(f"{server}, {load} loop, {repeat + 1} of {loads.repeats}")
                try:
                    run = await measure_server(
                        server, config, urls[server], work, progress, repeat=repeat
                    )
                    if run.summary.failed:
                        raise PeerFailed(f"{run.summary.failed} requests failed")
                except (BenchmarkError, PeerFailed) as error:
                    if OURS in server:
                        raise
                    skipped[server] = str(error)
                else:
                    found.append(PeerRun(server, load, repeat, run.summary))
    return tuple(found)


def load_config(loads: Loads, load: Load) -> ServeBenchConfig:
    return ServeBenchConfig(
        workload=loads.workload,
        data=loads.data,
        rate=loads.rate,
        sessions=loads.sessions,
        seed=loads.seed,
        max_turns=loads.max_turns,
        max_output_tokens=loads.max_output_tokens,
        # All are asked the same, whatever they answer.
        replay_answers=True,
        # More than one: each run then has a cache of its own.
        repeats=max(2, loads.repeats),
        concurrency=loads.concurrency if load == "closed" else None,
    )


def _builtin(cores: Sequence[Sequence[int]]) -> list[InstanceConfig]:
    """An instance for each of these sets of cores."""
    return [InstanceConfig(threads=len(one), cpus=tuple(one), profile="off") for one in cores]
