"""`run_live`: a real cluster on this machine whose load turns, with the planner and without."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Annotated

import msgspec
from msgspec import Meta
from rich.table import Table

from evaluation.cpu_quota import limited
from evaluation.soak.cluster import RunningUp, running_up
from evaluation.soak.vitals import process_tree
from memserve.bench.openai_client import Answer, OpenAIClient
from memserve.bench.report import tpot
from memserve.clock import MonotonicClock
from memserve.cluster.client import ClusterClient
from memserve.config import (
    ClusterConfig,
    GatewayConfig,
    InstanceConfig,
    ModelConfig,
    NonNegative,
    PlannerConfig,
    Positive,
    doc,
)
from memserve.models.resolve import Progress
from memserve.planner.contract import Action
from memserve.types import Role

_Seconds = Annotated[float, Meta(gt=0)]
VOCABULARY = 250  # token ids of prompts are below it: every tokenizer here has as many
PLANNED = "planner"
# What is compared, by name; the planner begins with two of each.
SPLITS: Mapping[str, tuple[tuple[Role, int], ...]] = {
    PLANNED: ((Role.PREFILL, 2), (Role.DECODE, 2)),
    "1P3D": ((Role.PREFILL, 1), (Role.DECODE, 3)),
    "2P2D": ((Role.PREFILL, 2), (Role.DECODE, 2)),
    "3P1D": ((Role.PREFILL, 3), (Role.DECODE, 1)),
    "4C": ((Role.COLOCATED, 4),),
}


class LiveConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Phases turn from long prompts with short answers to the opposite, and back."""

    seconds: Annotated[_Seconds, doc("of a phase; there are three")] = 60.0
    reading_rate: Annotated[_Seconds, doc("requests per second of long prompts")] = 3.0
    reading_prompt: Annotated[Positive, doc("tokens")] = 1500
    reading_output: Annotated[Positive, doc("tokens")] = 8
    writing_rate: Annotated[_Seconds, doc("requests per second of long answers")] = 3.0
    writing_prompt: Annotated[Positive, doc("tokens")] = 64
    writing_output: Annotated[Positive, doc("tokens")] = 200
    ttft: Annotated[_Seconds, doc("objective of each request")] = 1.0
    tpot: Annotated[_Seconds, doc("objective of each request")] = 0.05
    percentile: Annotated[float, doc("that the planner holds to the objectives")] = 90.0
    repeats: Annotated[Positive, doc("of each split, by turns; figures are medians")] = 2
    seed: Annotated[NonNegative, doc("of prompts and arrivals")] = 0
    cores: Annotated[_Seconds | None, doc("of CPU time for each instance (root); default: all")] = (
        None
    )


class LiveRun(msgspec.Struct, frozen=True):
    """One run on a cluster of its own."""

    split: str
    repeat: int
    served: tuple[float, ...]  # share of each phase's requests inside both objectives
    ttft: tuple[float, ...]  # means, seconds
    tpot: tuple[float, ...]
    failed: int  # requests without a whole answer
    role_changes: int


class LiveResult(msgspec.Struct, frozen=True):
    runs: tuple[LiveRun, ...]


class _Sent(msgspec.Struct, frozen=True):
    phase: int
    due: float
    answer: Answer


async def run_live(config: LiveConfig, model: ModelConfig, progress: Progress) -> LiveResult:
    """Run every split `repeats` times. Raises BenchmarkError if a cluster does not start."""
    runs = []
    for repeat in range(config.repeats):
        for split in SPLITS:
            run = await _one(config, model, split, repeat)
            shares = ", ".join(f"{share:.0%}" for share in run.served)
            progress(f"{split}, {repeat + 1} of {config.repeats}: {shares} served")
            runs.append(run)
    return LiveResult(tuple(runs))


async def _one(config: LiveConfig, model: ModelConfig, split: str, repeat: int) -> LiveRun:
    async with running_up(_cluster(config, model, split)) as up:
        name = model.served_name or model.path
        async with OpenAIClient(up.url, name, MonotonicClock()) as client:
            with _limits(config, up):
                sent = await _load(config, client, random.Random(f"{config.seed}-{repeat}"))
        changes = 0
        async with ClusterClient(up.url) as operator:
            for decision in await operator.plans(200):
                if decision.action is Action.ROLES and not decision.failed:
                    changes += len(decision.changes)
    phases = [[one for one in sent if one.phase == phase] for phase in range(3)]
    whole = [[one for one in phase if one.answer.error is None] for phase in phases]
    return LiveRun(
        split,
        repeat,
        tuple(sum(_served(config, one) for one in phase) / len(phase) for phase in phases),
        tuple(_mean([_ttft(one) for one in phase]) for phase in whole),
        tuple(_mean([tpot(one.answer) or 0.0 for one in phase]) for phase in whole),
        len(sent) - sum(map(len, whole)),
        changes,
    )


def _limits(config: LiveConfig, up: RunningUp) -> AbstractContextManager[None]:
    """Return a context in which each instance has at most `config.cores` of CPU time. Without it,
    an instance takes the time that an idle one leaves, so that splits hardly differ."""
    if config.cores is None:
        return nullcontext()
    roles = {str(role) for role in Role}
    own = [life.pid for life in process_tree(up.pid) if life.name.partition("-")[0] in roles]
    return limited(own, config.cores)


def _cluster(config: LiveConfig, model: ModelConfig, split: str) -> ClusterConfig:
    planner = PlannerConfig(
        enabled=split == PLANNED,
        ttft=config.ttft,
        tpot=config.tpot,
        percentile=config.percentile,
        interval=2.0,
    )
    return ClusterConfig(
        model=model,
        gateway=GatewayConfig(access_log=False),
        planner=planner,
        instance=tuple(
            InstanceConfig(role=role, count=count, hbm_blocks=1024, dram_blocks=0, threads=1)
            for role, count in SPLITS[split]
        ),
    )


async def _load(config: LiveConfig, client: OpenAIClient, chance: random.Random) -> list[_Sent]:
    loop = asyncio.get_running_loop()
    begun = loop.time()
    tasks = []
    due = 0.0
    while due < 3 * config.seconds:
        phase = int(due // config.seconds)
        reading = phase % 2 == 0
        rate = config.reading_rate if reading else config.writing_rate
        length = config.reading_prompt if reading else config.writing_prompt
        output = config.reading_output if reading else config.writing_output
        prompt = [chance.randrange(3, VOCABULARY) for _ in range(length)]
        await asyncio.sleep(max(0.0, begun + due - loop.time()))
        tasks.append(asyncio.create_task(_ask(client, prompt, output, phase, begun + due)))
        due += chance.expovariate(rate)
    return list(await asyncio.gather(*tasks))


async def _ask(
    client: OpenAIClient, prompt: list[int], output: int, phase: int, due: float
) -> _Sent:
    return _Sent(phase, due, await client.complete(prompt, output))


def _served(config: LiveConfig, sent: _Sent) -> bool:
    if sent.answer.error is not None or not sent.answer.chunk_times:
        return False
    return _ttft(sent) <= config.ttft and (tpot(sent.answer) or 0.0) <= config.tpot


def _ttft(sent: _Sent) -> float:
    return sent.answer.chunk_times[0] - sent.due


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def live_table(result: LiveResult) -> Table:
    """A row for each split: medians over its repeats."""
    table = Table(title="Requests inside their objectives, medians over repeats")
    table.add_column("split")
    names = ("reading", "writing", "reading again", "mean", "TTFT ms", "TPOT ms")
    for name in (*names, "failed", "role changes"):
        table.add_column(name, justify="right")
    for split in SPLITS:
        own = [run for run in result.runs if run.split == split]
        if not own:
            continue
        shares = [median(run.served[phase] for run in own) for phase in range(3)]
        table.add_row(
            split,
            *(f"{share:.1%}" for share in (*shares, sum(shares) / 3)),
            " / ".join(f"{median(run.ttft[at] for run in own) * 1e3:.0f}" for at in range(3)),
            " / ".join(f"{median(run.tpot[at] for run in own) * 1e3:.1f}" for at in range(3)),
            str(sum(run.failed for run in own)),
            str(sum(run.role_changes for run in own)),
        )
    return table
