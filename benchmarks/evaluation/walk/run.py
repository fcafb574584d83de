"""`run_walk`: sends requests through a cluster, and records the calls in each of its processes.

Functions that a process calls each second anyway (polls, joins, KV events) are recorded first, and
left out: the request's own handling may need some of them, too, so that its counts are the least
that they can be.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import tempfile
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
from rich.table import Table

from evaluation.soak.cluster import RunningUp, running_up
from evaluation.soak.vitals import process_tree
from memserve.bench.measure import BenchmarkError
from memserve.bench.openai_client import OpenAIClient
from memserve.clock import MonotonicClock
from memserve.config import ClusterConfig, GatewayConfig, InstanceConfig, ModelConfig
from memserve.models.resolve import Progress
from memserve.types import Role

RECORDER = Path(__file__).parent / "recorder"
_VOCABULARY = 250  # token ids of prompts are below it: every tokenizer here has as many
_PROMPT, _ANSWER = 400, 8  # tokens
_BACKGROUND_SECONDS = 5.0
_SETTLE_SECONDS = 2.0  # until a returned cache has arrived, and its events
_WRITE_SECONDS = 30.0
SHAPES = {
    "colocated": ((Role.COLOCATED, 1),),
    "prefill and decode": ((Role.PREFILL, 1), (Role.DECODE, 1)),
}


class Stop(msgspec.Struct, frozen=True):
    """A function that a request passed."""

    module: str
    name: str  # qualified

    @property
    def owner(self) -> str | None:
        """The class of a method; None: a function."""
        owner = self.name.partition(".<locals>")[0].rpartition(".")[0]
        return f"{self.module}:{owner}" if owner else None


class Walk(msgspec.Struct, frozen=True):
    """One request, through all processes that had a part in it."""

    shape: str
    processes: dict[str, tuple[Stop, ...]]  # by name, in the order of first calls

    @property
    def modules(self) -> set[str]:
        return {stop.module for stops in self.processes.values() for stop in stops}

    @property
    def classes(self) -> set[str]:
        found = {stop.owner for stops in self.processes.values() for stop in stops}
        return {owner for owner in found if owner is not None}


class WalkResult(msgspec.Struct, frozen=True):
    walks: tuple[Walk, ...]


async def run_walk(model: ModelConfig, progress: Progress) -> WalkResult:
    """Record a second turn of a conversation on each shape. The first turn is cached where the
    second is computed: nothing is fetched from a third instance. Raises BenchmarkError."""
    walks = []
    for shape in SHAPES:
        with _recorded() as directory:
            async with running_up(_cluster(model, shape)) as up:
                processes = await _second_turn(up, model, directory)
        walks.append(Walk(shape, processes))
        progress(f"{shape}: {len(walks[-1].modules)} modules, {len(walks[-1].classes)} classes")
    return WalkResult(tuple(walks))


@contextmanager
def _recorded() -> Iterator[Path]:
    """Context in which processes that are started record their calls."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="memserve-walk-") as directory:
        os.environ["WALK_DIRECTORY"] = directory
        os.environ["PYTHONPATH"] = os.pathsep.join(
            (str(RECORDER), *filter(None, [before.get("PYTHONPATH")]))
        )
        try:
            yield Path(directory)
        finally:
            os.environ.clear()
            os.environ.update(before)


def _cluster(model: ModelConfig, shape: str) -> ClusterConfig:
    return ClusterConfig(
        model=model,
        # The prompt-tree policy would compute what little is new where the first turn was decoded.
        gateway=GatewayConfig(access_log=False, policy="round-robin"),
        instance=tuple(
            InstanceConfig(role=role, count=count, hbm_blocks=256, dram_blocks=0, threads=1)
            for role, count in SHAPES[shape]
        ),
    )


async def _second_turn(
    up: RunningUp, model: ModelConfig, directory: Path
) -> dict[str, tuple[Stop, ...]]:
    chance = random.Random(0)
    lives = [
        life
        for life in process_tree(up.pid)
        if life.name == "gateway" or life.name.partition("-")[0] in {str(role) for role in Role}
    ]
    prompt = [chance.randrange(3, _VOCABULARY) for _ in range(_PROMPT)]
    more = [*prompt, *(chance.randrange(3, _VOCABULARY) for _ in range(_PROMPT))]
    async with OpenAIClient(up.url, model.served_name or model.path, MonotonicClock()) as client:

        async def ask(tokens: list[int]) -> None:
            answer = await client.complete(tokens, _ANSWER)
            if answer.error is not None:
                raise BenchmarkError(f"a request failed: {answer.error}")

        await ask(prompt[:50])  # makes connections
        await ask(prompt)
        await asyncio.sleep(_SETTLE_SECONDS)
        pids = [life.pid for life in lives]
        background = await _record(pids, directory, asyncio.sleep(_BACKGROUND_SECONDS))
        walked = await _record(pids, directory, ask(more))
    found = {}
    for life in lives:
        usual = set(background[life.pid])
        found[life.name] = tuple(stop for stop in walked[life.pid] if stop not in usual)
    return found


async def _record(
    pids: Sequence[int], directory: Path, work: Awaitable[None]
) -> dict[int, tuple[Stop, ...]]:
    """Return what each process called during `work`."""
    for pid in pids:
        os.kill(pid, signal.SIGUSR1)
    await asyncio.sleep(0.1)
    await work
    await asyncio.sleep(_SETTLE_SECONDS)
    found = {}
    for pid in pids:
        os.kill(pid, signal.SIGUSR2)
    for pid in pids:
        file = directory / str(pid)
        for _ in range(int(_WRITE_SECONDS / 0.1)):
            if file.exists():
                break
            await asyncio.sleep(0.1)
        else:
            raise BenchmarkError(f"process {pid} has not written its calls")
        lines = file.read_text(encoding="utf-8").splitlines()
        found[pid] = tuple(Stop(*line.split("\t")) for line in lines)
        file.unlink()
    return found


def walk_table(result: WalkResult) -> Table:
    """A row for each process of each shape, and one for all together."""
    table = Table(title="What a request passes")
    for name in ("request", "process", "modules", "classes", "functions"):
        table.add_column(name, justify="left" if name in {"request", "process"} else "right")
    for walk in result.walks:
        for name, stops in walk.processes.items():
            modules = {stop.module for stop in stops}
            classes = {stop.owner for stop in stops if stop.owner is not None}
            table.add_row(walk.shape, name, *map(str, (len(modules), len(classes), len(stops))))
        functions = {stop for stops in walk.processes.values() for stop in stops}
        counts = len(walk.modules), len(walk.classes), len(functions)
        table.add_row(walk.shape, "all", *map(str, counts))
    return table
