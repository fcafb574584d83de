"""`memserve bench caching`: equal conversations with each caching setting of prefill and decode
instances: `off`, `p` (prefill keeps KV), `pd` (both do), `full` (decode also returns KV)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import get_args

import msgspec
from rich.table import Table

from memserve.api.status import HandoffTotals
from memserve.bench.loadgen import RequestRecord
from memserve.bench.measure import (
    BenchmarkError,
    ServeRun,
    StartedCluster,
    measure_cluster,
)
from memserve.bench.report import Distribution
from memserve.bench.work import ServeBenchConfig, Work
from memserve.cluster.client import ClusterClient
from memserve.config import Caching, ClusterConfig, InstanceConfig
from memserve.errors import ClusterError
from memserve.models.resolve import Progress
from memserve.types import Role

# Wait for the returns of the last answers' KV, which follow the answers.
RETURN_SECONDS = 2.0
_MB = 1e6


class TurnSummary(msgspec.Struct, frozen=True):
    """All sessions' requests of one turn, from 0, without failed ones. Times in seconds."""

    turn: int
    requests: int
    cached_ratio: float  # share of prompt tokens cached where the prompt was computed
    cached_ratio_decode: float  # share of prompt tokens cached where the answer was decoded
    computed_tokens: float  # prompt tokens computed per request, mean
    blocks_sent: int  # from prefill to decode
    bytes_sent: int
    bytes_avoided: int  # not sent, since the decode instance had them
    ttft: Distribution | None
    jct: Distribution | None


class CachingRun(msgspec.Struct, frozen=True):
    """One run with one caching setting."""

    caching: Caching
    turns: tuple[TurnSummary, ...]
    handoff: HandoffTotals  # sums over decode instances and repeats, with warm-up
    run: ServeRun


class CachingBenchResult(msgspec.Struct, frozen=True):
    """Runs of one workload with each caching setting."""

    runs: tuple[CachingRun, ...]


def one_and_one() -> tuple[InstanceConfig, ...]:
    """Return the smallest cluster with hand-overs: one prefill and one decode instance."""
    return (InstanceConfig(role=Role.PREFILL), InstanceConfig(role=Role.DECODE))


async def compare_steps(
    config: ServeBenchConfig,
    cluster: ClusterConfig,
    sessions: Work,
    progress: Progress,
) -> CachingBenchResult:
    """Measure clusters that differ only in `caching`, one after the other.

    Raises BenchmarkError, ClusterError.
    """
    found = []
    for caching in get_args(Caching):
        cache = msgspec.structs.replace(cluster.cache, caching=caching)
        own = msgspec.structs.replace(cluster, cache=cache)
        runs, handoff = await measure_cluster(
            f"caching {caching}", config, own, sessions, progress, _given_back
        )
        found += [CachingRun(caching, by_turn(run.requests), handoff, run) for run in runs]
    return CachingBenchResult(tuple(found))


def by_turn(records: Sequence[RequestRecord]) -> tuple[TurnSummary, ...]:
    """Summarise the records of a run by turn."""
    done = [record for record in records if record.error is None]
    turns = []
    for turn in sorted({record.turn for record in done}):
        own = [record for record in done if record.turn == turn]
        asked = sum(record.prompt_tokens for record in own)
        cached = sum(record.cached_tokens for record in own)
        told = [record.figures for record in own if record.figures is not None]
        first = [r.first_token - r.scheduled for r in own if r.first_token is not None]
        turns.append(
            TurnSummary(
                turn=turn,
                requests=len(own),
                cached_ratio=cached / asked if asked else 0.0,
                cached_ratio_decode=(
                    sum(f.cached_tokens_decode for f in told) / asked if asked else 0.0
                ),
                computed_tokens=(asked - cached) / len(own),
                blocks_sent=sum(f.blocks_received for f in told),
                bytes_sent=sum(f.bytes_received for f in told),
                bytes_avoided=sum(f.bytes_avoided for f in told),
                ttft=Distribution.of(first),
                jct=Distribution.of([record.end - record.scheduled for record in own]),
            )
        )
    return tuple(turns)


def caching_table(result: CachingBenchResult) -> Table:
    """Return a table with a row for each turn of each setting, and for the whole run. `computed`:
    tokens per prompt, mean. Sent, avoided and returned KV in megabytes. Times: mean and P99 in
    seconds."""
    table = Table()
    for name in ("caching", "turn", "P has", "D has", "computed", "sent MB", "avoided"):
        table.add_column(name, justify="left" if name == "caching" else "right")
    for name in ("back", "TTFT s", "P99", "JCT s", "P99"):
        table.add_column(name, justify="right")
    for step in result.runs:
        for turn in step.turns:
            table.add_row(
                step.caching,
                str(turn.turn + 1),
                f"{turn.cached_ratio:.1%}",
                f"{turn.cached_ratio_decode:.1%}",
                f"{turn.computed_tokens:.0f}",
                f"{turn.bytes_sent / _MB:.1f}",
                f"{turn.bytes_avoided / _MB:.1f}",
                "",
                *_times(turn.ttft),
                *_times(turn.jct),
            )
        whole, handoff = step.run.summary, step.handoff
        block = handoff.block_bytes / _MB
        table.add_row(
            step.caching,
            "all",
            f"{whole.cached_ratio:.1%}",
            "",
            "",
            f"{handoff.blocks_received * block:.1f}",
            f"{handoff.blocks_already_present * block:.1f}",
            f"{handoff.blocks_returned * block:.1f}",
            *_times(whole.ttft),
            *_times(whole.jct),
            end_section=True,
        )
    return table


def _times(figure: Distribution | None) -> tuple[str, str]:
    return ("-", "-") if figure is None else (f"{figure.mean:.3g}", f"{figure.p99:.3g}")


async def _given_back(cluster: StartedCluster) -> HandoffTotals:
    await asyncio.sleep(RETURN_SECONDS)
    return await cluster.or_failure(_handoff_totals(cluster.url))


async def _handoff_totals(url: str) -> HandoffTotals:
    """Return the sums over the decode instances of the cluster at `url`."""
    try:
        async with ClusterClient(url) as client:
            members = (await client.view()).instances
            decoding = [member for member in members if member.role is Role.DECODE]
            found = [(await client.stats(member)).handoff for member in decoding]
    except ClusterError as error:
        raise BenchmarkError(f"{url} does not say what was handed over: {error}") from error
    return sum_of(found)


def sum_of(totals: Sequence[HandoffTotals]) -> HandoffTotals:
    """Return the sums of all counters. All `totals` have one block size."""
    sums: dict[str, float] = {}
    for one in totals:
        for name, value in msgspec.structs.asdict(one).items():
            sums[name] = value if name == "block_bytes" else sums.get(name, 0) + value
    return msgspec.convert(sums, HandoffTotals)
