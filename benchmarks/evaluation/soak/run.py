"""`python -m evaluation soak`: a cluster under mixed load for an hour or a night, and what each
of its processes holds meanwhile.

Load comes in rounds: clients one after the other without a pause, towards the end of a round four
times as many of them, then none at all. When nothing runs, nothing may be held: blocks that are
not free or cached are counted as leaked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec

from evaluation.soak.client import ANSWER_SECONDS, SoakClient
from evaluation.soak.cluster import MEMSERVE, RunningUp, running_up
from evaluation.soak.load import KindTally, SoakLoad, described
from evaluation.soak.trend import Tolerance, Trend, trend_of
from evaluation.soak.vitals import Life, Vitals, process_tree, vitals
from memserve.bench.environment import Environment, capture_environment
from memserve.bench.measure import served_model
from memserve.config import ClusterConfig, InstanceConfig, Positive, PositiveSeconds, doc
from memserve.models.resolve import Progress
from memserve.types import Role

ROUND_SECONDS = 300.0
BURST_SHARE = 0.1  # of a round, at its end
BURST_CLIENTS = 4  # times as many
# What may still be given back, fetched or waited for after the last answer: leases of transfers
# and private namespaces' second drop are done within half of it.
QUIET_SECONDS = 20.0
LOOK_SECONDS = 1.0  # members' figures come with polls: two of them are newer than a look

# What a figure may differ by without being called growth; see `trend`. Allocators keep what they
# had at the highest load (bytes); a connection more or less is no leak (descriptors, threads).
TOLERANCES = {
    "private": Tolerance(16 * 2**20, 0.05),
    "rss": Tolerance(32 * 2**20, 0.05),
    "shm": Tolerance(1 * 2**20, 0.0),
    "fds": Tolerance(8, 0.1),
    "threads": Tolerance(2, 0.05),
}


class SoakConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How long, and how much."""

    minutes: Annotated[PositiveSeconds, doc("of load")] = 60.0
    interval: Annotated[PositiveSeconds, doc("seconds between samples of every process")] = 5.0
    clients: Annotated[Positive, doc("at the same time; in bursts four times as many")] = 4
    probes: Annotated[Positive, doc("prompts that must be answered with the same tokens")] = 8
    prompt_tokens: Annotated[Positive, doc("of the longest prompt")] = 384
    output_tokens: Annotated[Positive, doc("of an answer")] = 24
    seed: Annotated[int, doc("of what is asked")] = 0


class Sample(msgspec.Struct, frozen=True):
    """One process at one moment of the run."""

    seconds: float
    vitals: Vitals


class ProcessRecord(msgspec.Struct, frozen=True):
    """One life, its samples, and what they say."""

    life: Life
    samples: tuple[Sample, ...]
    trends: dict[str, Trend]  # by names of `Vitals`

    @property
    def flat(self) -> bool | None:
        """None: it was there for too short a time."""
        verdicts = [trend.flat for trend in self.trends.values()]
        return None if None in verdicts else all(verdicts)


class QuietLook(msgspec.Struct, frozen=True):
    """An instance when nothing runs: blocks of both media that nobody should have."""

    seconds: float
    instance: str
    active: int
    detached: int
    pinned: int
    cached: int
    whole: bool  # total = free + active + cached + detached

    @property
    def leaked(self) -> int:
        return self.active + self.detached + self.pinned


class SoakResult(msgspec.Struct, frozen=True):
    """What came of it."""

    minutes: float  # of load, as it was
    kinds: tuple[KindTally, ...]
    processes: tuple[ProcessRecord, ...]
    quiet: tuple[QuietLook, ...]  # the last look at each instance in each idle gap
    troubles: tuple[str, ...]  # what was said of what failed, most frequent first
    cut_short: str | None = None  # why it ended early

    @property
    def sound(self) -> bool:
        """Everything answered, the right tokens, no block leaked, nothing grew."""
        bad = sum(kind.wrong + kind.unanswered for kind in self.kinds)
        bad += sum(look.leaked + (not look.whole) for look in self.quiet)
        grown = any(record.flat is False for record in self.processes)
        return not bad and not grown and self.cut_short is None


@dataclass
class _Soak:
    up: RunningUp
    config: SoakConfig
    load: SoakLoad
    progress: Progress
    begin: float = field(default_factory=lambda: asyncio.get_running_loop().time())
    samples: dict[Life, list[Sample]] = field(default_factory=dict)
    quiet: list[QuietLook] = field(default_factory=list)

    async def run(self) -> float:
        """Rounds until the time is over; the minutes that they took."""
        end = self.begin + 60 * self.config.minutes
        # Three rounds at least: what leaks in each is seen in the last.
        seconds = min(ROUND_SECONDS, 60 * self.config.minutes / 3)
        number = 0
        while self.now() < end:
            await self._round(number, min(seconds, end - self.now()))
            number += 1
            await self._look()
            self._tell(number)
        return (self.now() - self.begin) / 60

    async def sample(self) -> None:
        """For ever."""
        while True:
            self.up.check()
            for life in await asyncio.to_thread(process_tree, self.up.pid):
                # Page tables of many GB take milliseconds: not on the clients' loop.
                if (found := await asyncio.to_thread(vitals, life.pid)) is not None:
                    at = round(self.now() - self.begin, 2)
                    self.samples.setdefault(life, []).append(Sample(at, found))
            await asyncio.sleep(self.config.interval)

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    async def _round(self, number: int, seconds: float) -> None:
        over = asyncio.Event()
        burst = BURST_CLIENTS * self.config.clients
        async with asyncio.TaskGroup() as group:
            for client in range(self.config.clients):
                group.create_task(self.load.run(client, number, over))
            await asyncio.sleep(seconds * (1 - BURST_SHARE))
            for client in range(self.config.clients, burst):
                group.create_task(self.load.run(client, number, over))
            await asyncio.sleep(seconds * BURST_SHARE)
            over.set()

    async def _look(self) -> None:
        """Until nothing is held, or for QUIET_SECONDS."""
        end = self.now() + QUIET_SECONDS
        looks: tuple[QuietLook, ...] = ()
        while self.now() < end:
            await asyncio.sleep(LOOK_SECONDS)
            view = await self.up.view()
            if view is None:
                continue
            looks = tuple(
                QuietLook(
                    seconds=round(self.now() - self.begin, 2),
                    instance=member.id,
                    active=member.hbm.active + member.dram.active,
                    detached=member.hbm.detached + member.dram.detached,
                    pinned=member.hbm.pinned + member.dram.pinned,
                    cached=member.hbm.cached + member.dram.cached,
                    whole=all(
                        m.total == m.free + m.active + m.cached + m.detached
                        for m in (member.hbm, member.dram)
                    ),
                )
                for member in view.instances
            )
            if looks and not any(look.leaked or not look.whole for look in looks):
                break
        self.quiet += looks

    def _tell(self, rounds: int) -> None:
        names = ("requests", "wrong", "unanswered", "failed")
        counts = ", ".join(f"{self.load.total(name)} {name}" for name in names)
        leaked = sum(look.leaked for look in self.quiet)
        minutes = (self.now() - self.begin) / 60
        self.progress(f"{minutes:.1f} min, round {rounds}: {counts}; {leaked} blocks leaked")

    def result(self, minutes: float, cut_short: str | None) -> SoakResult:
        return SoakResult(
            minutes=minutes,
            kinds=tuple(self.load.tallies.values()),
            processes=tuple(map(record_of, self.samples, self.samples.values())),
            quiet=tuple(self.quiet),
            troubles=described(self.load.troubles),
            cut_short=cut_short,
        )


def record_of(life: Life, samples: Sequence[Sample]) -> ProcessRecord:
    """What a life's samples say."""
    times = [sample.seconds for sample in samples]
    trends = {}
    for name, tolerance in TOLERANCES.items():
        values = [msgspec.structs.asdict(sample.vitals)[name] for sample in samples]
        if (trend := trend_of(times, values, tolerance)) is not None:
            trends[name] = trend
    return ProcessRecord(life, tuple(samples), trends)


def default_cluster() -> tuple[InstanceConfig, ...]:
    """One of each role, small enough that blocks are evicted within minutes."""
    return tuple(InstanceConfig(role=role, hbm_blocks=384, dram_blocks=256) for role in Role)


async def run_soak(
    config: SoakConfig,
    cluster: ClusterConfig,
    progress: Progress,
    *,
    log: Path | None = None,
    command: Sequence[str] = MEMSERVE,
) -> SoakResult:
    """Start the cluster, load it, end it. `log`: where its output goes; `command`: memserve's.

    An interruption (Ctrl-C) ends the run early, with what there is by then. Raises BenchmarkError
    where it does not come to serve.
    """
    async with running_up(cluster, log, command) as up:
        model = (await served_model(up.url)).id
        async with SoakClient(up.url, model) as client:
            load = SoakLoad(
                client, config.seed, config.probes, config.prompt_tokens, config.output_tokens
            )
            soak = _Soak(up, config, load, progress)
            progress(f"{up.url} serves {model}; {config.minutes:g} minutes begin")
            return await _watched(soak)


async def _watched(soak: _Soak) -> SoakResult:
    sampling = asyncio.create_task(soak.sample())
    running = asyncio.create_task(soak.run())
    begin = soak.now()
    cut_short = None
    try:
        await asyncio.wait((sampling, running), return_when=asyncio.FIRST_COMPLETED)
        if sampling.done() and (failure := sampling.exception()) is not None:
            cut_short = str(failure)
    except asyncio.CancelledError:
        cut_short = "interrupted"
    sampling.cancel()
    if cut_short is not None:
        running.cancel()
    await asyncio.wait((sampling, running), timeout=ANSWER_SECONDS)
    if not running.cancelled() and running.done() and (failure := running.exception()) is not None:
        raise failure
    return soak.result((soak.now() - begin) / 60, cut_short)


class SoakReport(msgspec.Struct, frozen=True):
    """For the page: where, how, and what came of it."""

    environment: Environment
    config: SoakConfig
    result: SoakResult

    @classmethod
    def of(cls, config: SoakConfig, result: SoakResult) -> SoakReport:
        return cls(capture_environment(), config, result)
