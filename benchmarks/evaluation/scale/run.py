"""`python -m evaluation scale`: settings, and the run through all sizes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

import memserve
from evaluation.scale.gateway import GatewayFigures, ScaleLoad, measure_gateway
from memserve.bench.scheduler import PolicyTiming, SchedulerWorkload, time_policy
from memserve.config import Positive, doc
from memserve.errors import ConfigError
from memserve.models.resolve import Progress
from memserve.scheduler.hardware import cost_model

_SMALLER = (64, 256)  # clusters that are measured, too


class ScaleConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How large the cluster is, and what is done in it."""

    members: Annotated[Positive, doc("of the largest cluster; 64 and 256 are measured, too")] = 1000
    held_blocks: Annotated[Positive, doc("that each member has cached")] = 512
    seconds: Annotated[float, Meta(gt=0), doc("of each measurement")] = 5.0
    batches: Annotated[Positive, doc("of KV events per second, of all members")] = 500
    decisions: Annotated[Positive, doc("timed, on each layout")] = 500
    prompts: Annotated[Positive, doc("known to the prompt trees in these")] = 5000
    ready_seconds: Annotated[
        float, Meta(gt=0), doc("until a gateway that does not come up is given up")
    ] = 120.0


class ScaleResult(msgspec.Struct, frozen=True):
    """Gateways and decisions, by the size of the cluster."""

    gateways: tuple[GatewayFigures, ...]
    decisions: tuple[PolicyTiming, ...]


def run_scale(config: ScaleConfig, before: Path | None, progress: Progress) -> ScaleResult:
    """Measure gateways and decisions of all sizes; with `before`, the folder of another version's
    package, its gateway in turn with this one's. Raises ConfigError, MemserveError."""
    sources = {"now": Path(memserve.__file__).parent.parent}
    if before is not None:
        if not (before / "memserve").is_dir():
            raise ConfigError(f"--before {before}: no folder 'memserve' in it")
        sources = {"before": before.resolve(), **sources}
    load = ScaleLoad(
        held_blocks=config.held_blocks,
        seconds=config.seconds,
        batches=config.batches,
        ready_seconds=config.ready_seconds,
    )
    sizes = [*(size for size in _SMALLER if size < config.members), config.members]
    found = [
        asyncio.run(measure_gateway(name, source, size, load, progress))
        for size in sizes
        for name, source in sources.items()
    ]
    return ScaleResult(tuple(found), tuple(_decisions(config, sizes, progress)))


def _decisions(config: ScaleConfig, sizes: list[int], progress: Progress) -> list[PolicyTiming]:
    costs = cost_model("h800", "llama2-13b", tp=2)
    timings = []
    for size in sizes:
        progress(f"decisions among {size} instances")
        work = SchedulerWorkload(instances=size, prompts=config.prompts, decisions=config.decisions)
        timings.append(time_policy(work, "colocated", "prompt-tree", costs))
        timings.append(time_policy(work, "prefill + decode", "prompt-tree", costs))
    return timings
