"""`run_handover`: what the second token waits for, by how a hand-over is cut into writes.

One prefill and one decode instance; prompts come one at a time and share nothing. The prefill
instance tells the first token, the decode instance the second one, when it has the prompt's KV.
Beside it a colocated instance, whose second token waits for nothing. With a cut by layer, writes
are made while later layers are computed: what that hides is the difference to the other cuts.
"""

from __future__ import annotations

import random
from statistics import median
from typing import Annotated, get_args

import msgspec
from msgspec import Meta
from rich.table import Table

from evaluation.planner.live import VOCABULARY
from memserve.bench.measure import BenchmarkError, started_cluster
from memserve.bench.openai_client import Answer, OpenAIClient
from memserve.clock import MonotonicClock
from memserve.cluster.client import ClusterClient
from memserve.config import (
    CacheConfig,
    ClusterConfig,
    GatewayConfig,
    InstanceConfig,
    ModelConfig,
    Positive,
    TransferMode,
    doc,
)
from memserve.models.resolve import Progress, resolve_model
from memserve.types import Role

COLOCATED = "colocated"
_WARM_UP = 2


class HandoverConfig(msgspec.Struct, frozen=True):
    """What is measured."""

    prompt_tokens: Annotated[Positive, doc("of each prompt")] = 2048
    prompts: Annotated[Positive, doc("of each run")] = 12
    repeats: Annotated[Annotated[int, Meta(ge=2)], doc("runs of each cut, by turns")] = 3
    threads: Annotated[Positive, doc("of each instance")] = 1
    aggregated: Annotated[bool, doc("a block's layers and K and V in one run of bytes")] = True


class HandoverRun(msgspec.Struct, frozen=True):
    """Medians of one run, in seconds."""

    cut: str  # a TransferMode, or COLOCATED
    repeat: int
    first_token: float  # since the request was sent
    second_token: float  # since the first


class HandoverReport(msgspec.Struct, frozen=True):
    """The result of `run_handover`."""

    prompt_tokens: int
    runs: tuple[HandoverRun, ...]


async def run_handover(
    config: HandoverConfig, model: ModelConfig, progress: Progress
) -> HandoverReport:
    """Measure each cut and a colocated instance. Raises BenchmarkError, ClusterError."""
    cuts = (COLOCATED, *get_args(TransferMode))
    runs = []
    for repeat in range(config.repeats):
        for cut in cuts:
            run = await _run(config, model, cut, repeat, progress)
            progress(
                f"{cut}: first token {run.first_token * 1e3:.0f} ms, "
                f"second {run.second_token * 1e3:.1f} ms after it"
            )
            runs.append(run)
    return HandoverReport(config.prompt_tokens, tuple(runs))


async def _run(
    config: HandoverConfig, model: ModelConfig, cut: str, repeat: int, progress: Progress
) -> HandoverRun:
    name = resolve_model(model, progress).name
    random_tokens = random.Random(f"{cut}-{repeat}")
    async with (
        started_cluster(_cluster(config, model, cut), progress) as cluster,
        OpenAIClient(cluster.url, name, MonotonicClock()) as client,
    ):
        times = []
        for _ in range(_WARM_UP + config.prompts):
            prompt = [random_tokens.randrange(3, VOCABULARY) for _ in range(config.prompt_tokens)]
            answer = await cluster.or_failure(client.complete(prompt, 3))
            times.append(_times(answer))
        if cut != COLOCATED:
            await cluster.or_failure(_require_hand_overs(cluster.url))
    first, second = zip(*times[_WARM_UP:], strict=True)
    return HandoverRun(cut, repeat, median(first), median(second))


async def _require_hand_overs(url: str) -> None:
    """Raise BenchmarkError unless the decode instance has received blocks: without them it computes
    the prompts, and nothing is measured."""
    async with ClusterClient(url) as operator:
        for member in (await operator.view()).instances:
            handoff = (await operator.stats(member)).handoff
            if member.role is Role.DECODE and not handoff.blocks_received:
                raise BenchmarkError("no KV was handed over")


def _cluster(config: HandoverConfig, model: ModelConfig, cut: str) -> ClusterConfig:
    roles = (Role.COLOCATED,) if cut == COLOCATED else (Role.PREFILL, Role.DECODE)
    blocks = 4 * -(-config.prompt_tokens // 16)
    mode = CacheConfig() if cut == COLOCATED else msgspec.convert({"mode": cut}, CacheConfig)
    return ClusterConfig(
        model=model,
        gateway=GatewayConfig(policy="round-robin"),  # hands over, whatever it costs
        cache=msgspec.structs.replace(mode, aggregated=config.aggregated),
        instance=tuple(
            InstanceConfig(
                role=role,
                threads=config.threads,
                hbm_blocks=blocks,
                dram_blocks=blocks,  # where KV arrives if HBM is a GPU's
                profile="off",
            )
            for role in roles
        ),
    )


def _times(answer: Answer) -> tuple[float, float]:
    """Return the seconds to the first token, and from there to the second."""
    if answer.error is not None or len(answer.chunk_times) < 2:
        raise BenchmarkError(f"a prompt got no two tokens: {answer.error}")
    first, second = answer.chunk_times[:2]
    return first - answer.sent, second - first


def handover_table(report: HandoverReport) -> Table:
    """Return medians over the runs. `exposed`: more than the colocated one of the same turn."""
    table = Table(title=f"prompts of {report.prompt_tokens} tokens, ms")
    for column in ("", "first token", "second, after the first", "exposed", "of each turn"):
        table.add_column(column, justify="right")
    alone = {run.repeat: run.second_token for run in report.runs if run.cut == COLOCATED}
    for cut in dict.fromkeys(run.cut for run in report.runs):
        runs = [run for run in report.runs if run.cut == cut]
        exposed = [(run.second_token - alone[run.repeat]) * 1e3 for run in runs]
        table.add_row(
            cut,
            f"{median(run.first_token for run in runs) * 1e3:.0f}",
            f"{median(run.second_token for run in runs) * 1e3:.1f}",
            "" if cut == COLOCATED else f"{median(exposed):.1f}",
            "" if cut == COLOCATED else ", ".join(f"{value:.1f}" for value in exposed),
        )
    return table
